"""Plans cover every prompt once, waste little and compile few shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuco_jax.prompts.batching import Batch, ladder, pad, padding, plan

BUDGET = 4096


def test_ladder():
    rungs = np.array(ladder(100_000))
    assert rungs[0] == 8 and rungs[-2] < 100_000 <= rungs[-1]
    assert (rungs % 8 == 0).all()
    steps = np.diff(rungs)
    assert (steps / rungs[:-1])[rungs[:-1] >= 64].max() <= 0.125
    assert len(rungs) < 200


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=120),
    budget=st.sampled_from([1, 64, 1000, 4096]),
    multiple=st.sampled_from([1, 3, 8]),
)
def test_every_prompt_once_in_a_batch_that_fits(lengths, budget, multiple):
    batches = plan(lengths, budget, multiple)
    assert sorted(r for b in batches for r in b.rows) == list(range(len(lengths)))
    sizes: dict[int, set[int]] = {}
    for b in batches:
        assert 0 < len(b.rows) <= b.size and b.size % multiple == 0
        assert b.length >= max(lengths[r] for r in b.rows)
        assert b.size * b.length <= budget or b.size == multiple
        sizes.setdefault(b.length, set()).add(b.size)
    assert all(len(s) == 1 for s in sizes.values()), "one batch size a length"
    assert [b.length for b in batches] == sorted((b.length for b in batches), reverse=True)


@pytest.mark.parametrize(("count", "most_waste"), [(400, 0.06), (4000, 0.055), (50_000, 0.05)])
def test_uniform_lengths_waste_little(count, most_waste):
    waste, shapes = [], []
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(4, 257, count).tolist()
        batches = plan(lengths, BUDGET)
        waste.append(padding(batches, lengths))
        shapes.append(len({(b.size, b.length) for b in batches}))
    assert np.mean(waste) < most_waste
    assert np.mean(shapes) <= (21 if count == 400 else 32)  # 32 rungs reach 256


def test_few_prompts_make_small_batches():
    assert plan([5], BUDGET) == [Batch((0,), 1, 8)]
    one_long = plan([5] * 60 + [900], BUDGET)
    assert [(b.size, b.length) for b in one_long] == [(1, 928), (60, 8)]


@pytest.mark.parametrize(("count", "most_shapes"), [(20, 2), (100, 5), (200, 9)])
def test_short_runs_compile_few_shapes(count, most_shapes):
    lengths = np.random.default_rng(0).integers(4, 257, count).tolist()
    batches = plan(lengths, BUDGET)
    assert len({(b.size, b.length) for b in batches}) <= most_shapes
    assert padding(batches, lengths) < 0.5


def test_plan_depends_on_lengths_alone():
    lengths = np.random.default_rng(0).integers(1, 300, 200).tolist()
    assert plan(lengths, BUDGET) == plan(list(lengths), BUDGET)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad(side):
    tokens = [np.array([1, 2, 3], np.int32), np.array([9], np.int32), np.array([5, 6], np.int32)]
    ids, mask = pad(tokens, Batch((2, 0), 3, 4), side)
    assert ids.dtype == np.int32 and mask.dtype == bool
    for row, want in enumerate((tokens[2], tokens[0], tokens[2])):  # the first row fills the batch
        assert ids[row][mask[row]].tolist() == want.tolist()
        assert mask[row].sum() == want.size
        assert mask[row][0 if side == "right" else -1]
