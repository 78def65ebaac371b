"""Prompts that begin alike, found from their tokens, in batches that compute the beginning once.

Sorted, prompts that share a prefix stand side by side; the lengths of what neighbours share make a
tree. A group is a path into it from the root, its prefix, and prompts that leave the path
anywhere: those behind one header, or prompts that grow (0, 1, 2, 4 examples of one request). The
groups that save most tokens are taken, each prompt in one at most, and their batches where these
cost less than packing alone. What two prefixes have in common, such as a system prompt before two
sets of examples, is computed for each: there are few prefixes.

Legend: N prompts, n tokens of one, G prefixes of a batch, P tokens of a prefix, B rows, T tokens
of a row, C prompts of a row at most; a batch has `chunks` times B rows.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Int, Shaped

from tuco_jax.prompts.packing import LONG, SHAPE, Packed, best_fit, pack

__all__ = ["GAIN", "SEEN", "Behind", "Group", "groups_of", "pack_shared"]

_SHORT = 16  # tokens of a prefix that is worth the attention to it
_FEW = 8  # prompts that leave a prefix at one place before its end; more have one of their own
_LEAST = 16  # tokens that a group must save: rows of different prefixes are never filled together
GAIN = 0.9  # of computing all alone, what sharing may cost at most: it compiles more
_SHAPES = 3  # of batches behind prefixes, at most
SEEN = 8  # tokens that rows see, for each of the budget: keys and values of both models alone
_AHEAD = 8  # tokens of rows for each of a prefix's, where there are as many: 1/8 on top of a batch


class Group(NamedTuple):
    """Prompts that follow the first `length` tokens of the prompt `trunk`, or fewer of them.

    starts: how many each follows; it has one token more at least.
    """

    length: int
    trunk: int
    prompts: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens that need not be computed."""
        return sum(self.starts) - self.length

    def behind(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of each prompt that follow; lengths: of all prompts."""
        return [lengths[i] - start for i, start in zip(self.prompts, self.starts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Behind(Packed):
    """Rows of what follows prefixes; `size` is B times `chunks`.

    ahead: length of each prefix, and a prompt that begins with it. width: P. follows: each row's
    prefix, by number. starts: how many of its tokens each of the row's prompts follows.
    """

    ahead: tuple[tuple[int, int], ...]
    count: int
    width: int
    follows: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    chunks: int

    @property
    def shape(self) -> tuple[int, ...]:
        """All that a program is compiled for."""
        return *super().shape, self.count, self.width, self.chunks

    @property
    def computed(self) -> int:
        """Tokens that are computed, padding and prefixes included."""
        return super().computed + self.count * self.width

    def among(self, numbers: Sequence[int]) -> Self:
        """The same of a longer list, in which prompt i is `numbers[i]`."""
        ahead = tuple((length, numbers[prompt]) for length, prompt in self.ahead)
        return dataclasses.replace(super().among(numbers), ahead=ahead)

    def real(self, lengths: Sequence[int]) -> int:
        """Tokens of its prefixes, and of its prompts without them."""
        return super().real(lengths) - sum(map(sum, self.starts)) + sum(n for n, _ in self.ahead)

    def arrays(
        self, tokens: Sequence[Int[np.ndarray, " n"]]
    ) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Arrays of the batch, as `SharedPrefixes` (core/shared_prefix.py) takes them.

        Those of `Packed`, [B, chunks, ...], follows [B, chunks] and starts [B, chunks, T];
        prefixes, real [G, P], and totals [G]. A batch of fewer prefixes repeats its first.
        """
        after = dict(zip(self.prompts, itertools.chain(*self.starts), strict=True))
        own = {i: tokens[i][start:] for i, start in after.items()}
        found = super().arrays(own)  # pyright: ignore[reportArgumentType]
        follows = np.full(self.size, self.follows[0], np.int32)
        follows[: len(self.rows)] = self.follows
        starts = np.zeros((self.size, self.length), np.int32)
        for i, row, columns in self.spans(own):  # pyright: ignore[reportArgumentType]
            starts[row, columns] = after[i]
        starts[len(self.rows) :] = starts[0]
        rows = {
            name: array.reshape(-1, self.chunks, *array.shape[1:])
            for name, array in (found | {"follows": follows, "starts": starts}).items()
        }
        prefixes = np.zeros((self.count, self.width), np.int32)
        real = np.zeros(prefixes.shape, bool)
        totals = np.zeros(self.count, np.int32)
        for g in range(self.count):
            length, prompt = self.ahead[g if g < len(self.ahead) else 0]
            prefixes[g, :length], real[g, :length] = tokens[prompt][:length], True
            totals[g] = tokens[prompt].size
        return rows | {"prefixes": prefixes, "real": real, "totals": totals}


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
    groups = []
    for end, starts in _best(shared, [rows[i].size for i in order]):
        after = sorted((order[place], start) for place, start in starts.items())
        prompts, own = zip(*after, strict=True)
        groups.append(Group(end.depth, prompts[own.index(end.depth)], prompts, own))
    return sorted(groups, key=lambda group: (-group.length, group.prompts))


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

    below: the nodes within it. tokens: of all its prompts. through: the most that is saved by a
    group whose prefix runs through it, up to the node `end`, and by others beside; it goes on to
    `on`, one of `below`, or ends here. saved: the most that groups within it save. whole: by one
    through it.
    """

    depth: int
    first: int
    below: list["_Node"] = dataclasses.field(default_factory=list)
    stop: int = 0
    tokens: int = 0
    through: float = 0
    end: Any = None
    on: Any = None
    saved: float = 0
    whole: bool = False

    @property
    def count(self) -> int:
        return self.stop - self.first

    def leaves(self, part: "_Node") -> bool:
        """Whether a part's prompts all leave here a prefix that runs elsewhere."""
        return part.count * self.depth >= part.saved

    def close(self, stop: int, tokens: int) -> None:
        """With all that is below it closed."""
        self.stop, self.tokens = stop, tokens
        beside = [max(part.count * self.depth, part.saved) for part in self.below]
        behind = [
            self.leaves(part) * (part.tokens - part.count * self.depth) for part in self.below
        ]
        alone = self.count - sum(part.count for part in self.below)
        every = alone * self.depth + sum(beside)
        few = alone + sum(part.count * self.leaves(part) for part in self.below)
        leaving = tokens - sum(part.tokens for part in self.below) - alone * self.depth
        leaving += sum(behind)
        self.through, self.end = every - self.depth, self
        for part, own, after in zip(self.below, beside, behind, strict=True):
            # What leaves here has the rest of the prefix among its keys, too, and does not see it.
            hidden = (leaving - after) * (part.end.depth - self.depth) / LONG
            through = every - own + part.through - hidden
            if through > self.through and few - part.count * self.leaves(part) <= _FEW:
                self.through, self.end, self.on = through, part.end, part
        self.saved = sum(part.saved for part in self.below)
        if self.end.depth >= _SHORT and self.through - _LEAST > self.saved:
            self.saved, self.whole = self.through - _LEAST, True


def _best(shared: list[int], sizes: list[int]) -> Iterator[tuple[_Node, dict[int, int]]]:
    """The groups that save most: where the prefix ends, and what each prompt has of it.

    shared: what each of N - 1 neighbours share. sizes: of the N prompts, which go by their place.
    """
    before = [0, *itertools.accumulate(sizes)]
    stack = [_Node(0, 0)]
    for i, depth in enumerate([*shared, 0], start=1):
        first, below = i - 1, []
        while stack[-1].depth > depth:
            node = stack.pop()
            node.below += below
            node.close(i, before[i] - before[node.first])
            first, below = node.first, [node]
        if stack[-1].depth < depth:
            stack.append(_Node(depth, first, below))
        else:
            stack[-1].below += below
    parts = stack[0].below
    while parts:
        node = parts.pop()
        if not node.whole:
            parts += node.below
            continue
        end, starts = node.end, {}
        while node is not None:
            place = node.first
            for part in node.below:
                starts |= dict.fromkeys(range(place, part.first), node.depth)
                if part is not node.on and node.leaves(part):
                    starts |= dict.fromkeys(range(part.first, part.stop), node.depth)
                elif part is not node.on:
                    parts.append(part)
                place = part.stop
            starts |= dict.fromkeys(range(place, node.stop), node.depth)
            node = node.on
        yield end, starts


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
    if sum(group.saved for group in groups) < (1 - GAIN) * sum(lengths):
        return alone
    groups = [_lengthened(lengths, group) for group in groups]
    plans = (
        [batch for some in lists for batch in _batches(lengths, some, token_budget, multiple)]
        for lists in _lists(lengths, groups)
    )
    batches: list[Packed] = [*min(plans, key=_cost)]
    taken = {i for group in groups for i in group.prompts}
    left = [i for i in range(len(lengths)) if i not in taken]
    if left:
        rest = pack([lengths[i] for i in left], token_budget, multiple)
        batches += [batch.among(left) for batch in rest]
    return batches if _cost(batches) < GAIN * _cost(alone) else alone


def _cost(batches: Sequence[Packed]) -> float:
    """In tokens, as `pack` counts: attention grows with what is seen, each shape is compiled."""
    total = 0.0
    for batch in batches:
        ahead = batch.width if isinstance(batch, Behind) else 0
        total += ahead and batch.count * ahead * (1 + ahead / LONG)  # pyright: ignore
        total += batch.size * (batch.length * (1 + (ahead + batch.length) / LONG) + batch.most)
    return total + SHAPE * len({batch.shape for batch in batches})


def _lengthened(lengths: Sequence[int], group: Group) -> Group:
    """With what the longest prompt has beyond all others on the prefix, where rows are few.

    They would all be as long as that one, and mostly padding.
    """
    behind = group.behind(lengths)
    *_, second, longest = sorted(behind)
    at = behind.index(longest)
    if group.starts[at] != group.length or sum(behind) >= LONG:
        return group
    length = group.length + longest - second
    starts = *group.starts[:at], length, *group.starts[at + 1 :]
    return Group(length, group.prompts[at], group.prompts, starts)


def _lists(lengths: Sequence[int], groups: Sequence[Group]) -> Iterator[list[list[Group]]]:
    """Groups in one list, in two, in three, each padded to its longest prefix: cut well."""
    groups = sorted(groups, key=lambda group: (-group.length, group.prompts))
    widths = [-(-group.length // 8) * 8 for group in groups]
    behind = [0, *itertools.accumulate(sum(group.behind(lengths)) for group in groups)]
    cuts = [i for i in range(1, len(groups)) if widths[i] < widths[i - 1]]
    cuts = cuts[:: 1 + len(cuts) // 32]

    def bounds(plan: Sequence[int]) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *plan, len(groups)]))

    def cost(plan: Sequence[int]) -> float:
        total = 0.0
        for a, b in bounds(plan):
            seen = (b - a) * widths[a] + behind[b] - behind[a]
            total += widths[a] * (b - a + seen / LONG)
        return total

    for count in range(min(_SHAPES, 1 + len(cuts))):
        best = min(itertools.combinations(cuts, count), key=cost)
        yield [groups[a:b] for a, b in bounds(best)]


def _batches(
    lengths: Sequence[int], groups: Sequence[Group], budget: int, multiple: int
) -> list[Behind]:
    """Batches of some groups, all of one shape: the cheapest of a few."""
    width = -(-groups[0].length // 8) * 8
    sizes = [sorted(group.behind(lengths), reverse=True) for group in groups]
    longest = max(own[0] for own in sizes)
    mean = sum(map(sum, sizes)) / sum(map(len, sizes))
    plans: list[Any] = []
    wide = max(256, longest)
    for n in sorted({longest, 2 * longest, min(wide, max(map(sum, sizes))), wide}):
        length = -(-n // 8) * 8
        most = max(1, round(1.25 * length / mean))
        filled = [best_fit(own, length, most) for own in sizes]
        rows = [len(own) for own in filled]
        most = max(len(row) for own in filled for row in own)
        each = min(budget // length, SEEN * budget // (width + length))  # rows that memory holds
        most_rows = max(1, each // multiple) * multiple
        own = length * (1 + (width + length) / LONG) + most
        for count, chunks, side in _sizes(width, rows, most_rows, multiple, length, budget):
            calls = _calls(rows, count, chunks * side)
            cost = calls * (count * width * (1 + width / LONG) + chunks * side * own + budget / 16)
            plans.append((cost, length, most, count, chunks, side))
    _, length, most, count, chunks, side = min(plans)
    found: list[Behind] = []
    for part in _cut(lengths, groups, length, most, count, chunks * side):
        used = list({group.prompts[0]: group for group, _ in part}.values())
        number = {group.prompts[0]: i for i, group in enumerate(used)}
        found.append(
            Behind(
                tuple(tuple(i for i, _ in row) for _, row in part),
                chunks * side,
                length,
                most,
                tuple((group.length, group.trunk) for group in used),
                count,
                width,
                tuple(number[group.prompts[0]] for group, _ in part),
                tuple(tuple(start for _, start in row) for _, row in part),
                chunks,
            )
        )
    return found


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _sizes(
    width: int, rows: Sequence[int], most_rows: int, multiple: int, length: int, budget: int
) -> Iterator[tuple[int, int, int]]:
    """Candidates for G, chunks and B; memory bounds them. rows: of each group."""
    count = 1
    while True:
        room = max(budget, _AHEAD * count * width)
        for each in sorted({max(rows), -(-sum(rows) // len(rows))}) + [sum(rows)]:
            side = min(most_rows, _up(min(sum(rows), count * each), multiple))
            chunks = -(-sum(rows) // side)
            most = min(chunks, max(1, room // (side * length)))
            even = {-(-chunks // parts) for parts in range(1, 9)}
            even |= {1 << i for i in range(12)} | {most}
            yield from ((count, n, side) for n in sorted(even) if n <= most)
        if count >= len(rows) or 2 * count * width > budget:
            return
        count = min(2 * count, len(rows))


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
) -> Iterator[list[tuple[Group, list[tuple[int, int]]]]]:
    """The rows of each batch with their groups, as `_calls` counts them.

    A row: (prompt, how much of the prefix it follows).
    """
    part: list[tuple[Group, list[tuple[int, int]]]] = []
    used = count
    for group in groups:
        after = zip(group.prompts, group.starts, strict=True)
        every = sorted(after, key=lambda own: own[1] - lengths[own[0]])
        filled = best_fit([lengths[i] - start for i, start in every], length, most)
        fresh = True
        for row in filled:
            if part and (len(part) == room or (fresh and used == count)):
                yield part
                part, used, fresh = [], 0, True
            if not part:
                used = 0
            used += fresh
            fresh = False
            part.append((group, [every[i] for i in row]))
    yield part
