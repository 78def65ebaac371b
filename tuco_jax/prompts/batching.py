"""Batches of one prompt a row; how many tokens a batch holds, `core/budget.py` says.

Scores that are read at every token, or at last tokens, pack several prompts into a row instead
(`packing.py`). One prompt a row is for what needs a row of its own: gradients by prompt, and
generation. There packing could save no more than 12%: of 160 prompts of 4 to 252 tokens 20% of the
prefill is padding at 32 rows a batch (13% at 8), and prefill is 62% of the time where 64 tokens
are generated; each packing would be one more program for each shape of a cache.

Legend: B rows of a batch, T its length, n a prompt's length, all in tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

__all__ = ["Batch", "bucket_length", "by_length", "pad"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are computed together; padded to `size` rows of `length` tokens."""

    rows: tuple[int, ...]
    size: int
    length: int


def bucket_length(tokens: int) -> int:
    """`tokens` rounded up to one of few lengths (each is compiled); a third at most is padding."""
    step = 16 if tokens <= 32 else max(32, 1 << (tokens.bit_length() - 3))
    return -(-tokens // step) * step


def by_length(lengths: Sequence[int], token_budget: int, multiple: int = 1) -> list[Batch]:
    """Batches of prompts of similar lengths, the longest first (what does not fit fails at once).

    T is a multiple of 8, beyond 32 the `bucket_length` of the longest row. B is a multiple of
    `multiple` (devices along the batch), and B T stays within `token_budget` unless one row for
    each device is more. All batches of one T have one B.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: dict[int, list[int]] = {}
    for i in order:
        short = -(-lengths[i] // 8) * 8
        groups.setdefault(short if short <= 32 else bucket_length(short), []).append(i)
    batches = []
    for length, rows in groups.items():
        most = max(1, token_budget // (length * multiple)) * multiple
        count = -(-len(rows) // most)
        size = -(-len(rows) // (count * multiple)) * multiple
        for first in range(0, len(rows), size):
            batches.append(Batch(tuple(sorted(rows[first : first + size])), size, length))
    return batches


def pad(
    tokens: Sequence[Int[np.ndarray, " n"]],
    batch: Batch,
    side: Literal["left", "right"] = "right",
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Tokens, int32, and mask of one batch.

    tokens: those of all prompts, not of this batch alone. A short batch repeats its
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
