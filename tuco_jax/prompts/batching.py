"""Which prompts share a batch, and at what shape: little padding, few shapes to compile.

Legend: B rows of a batch, T its length, n a prompt's length, all in tokens.

Lengths stand on a fixed ladder of multiples of 8, at most 12% apart above 64. All lengths are
known beforehand, so the rungs in use are chosen by the shortest path over the ladder: padding on
the one hand, a compilation for each shape on the other. Each rung has one batch size.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

__all__ = ["Batch", "ladder", "pad", "padding", "plan"]


def _shape_cost(tokens: int) -> int:
    """What one more shape is taken to cost, in padded tokens, in a run of so many tokens.

    Compiling takes as long as some thousand tokens of a small model on a CPU. A short run would
    end before that is paid back; in a long one shapes are few beside batches, and what counts is
    padding.
    """
    return max(128, 2048 - tokens // 24)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are scored together; padded to `size` rows of `length` tokens."""

    rows: tuple[int, ...]
    size: int
    length: int


def ladder(longest: int) -> list[int]:
    """Padded lengths up to the first that holds `longest` tokens: 8, 16, ... 256, 272, ..."""
    rungs = [8]
    while rungs[-1] < longest:
        step = 8
        while step * 32 <= rungs[-1]:
            step *= 2
        rungs.append(rungs[-1] + step)
    return rungs


def _batches(rows: int, length: int, token_budget: int, multiple: int) -> tuple[int, int]:
    """Number and size B of the batches for `rows` rows, split evenly.

    B is a multiple of `multiple` (devices along the batch) and B x length within the budget where
    one row a device is.
    """
    most = max(1, token_budget // (length * multiple)) * multiple
    count = -(-rows // most)
    return count, -(-rows // (count * multiple)) * multiple


def plan(lengths: Sequence[int], token_budget: int, multiple: int = 1) -> list[Batch]:
    """Batches for prompts of these lengths, the longest first (what does not fit fails at once).

    One shape (B, T) for each T in use; rows of a batch are of about one length, and within it in
    order of appearance. Seats that are left over in a shape's last batch go to the longest of the
    shorter rows.
    """
    rungs = ladder(max(lengths))
    place = np.searchsorted(rungs, np.asarray(lengths))
    shape_cost = _shape_cost(sum(lengths))
    below = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(rungs)))])

    # cost[j]: the cheapest way to hold every prompt on the first j rungs, all seats taken;
    # came[j]: where the last batch shape of that way begins.
    cost, came = [0], [0]
    for j, length in enumerate(rungs, start=1):
        ways = []
        for i in range(j):
            rows = int(below[j] - below[i])
            ways.append(cost[i] + rows * length + (shape_cost if rows else 0))
        came.append(int(np.argmin(ways)))
        cost.append(ways[came[j]])

    cuts = [len(rungs)]
    while cuts[-1]:
        cuts.append(came[cuts[-1]])
    batches = []
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]
    seated = 0
    for top, bottom in itertools.pairwise(cuts):
        length = rungs[top - 1]
        rows = len(lengths) - int(below[bottom]) - seated
        if rows <= 0:
            continue
        count, size = _batches(rows, length, token_budget, multiple)
        for _ in range(count):
            taken = order[seated : seated + size]
            batches.append(Batch(tuple(sorted(map(int, taken))), size, length))
            seated += len(taken)
    return batches


def padding(batches: Sequence[Batch], lengths: Sequence[int]) -> float:
    """Share of the computed tokens that is padding, in [0, 1)."""
    computed = sum(b.size * b.length for b in batches)
    return 1 - sum(lengths[r] for b in batches for r in b.rows) / computed


def pad(
    tokens: Sequence[np.ndarray],
    batch: Batch,
    side: Literal["left", "right"] = "right",
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] int32 and mask [B, T] bool of one batch.

    tokens: those of every prompt, of which the batch takes its rows. A short batch repeats its
    first row; callers leave those results out.
    """
    ids = np.zeros((batch.size, batch.length), np.int32)
    mask = np.zeros((batch.size, batch.length), bool)
    for i in range(batch.size):
        row = tokens[batch.rows[i if i < len(batch.rows) else 0]]
        columns = slice(row.size) if side == "right" else slice(batch.length - row.size, None)
        ids[i, columns] = row
        mask[i, columns] = True
    return ids, mask
