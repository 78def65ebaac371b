"""Training examples in rows of fixed shapes, and the order in which training takes them.

Legend: R rows of a table, B rows of a batch, T tokens of a row, A most answer tokens of a row.

Packed: several examples share a row, each its own segment, so that none attends to another; all
rows have one shape. Unpacked: one example a row, in a few tables of different lengths. The rows of
a step are a pure function of (seed, step), so a run can be resumed without saving the order.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tuco_jax.finetune.conversations import Example
from tuco_jax.prompts.packing import best_fit

__all__ = ["Batch", "Plan", "bucket", "pack", "rows_checksum", "take"]

BUCKETS = 4  # tables of unpacked rows, at most: each is a shape to compile
_MULTIPLE = 8  # of every T and A


class Batch(NamedTuple):
    """Rows as arrays; with leading axis R in place of B, a table of them.

    segments: 1, 2, ... in a row, and 0 at padding. columns: those whose residual stream predicts
    an answer token. targets: those answer tokens. weights: 1, or 0 beyond a row's last answer
    token.
    """

    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    mask: Bool[Array, "B T"] | Bool[np.ndarray, "B T"]
    segments: Int[Array, "B T"] | Int[np.ndarray, "B T"]
    columns: Int[Array, "B A"] | Int[np.ndarray, "B A"]
    targets: Int[Array, "B A"] | Int[np.ndarray, "B A"]
    weights: Float[Array, "B A"] | Float[np.ndarray, "B A"]


def pack(examples: Sequence[Example], length: int) -> Batch:
    """Pack examples into a table of rows of at most `length` tokens.

    Best fit, the longest first: 1 to 3% is usually padding. T is `length`, or less if the fullest
    row is shorter.
    """
    order = sorted(range(len(examples)), key=lambda i: -examples[i].tokens.size)
    sizes = [examples[i].tokens.size for i in order]
    rows = [[order[n] for n in row] for row in best_fit(sizes, length)]
    fullest = max(sum(examples[i].tokens.size for i in row) for row in rows)
    return _table([[examples[i] for i in row] for row in rows], min(length, _ceil(fullest)))


def bucket(examples: Sequence[Example]) -> list[Batch]:
    """Sort examples by length into `BUCKETS` tables at most, with one example a row.

    Each table has about as many examples as any other, and is as long as its longest.
    """
    sizes = np.asarray([e.tokens.size for e in examples])
    edges = np.quantile(sizes, np.arange(1, BUCKETS + 1) / BUCKETS, method="higher")
    edges = sorted({_ceil(int(edge)) for edge in edges})
    place = np.searchsorted(edges, sizes)
    tables = []
    for i, edge in enumerate(edges):
        members = np.flatnonzero(place == i)
        if members.size:
            tables.append(_table([[examples[j]] for j in members.tolist()], edge))
    return tables


def _ceil(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def _table(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    count = len(rows)
    # No token predicts the first one of an example.
    most = max(sum(int(e.answer[1:].sum()) for e in row) for row in rows)
    width = min(_ceil(most), length)
    tokens, segments = np.zeros((2, count, length), np.int32)
    columns, targets = np.zeros((2, count, width), np.int32)
    weights = np.zeros((count, width), np.float32)
    for r, row in enumerate(rows):
        start = filled = 0
        for s, example in enumerate(row, start=1):
            stop = start + example.tokens.size
            tokens[r, start:stop] = example.tokens
            segments[r, start:stop] = s
            answers = np.flatnonzero(example.answer[1:])
            new = slice(filled, filled + answers.size)
            columns[r, new] = start + answers
            targets[r, new] = example.tokens[answers + 1]
            weights[r, new] = 1
            start, filled = stop, filled + answers.size
    return Batch(tokens, segments > 0, segments, columns, targets, weights)


def take(table: Batch, rows: Int[np.ndarray, " B"]) -> Batch:
    """Rows of a table; a row -1 is empty: no token, no weight."""
    present = rows >= 0

    def pick(a: np.ndarray) -> np.ndarray:
        return a[rows] * present.reshape(-1, *(1,) * (a.ndim - 1)).astype(a.dtype)

    return Batch(*(pick(np.asarray(a)) for a in table))


def rows_checksum(tables: Sequence[Batch]) -> str:
    """A hash of the data, by which a resumed run checks that it is the same."""
    found = hashlib.sha256()
    for table in tables:
        for array in table:
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The order of training: every row once an epoch, shuffled anew in each.

    rows: how many a step takes, all from one table. The last step of a table may have fewer; the
    rest of its rows are empty.
    """

    tables: Sequence[Batch]
    rows: int
    seed: int

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return sum(-(-len(table.tokens) // self.rows) for table in self.tables)

    def batch(self, step: int) -> Batch:
        """The batch of step 0, 1, ...: B = rows."""
        epoch, at = divmod(step, self.steps)
        generator = np.random.default_rng([self.seed, epoch])
        chunks = []
        for table in self.tables:
            order = generator.permutation(len(table.tokens))
            order = np.pad(order, (0, -len(order) % self.rows), constant_values=-1)
            chunks += [(table, chunk) for chunk in order.reshape(-1, self.rows)]
        table, rows = chunks[generator.permutation(len(chunks))[at]]
        return take(table, rows)

    def sweep(self) -> list[Batch]:
        """Every row once, in order, for an evaluation."""
        batches = []
        for table in self.tables:
            order = np.arange(len(table.tokens))
            order = np.pad(order, (0, -len(order) % self.rows), constant_values=-1)
            batches += [take(table, chunk) for chunk in order.reshape(-1, self.rows)]
        return batches
