"""Groups save as many tokens as one level of sharing, or more; batches hold every prompt once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuco_jax.prompts.packing import pack, padding
from tuco_jax.prompts.prefixes import Behind, Group, groups_of, pack_shared


def row(*ids):
    return np.asarray(ids, np.int32)


def headed(rng, head, tail):
    return np.concatenate([head, rng.integers(0, 99, tail)]).astype(np.int32)


def many(seed=0, prompts=60, heads=(90, 60, 33), longest=30):
    """Prompts behind one of several beginnings, shuffled."""
    rng = np.random.default_rng(seed)
    made = [rng.integers(0, 99, n) for n in heads]
    rows = [headed(rng, made[i % len(made)], rng.integers(1, longest)) for i in range(prompts)]
    rng.shuffle(rows)
    return rows


def saving(groups):
    return sum(group.saved for group in groups)


def grown(requests=40, shots=(0, 1, 2, 4, 8, 16), head=12, each=40):
    """Prompts of each request behind one template's head: 0, 1, 2 ... examples, the question."""
    rng = np.random.default_rng(2)
    template = rng.integers(0, 99, head)
    rows = []
    for _ in range(requests):
        examples = [rng.integers(0, 99, each + rng.integers(-9, 10)) for _ in range(max(shots))]
        question = rng.integers(0, 99, rng.integers(10, 30))
        rows += [np.concatenate([template, *examples[:n], question]) for n in shots]
    return [r.astype(np.int32) for r in rows]


def test_a_tree_of_beginnings():
    """Two headers within one template: each header is a group, longer than what both share."""
    template, left, right = range(20), range(100, 140), range(200, 240)
    rows = [row(*template, *part, i) for i in range(4) for part in (left, right)]
    assert groups_of(rows) == [
        Group(60, 0, (0, 2, 4, 6), (60,) * 4),
        Group(60, 1, (1, 3, 5, 7), (60,) * 4),
    ]


def test_prompts_leave_a_prefix_anywhere():
    """What a few share beyond the others is theirs, and what all share everyone's."""
    rows = [row(*range(60), i) for i in range(6)] + [row(*range(60), 70, 71, i) for i in range(2)]
    assert groups_of(rows) == [Group(62, 6, tuple(range(8)), (60,) * 6 + (62,) * 2)]


def test_prompts_that_grow_are_one_group():
    rows = [row(*range(100, 100 + 20 * n), *range(9)) for n in (0, 1, 2, 4)]
    assert groups_of(rows) == [Group(40, 2, (1, 2, 3), (20, 40, 40))]


def test_a_chain_of_many():
    """As deep a tree as there are prompts: no recursion, nothing quadratic."""
    rows = [row(*range(n)) for n in range(1, 3000)]
    (group,) = groups_of(rows)
    assert group.length == 2997 and group.starts[:3] == (1, 2, 3)


def test_equal_prompts_and_those_within_others_leave_a_token_each():
    rows = [row(*range(40)), row(*range(40)), row(*range(50))]
    assert groups_of(rows) == [Group(39, 0, (0, 1, 2), (39, 39, 39))]


def test_kinds_stay_apart():
    rows = [row(*range(40), i) for i in range(4)]
    assert groups_of(rows, ["a", "b", "a", "b"]) == [
        Group(40, 0, (0, 2), (40, 40)),
        Group(40, 1, (1, 3), (40, 40)),
    ]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=12)
)
def test_groups_share_what_they_say_and_no_other_prefix_saves_more(rows):
    rows = [row(*([7] * 20), *r) for r in rows]
    groups = groups_of(rows)
    inside = [i for g in groups for i in g.prompts]
    assert len(set(inside)) == len(inside)
    for g in groups:
        assert len(g.prompts) > 1 and rows[g.trunk].size > g.length
        for i, start in zip(g.prompts, g.starts, strict=True):
            assert rows[i].size > start <= g.length
            np.testing.assert_array_equal(rows[i][:start], rows[g.trunk][:start])
    # One group for any prefix of any prompt that is not too short: never better.
    for r in rows:
        for n in range(16, r.size):
            count = sum(o.size > n and (o[:n] == r[:n]).all() for o in rows)
            assert (count - 1) * n <= saving(groups) + 16


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    heads=st.lists(st.integers(1, 200), min_size=1, max_size=5),
    budget=st.sampled_from([1, 200, 1024]),
    multiple=st.sampled_from([1, 4]),
)
def test_every_prompt_once_behind_its_own_prefix(seed, heads, budget, multiple):
    rows = many(seed, heads=heads) + grown(seed % 5, (0, 1, 2, 4))
    batches = pack_shared(rows, budget, multiple)
    assert sorted(i for b in batches for i in b.prompts) == list(range(len(rows)))
    for b in batches:
        arrays = b.arrays(rows)
        if not isinstance(b, Behind):
            continue
        assert b.size % (multiple * b.chunks) == 0 and len(b.ahead) <= b.count
        flat = {k: arrays[k].reshape(b.size, -1) for k in ("tokens", "segments", "starts")}
        follows = arrays["follows"].reshape(-1)
        for r, prompts in enumerate(b.rows):
            prefix = arrays["prefixes"][follows[r]][arrays["real"][follows[r]]]
            for segment, i in enumerate(prompts, start=1):
                here = flat["segments"][r] == segment
                (start,) = set(flat["starts"][r][here])
                whole = np.concatenate([prefix[:start], flat["tokens"][r][here]])
                np.testing.assert_array_equal(whole, rows[i])


@pytest.mark.parametrize("count", [200, 2000])
def test_nine_tenths_in_common_are_computed_about_once(count):
    rng = np.random.default_rng(0)
    head = rng.integers(0, 99, 900)
    rows = [headed(rng, head, 100) for _ in range(count)]
    batches = pack_shared(rows, 1024)
    lengths = [1000] * count
    computed = sum(b.computed for b in batches)
    assert computed < 1.3 * (900 + 100 * count) and padding(batches, lengths) < 0.2
    assert len({b.shape for b in batches}) == 1


@pytest.mark.parametrize("multiple", [1, 4])
def test_what_rows_see_is_bounded_behind_a_long_prefix(multiple):
    """Each row of a chunk has the prefix's keys and values of its own."""
    rng, budget = np.random.default_rng(1), 1024
    head = rng.integers(0, 99, 4000)
    rows = [headed(rng, head, rng.integers(8, 24)) for _ in range(100)]
    (batch,) = [b for b in pack_shared(rows, budget, multiple) if isinstance(b, Behind)]
    side = batch.size // batch.chunks
    assert side % multiple == 0 and 4000 <= batch.width < 4024
    assert side == multiple or side * (batch.width + batch.length) <= 8 * budget


def test_many_headers_of_few_prompts_share_batches():
    rows = many(heads=[300] * 20, prompts=200)
    batches = pack_shared(rows, 4096)
    assert sum(b.computed for b in batches) < 0.4 * sum(r.size for r in rows)
    assert max(len(b.ahead) for b in batches if isinstance(b, Behind)) > 1


@pytest.mark.parametrize("head", [0, 3])
def test_prompts_that_share_little_are_packed_as_before(head):
    rows = many(heads=(head,), longest=200)
    assert pack_shared(rows, 1024) == pack([r.size for r in rows], 1024)


def test_prompts_of_their_own_stand_beside_groups():
    rows = many(prompts=100) + [row(*range(50, 50 + n)) for n in (3, 9, 31)]
    batches = pack_shared(rows, 1024)
    assert {isinstance(b, Behind) for b in batches} == {True, False}
    alone = [i for b in batches if not isinstance(b, Behind) for i in b.prompts]
    assert {100, 101, 102} <= set(alone)


def test_prompts_that_grow_are_computed_about_once():
    """Each request's examples once, and its question behind each number of them."""
    rows = grown()
    batches = pack_shared(rows, 1024)
    least = sum(g.length + sum(g.behind([r.size for r in rows])) for g in groups_of(rows))
    computed = sum(b.computed for b in batches)
    assert least < 0.55 * sum(r.size for r in rows) and computed < 1.12 * least
    assert len({b.shape for b in batches}) <= 4


def test_heads_within_heads():
    """Two system prompts, each before three sets of examples, and prompts behind either alone."""
    rng = np.random.default_rng(5)
    rows = []
    for system in (rng.integers(0, 99, 80) for _ in range(2)):
        rows += [headed(rng, system, rng.integers(8, 24)) for _ in range(10)]
        for examples in (rng.integers(0, 99, n) for n in (150, 200, 300)):
            head = np.concatenate([system, examples])
            rows += [headed(rng, head, rng.integers(8, 24)) for _ in range(20)]
    batches = pack_shared(rows, 1024)
    assert sum(b.computed for b in batches) < 0.15 * sum(r.size for r in rows)
    assert all(isinstance(b, Behind) for b in batches)
    assert len({b.shape for b in batches}) <= 3
