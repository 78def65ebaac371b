"""Batches of prompts, a row each; how many tokens a batch holds is `core/budget.py`'s to say.

What computes something at every token or at last tokens packs prompts side by side instead
(`packing.py`). A row a prompt is for what treats a row as one: gradients by the prompt, a shared
prefix with its suffixes, rows that grow.

Legend: B rows of a batch, T its length, n a prompt's length, all in tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

__all__ = ["Batch", "by_length", "pad", "roomy"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are computed together; padded to `size` rows of `length` tokens."""

    rows: tuple[int, ...]
    size: int
    length: int


def roomy(tokens: int) -> int:
    """Room for `tokens`: few sizes, since each is compiled; a third or less is padding."""
    step = 16 if tokens <= 32 else max(32, 1 << (tokens.bit_length() - 3))
    return -(-tokens // step) * step


def by_length(lengths: Sequence[int], token_budget: int, multiple: int = 1) -> list[Batch]:
    """Batches of about one length each, the longest first (what does not fit fails at once).

    T is a multiple of 8, beyond 32 `roomy` for the longest row; B a multiple of `multiple`
    (devices along the batch), B T within the budget where one row a device is; one B for each T.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: dict[int, list[int]] = {}
    for i in order:
        short = -(-lengths[i] // 8) * 8
        groups.setdefault(short if short <= 32 else roomy(short), []).append(i)
    batches = []
    for length, rows in groups.items():
        most = max(1, token_budget // (length * multiple)) * multiple
        count = -(-len(rows) // most)
        size = -(-len(rows) // (count * multiple)) * multiple
        for first in range(0, len(rows), size):
            batches.append(Batch(tuple(sorted(rows[first : first + size])), size, length))
    return batches


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
