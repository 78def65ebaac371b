"""Batches of a row a prompt cover every prompt once and compile few shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuco_jax.prompts.batching import Batch, bucket_length, by_length, pad

BUDGET = 4096


def test_room():
    sizes = [bucket_length(n) for n in range(1, 100_000)]
    assert all(n <= room for n, room in enumerate(sizes, start=1))
    assert max(room / n for n, room in enumerate(sizes, start=1) if n > 64) <= 1.5
    assert len(set(sizes)) < 60


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=120),
    budget=st.sampled_from([1, 64, 1000, 4096]),
    multiple=st.sampled_from([1, 3, 8]),
)
def test_every_prompt_once_in_a_batch_that_fits(lengths, budget, multiple):
    batches = by_length(lengths, budget, multiple)
    assert sorted(r for b in batches for r in b.rows) == list(range(len(lengths)))
    sizes: dict[int, set[int]] = {}
    for b in batches:
        assert 0 < len(b.rows) <= b.size and b.size % multiple == 0
        assert b.length >= max(lengths[r] for r in b.rows)
        assert b.size * b.length <= budget or b.size == multiple
        sizes.setdefault(b.length, set()).add(b.size)
    assert all(len(s) == 1 for s in sizes.values()), "one batch size a length"
    assert [b.length for b in batches] == sorted((b.length for b in batches), reverse=True)


@pytest.mark.parametrize("count", [20, 400])
def test_few_shapes_and_a_third_of_padding(count):
    lengths = np.random.default_rng(0).integers(4, 257, count).tolist()
    batches = by_length(lengths, BUDGET)
    assert len({(b.size, b.length) for b in batches}) <= 12
    assert sum(b.size * b.length for b in batches) < 1.4 * sum(lengths)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad(side):
    tokens = [np.array([1, 2, 3], np.int32), np.array([9], np.int32), np.array([5, 6], np.int32)]
    ids, mask = pad(tokens, Batch((2, 0), 3, 4), side)
    assert ids.dtype == np.int32 and mask.dtype == bool
    for row, want in enumerate((tokens[2], tokens[0], tokens[2])):  # the first row fills the batch
        assert ids[row][mask[row]].tolist() == want.tolist()
        assert mask[row].sum() == want.size
        assert mask[row][0 if side == "right" else -1]
