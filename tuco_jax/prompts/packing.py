"""Prompts side by side in rows of one length: little padding, one or two shapes to compile.

Each prompt is a segment of its row: positions restart, attention stays inside it. A row's length,
and how many prompts it may hold, are chosen so that a run computes the fewest tokens; a second
shape is added where one long prompt would make all rows long.

Legend: B rows of a batch, T tokens of a row, C prompts of a row at most, n tokens of a prompt, N
prompts of a batch.
"""

import bisect
import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Int, Shaped

__all__ = ["Packed", "best_fit", "pack", "padding", "segments_of"]

# Cost of one more shape, in tokens: on a CPU it compiles in the time of about a thousand tokens of
# a small model.
SHAPE = 1024
# Attention's cost grows with the row: at this length it equals that of the rest of a layer.
LONG = 8192
_SAMPLE = 1000  # prompts by which a shape is chosen


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows that are computed together, padded to `size` rows of `length` tokens.

    rows: prompts of each row, by number, in their order there. most: C.
    """

    rows: tuple[tuple[int, ...], ...]
    size: int
    length: int
    most: int

    @property
    def prompts(self) -> list[int]:
        """Numbers of all prompts, row by row."""
        return list(itertools.chain(*self.rows))

    @property
    def shape(self) -> tuple[int, ...]:
        """All that a program is compiled for: B, T and C first."""
        return self.size, self.length, self.most

    @property
    def computed(self) -> int:
        """Tokens that are computed, padding included."""
        return self.size * self.length

    def among(self, numbers: Sequence[int]) -> Self:
        """The same of a longer list, in which prompt i is `numbers[i]`."""
        rows = tuple(tuple(numbers[i] for i in row) for row in self.rows)
        return dataclasses.replace(self, rows=rows)

    def real(self, lengths: Sequence[int]) -> int:
        """Tokens that are computed and no padding; lengths: of all prompts."""
        return sum(lengths[i] for i in self.prompts)

    def arrays(
        self, tokens: Sequence[Int[np.ndarray, " n"]]
    ) -> dict[str, Shaped[np.ndarray, "B _"]]:
        """Arrays of this batch: tokens, segments [B, T] int32, mask [B, T] bool, columns [B, C].

        tokens: of all prompts, not of this batch alone. segments: 1 for a row's first prompt, 2
        for the second, ...; 0 at padding. columns: of each prompt's last token; where a row has
        fewer than C prompts, its first is repeated, and in a short batch the first row.
        """
        ids, segments = (np.zeros((self.size, self.length), np.int32) for _ in range(2))
        columns = np.zeros((self.size, self.most), np.int32)
        for row, prompts in enumerate(self.rows):
            sizes = [tokens[i].size for i in prompts]
            ends = np.cumsum(sizes)
            ids[row, : ends[-1]] = np.concatenate([tokens[i] for i in prompts])
            segments[row, : ends[-1]] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
            columns[row] = ends[0] - 1
            columns[row, : len(sizes)] = ends - 1
        left = len(self.rows)
        for array in (ids, segments, columns):
            array[left:] = array[0]
        return {"tokens": ids, "segments": segments, "mask": segments > 0, "columns": columns}

    def unpack(self, values: Shaped[np.ndarray, "B C ..."]) -> Shaped[np.ndarray, "N ..."]:
        """The value of each prompt, in the order of `prompts`."""
        rows = (values[row, : len(prompts)] for row, prompts in enumerate(self.rows))
        return np.concatenate(list(rows))

    def spans(self, tokens: Sequence[Int[np.ndarray, " n"]]) -> Iterator[tuple[int, int, slice]]:
        """(prompt, row, columns) of every prompt; tokens: as of `arrays`."""
        for row, prompts in enumerate(self.rows):
            start = 0
            for i in prompts:
                yield i, row, slice(start, start + tokens[i].size)
                start += tokens[i].size


def pack(
    lengths: Sequence[int], token_budget: int, multiple: int = 1, *, last_tokens: bool = True
) -> list[Packed]:
    """Batches for prompts of these lengths, the longest first (what does not fit fails early).

    token_budget: B T stays within it, unless `multiple` rows (devices along the batch) do not.
    last_tokens: whether each row's C last tokens cost as much again. The result depends on lengths
    alone.
    """
    every = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes = [lengths[i] for i in every]
    whole = _Shape.of(sizes, token_budget, multiple, last_tokens)
    plans = [[(whole, every)]]
    for cut in _cuts(sizes):
        parts = every[:cut], every[cut:]
        shapes = [
            _Shape.of([lengths[i] for i in part], token_budget, multiple, last_tokens)
            for part in parts
        ]
        plans.append(list(zip(shapes, parts, strict=True)))
    best = min(plans, key=lambda plan: sum(shape.cost + SHAPE for shape, _ in plan))
    return [
        batch
        for shape, part in best
        for batch in shape.batches(part, [lengths[i] for i in part], token_budget, multiple)
    ]


def _cuts(sizes: list[int]) -> list[int]:
    """Numbers of longest prompts that may get a shape of their own: twice as long as the rest."""
    found, bound = [], sizes[0]
    while bound > 16:
        bound //= 2
        cut = bisect.bisect_left(sizes, -bound, key=lambda n: -n)
        if 0 < cut < len(sizes) and cut not in found:
            found.append(cut)
    return found


@dataclasses.dataclass(frozen=True)
class _Shape:
    """T and C of rows, and the cost of all prompts in such rows, in tokens."""

    length: int
    most: int
    cost: float

    @classmethod
    def of(cls, sizes: list[int], budget: int, multiple: int, last_tokens: bool) -> "_Shape":
        """The cheapest of some row lengths and numbers of prompts a row, by a sample of sizes."""
        some = sizes[:: -(-len(sizes) // _SAMPLE)]
        shapes = []
        for length in _row_lengths(some, budget // multiple):
            most = 1
            while True:
                rows = best_fit(some, length, most)
                count = len(rows) * len(sizes) / len(some)
                if len(some) == len(sizes):
                    count = _row_count(len(rows), length, budget, multiple)
                own = length * (1 + length / LONG) + (most if last_tokens else 0)
                shapes.append(cls(length, most, count * own))
                if most >= max(map(len, rows)) * 2 or most >= len(some):
                    break
                most *= 2
        return min(shapes, key=lambda s: s.cost)

    def batches(
        self, numbers: Sequence[int], sizes: list[int], budget: int, multiple: int
    ) -> Iterator[Packed]:
        """All rows in batches of one size; numbers: of the prompts of falling sizes."""
        filled = best_fit(sizes, self.length, self.most)
        most = max(map(len, filled))
        size = _batch_rows(len(filled), self.length, budget, multiple)
        for first in range(0, len(filled), size):
            rows = filled[first : first + size]
            yield Packed(
                tuple(tuple(numbers[i] for i in row) for row in rows), size, self.length, most
            )


def _row_lengths(sizes: list[int], budget: int) -> list[int]:
    """Candidates for T: from the longest prompt's length up, as far as rows can be filled."""
    shortest = -(-sizes[0] // 8) * 8
    longest = max(shortest, min(budget, max(2 * shortest, 256), -(-sum(sizes) // 8) * 8))
    found = {shortest, longest} if longest <= 4096 else {shortest}
    step = max(8, (longest - shortest) // 8 // 8 * 8)
    found.update(range(shortest, min(longest, 4096), step))
    return sorted(found)


def best_fit(sizes: Sequence[int], length: int, most: int | None = None) -> list[list[int]]:
    """Rows that hold items of these falling sizes, by number: each in the fullest row with room.

    length: of a row. most: items in a row, at most; None for any number. Of equally full rows the
    first is taken.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows of each room left, a heap
    rooms: list[int] = []  # of rows that may take another, sorted, each once
    for number, size in enumerate(sizes):
        at = bisect.bisect_left(rooms, size)
        if at < len(rooms):
            room = rooms[at]
            row = heapq.heappop(by_room[room])
            if not by_room[room]:
                rooms.pop(at)
            rows[row].append(number)
            room -= size
        else:
            row, room = len(rows), length - size
            rows.append([number])
        if room and (most is None or len(rows[row]) < most):
            if not by_room.setdefault(room, []):
                bisect.insort(rooms, room)
            heapq.heappush(by_room[room], row)
    return rows


def _batch_rows(rows: int, length: int, budget: int, multiple: int) -> int:
    """B: rows are split evenly over the batches; a multiple of `multiple` within the budget."""
    most = max(1, budget // (length * multiple)) * multiple
    count = -(-rows // most)
    return -(-rows // (count * multiple)) * multiple


def _row_count(rows: int, length: int, budget: int, multiple: int) -> int:
    """Rows that are computed, including those that fill the last batch."""
    size = _batch_rows(rows, length, budget, multiple)
    return -(-rows // size) * size


def padding(batches: Sequence[Packed], lengths: Sequence[int]) -> float:
    """Share of the computed tokens that is padding; lengths: of all prompts."""
    return 1 - sum(b.real(lengths) for b in batches) / sum(b.computed for b in batches)


def segments_of(rows: Mapping[str, Any]) -> Any:
    """The segments of a batch's arrays; None where each row holds one prompt."""
    return None if rows["columns"].shape[-1] == 1 else rows["segments"]
