"""Prompts that begin alike, found from their tokens, in batches that compute the beginning once.

Sorted, prompts that share a prefix stand side by side; the lengths of what neighbours share make a
tree, of which every node is a group that could share its prefix. The groups that save most tokens
are taken, each prompt in one at most, and their batches where these cost less than packing alone.

Legend: N prompts, n tokens of one, G prefixes of a batch, P tokens of a prefix, B rows, T tokens
of a row, C prompts of a row at most; a batch has `chunks` times B rows.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from tuco_jax.prompts.packing import LONG, SHAPE, Packed, best_fit, pack

__all__ = ["SEEN", "Behind", "Group", "groups_of", "pack_shared"]

_SHORT = 16  # tokens of a prefix that is worth the attention to it
_LEAST = 16  # tokens that a group must save: rows of different prefixes are never filled together
_GAIN = 0.9  # of packing alone, what sharing may cost at most: it compiles more
SEEN = 8  # tokens that rows see, for each of the budget: keys and values of both models alone
_AHEAD = 8  # tokens of rows for each of a prefix's, where there are as many: 1/8 on top of a batch


class Group(NamedTuple):
    """Prompts that begin with the same `length` tokens, and each have one more at least."""

    length: int
    prompts: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Behind(Packed):
    """Rows of what follows prefixes; `size` is B times `chunks`.

    ahead: length and first prompt of each prefix. width: P. follows: each row's prefix, by number.
    """

    ahead: tuple[tuple[int, int], ...]
    count: int
    width: int
    follows: tuple[int, ...]
    chunks: int

    @property
    def shape(self) -> tuple[int, ...]:
        """All that a program is compiled for."""
        return *super().shape, self.count, self.width, self.chunks

    @property
    def computed(self) -> int:
        """Tokens that are computed, padding and prefixes included."""
        return super().computed + self.count * self.width

    def real(self, lengths: Sequence[int]) -> int:
        """Tokens of its prefixes, and of its prompts without them."""
        behind = sum(lengths[i] - self.ahead[g][0] for i, g in self._prefix_of().items())
        return behind + sum(length for length, _ in self.ahead)

    def arrays(
        self, tokens: Sequence[Int[np.ndarray, " n"]]
    ) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Arrays of the batch, as `SharedPrefixes` (core/shared_prefix.py) takes them.

        Those of `Packed`, [B, chunks, ...], and follows [B, chunks]; prefixes, real [G, P], and
        totals [G]. A batch of fewer prefixes repeats its first.
        """
        own = {i: tokens[i][self.ahead[g][0] :] for i, g in self._prefix_of().items()}
        found = super().arrays(own)  # pyright: ignore[reportArgumentType]
        follows = np.full(self.size, self.follows[0], np.int32)
        follows[: len(self.rows)] = self.follows
        rows = {
            name: array.reshape(-1, self.chunks, *array.shape[1:])
            for name, array in (found | {"follows": follows}).items()
        }
        prefixes = np.zeros((self.count, self.width), np.int32)
        real = np.zeros(prefixes.shape, bool)
        totals = np.zeros(self.count, np.int32)
        for g in range(self.count):
            length, first = self.ahead[g if g < len(self.ahead) else 0]
            prefixes[g, :length], real[g, :length] = tokens[first][:length], True
            totals[g] = tokens[first].size
        return rows | {"prefixes": prefixes, "real": real, "totals": totals}

    def _prefix_of(self) -> dict[int, int]:
        return {i: g for row, g in zip(self.rows, self.follows, strict=True) for i in row}


def groups_of(
    tokens: Sequence[Int[np.ndarray, " n"]], kinds: Sequence[Hashable] | None = None
) -> list[Group]:
    """Groups that together save the most tokens; no prompt is in two, many may be in none.

    kinds: prompts of different kinds are never in one group. In order of falling length.
    """
    rows = [np.ascontiguousarray(row, np.int32) for row in tokens]
    number = {kind: i for i, kind in enumerate(dict.fromkeys(kinds or ()))}
    of = [number[kind] for kind in kinds] if kinds else [0] * len(rows)
    keys = [row.astype(">i4").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (of[i], keys[i]))
    shared = [
        _common(rows[i], rows[j]) if of[i] == of[j] else 0 for i, j in itertools.pairwise(order)
    ]
    if sum(shared) < _LEAST:
        return []
    found = [
        Group(node.depth, tuple(sorted(order[node.first : node.stop]))) for node in _best(shared)
    ]
    return sorted(found, key=lambda group: (-group.length, group.prompts))


def _common(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " m"]) -> int:
    """Tokens that both begin with, of which neither consists wholly."""
    most = min(a.size, b.size) - 1
    if most < 1 or a[0] != b[0]:
        return 0
    differ = np.flatnonzero(a[:most] != b[:most])
    return int(differ[0]) if differ.size else most


@dataclasses.dataclass
class _Node:
    """The prompts first .. stop - 1 in sorted order, which share `depth` tokens.

    gain, parts: the most that groups within it save, and which do.
    """

    depth: int
    first: int
    gain: int = 0
    parts: list["_Node"] = dataclasses.field(default_factory=list)
    stop: int = 0


def _best(shared: list[int]) -> list[_Node]:
    """The nodes that save most, of the tree of `shared`, what each of N - 1 neighbours share."""
    stack = [_Node(0, 0)]
    for i, depth in enumerate([*shared, 0], start=1):
        first, gain, parts = i - 1, 0, []
        while stack[-1].depth > depth:
            node = stack.pop()
            node.gain, node.stop = node.gain + gain, i
            node.parts += parts
            own = (i - node.first - 1) * node.depth - _LEAST
            first, gain, parts = node.first, node.gain, node.parts
            if own > gain and node.depth >= _SHORT:
                gain, parts = own, [node]
        if stack[-1].depth < depth:
            stack.append(_Node(depth, first, gain, parts))
        else:
            stack[-1].gain += gain
            stack[-1].parts += parts
    return stack[0].parts


def pack_shared(
    tokens: Sequence[Int[np.ndarray, " n"]],
    token_budget: int,
    multiple: int = 1,
    *,
    kinds: Sequence[Hashable] | None = None,
) -> list[Packed]:
    """`pack`, and, where it costs less, batches of prompts that begin alike.

    kinds: as of `groups_of`. The result depends on tokens and kinds alone.
    """
    lengths = [row.size for row in tokens]
    alone = pack(lengths, token_budget, multiple)
    groups = groups_of(tokens, kinds)
    if sum((len(g.prompts) - 1) * g.length for g in groups) < (1 - _GAIN) * sum(lengths):
        return alone
    batches: list[Packed] = []
    for some in _alike(groups):
        batches += _batches(lengths, some, token_budget, multiple)
    taken = {i for group in groups for i in group.prompts}
    left = [i for i in range(len(lengths)) if i not in taken]
    if left:
        for batch in pack([lengths[i] for i in left], token_budget, multiple):
            rows = tuple(tuple(left[i] for i in row) for row in batch.rows)
            batches.append(dataclasses.replace(batch, rows=rows))
    return batches if _cost(batches) < _GAIN * _cost(alone) else alone


def _cost(batches: Sequence[Packed]) -> float:
    """In tokens, as `pack` counts: attention grows with what is seen, each shape is compiled."""
    total = 0.0
    for batch in batches:
        ahead = batch.width if isinstance(batch, Behind) else 0
        total += ahead and batch.count * ahead * (1 + ahead / LONG)  # pyright: ignore
        total += batch.size * (batch.length * (1 + (ahead + batch.length) / LONG) + batch.most)
    return total + SHAPE * len({batch.shape for batch in batches})


def _alike(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups whose prefixes are padded to one length: at most to twice, unless they are few."""
    some: list[Group] = []
    for group in groups:
        if some and 2 * group.length < some[0].length and sum(len(g.prompts) for g in some) >= 32:
            yield some
            some = []
        some.append(group)
    yield some


def _batches(
    lengths: Sequence[int], groups: Sequence[Group], budget: int, multiple: int
) -> list[Behind]:
    """Batches of some groups, all of one shape: the cheapest of a few."""
    width = -(-groups[0].length // 8) * 8
    sizes = [sorted((lengths[i] - g.length for i in g.prompts), reverse=True) for g in groups]
    longest = max(own[0] for own in sizes)
    mean = sum(map(sum, sizes)) / sum(map(len, sizes))
    plans: list[Any] = []
    for length in sorted({-(-n // 8) * 8 for n in (longest, 2 * longest, max(256, longest))}):
        most = max(1, round(1.25 * length / mean))
        filled = [best_fit(own, length, most) for own in sizes]
        rows = [len(own) for own in filled]
        most = max(len(row) for own in filled for row in own)
        each = min(budget // length, SEEN * budget // (width + length))  # rows that memory holds
        side = min(max(1, each // multiple) * multiple, _up(sum(rows), multiple))
        own = length * (1 + (width + length) / LONG) + most
        for count, chunks in _sizes(len(groups), width, sum(rows), side, length, budget):
            calls = _calls(rows, count, chunks * side)
            cost = calls * (count * width * (1 + width / LONG) + chunks * side * own)
            plans.append((cost, length, most, count, chunks, side))
    _, length, most, count, chunks, side = min(plans)
    found: list[Behind] = []
    for part in _cut(lengths, groups, length, most, count, chunks * side):
        used = list(dict.fromkeys(group for group, _ in part))
        number = {group: i for i, group in enumerate(used)}
        found.append(
            Behind(
                tuple(row for _, row in part),
                chunks * side,
                length,
                most,
                tuple((group.length, group.prompts[0]) for group in used),
                count,
                width,
                tuple(number[group] for group, _ in part),
                chunks,
            )
        )
    return found


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _sizes(
    groups: int, width: int, rows: int, side: int, length: int, budget: int
) -> Iterator[tuple[int, int]]:
    """Candidates for G and for chunks; memory bounds both."""
    count = 1
    while True:
        room = max(budget, _AHEAD * count * width)
        chunks = -(-rows // side)
        most = min(chunks, max(1, room // (side * length)))
        even = (
            {-(-chunks // parts) for parts in range(1, 9)} | {1 << i for i in range(12)} | {most}
        )
        yield from ((count, n) for n in sorted(even) if n <= most)
        if count >= groups or 2 * count * width > budget:
            return
        count = min(2 * count, groups)


def _calls(rows: Sequence[int], count: int, room: int) -> int:
    """How many batches of `count` prefixes and `room` rows groups of so many rows take."""
    calls, used, left = 0, count, 0
    for own in rows:
        while own:
            if used == count or not left:
                calls, used, left = calls + 1, 0, room
            used += 1
            taken = min(own, left)
            own, left = own - taken, left - taken
    return calls


def _cut(
    lengths: Sequence[int], groups: Sequence[Group], length: int, most: int, count: int, room: int
) -> Iterator[list[tuple[Group, tuple[int, ...]]]]:
    """The rows of each batch with their groups, as `_calls` counts them."""
    part: list[tuple[Group, tuple[int, ...]]] = []
    used = count
    for group in groups:
        every = sorted(group.prompts, key=lambda i: -lengths[i])
        filled = best_fit([lengths[i] - group.length for i in every], length, most)
        fresh = True
        for row in filled:
            if part and (len(part) == room or (fresh and used == count)):
                yield part
                part, used, fresh = [], 0, True
            if not part:
                used = 0
            used += fresh
            fresh = False
            part.append((group, tuple(every[i] for i in row)))
    yield part
