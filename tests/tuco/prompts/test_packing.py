"""Packing holds every prompt once and whole, wastes little and compiles one or two shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuco_jax.prompts.packing import Packed, best_fit, pack, padding

BUDGET = 1024


def shapes(batches):
    return {(b.size, b.length, b.most) for b in batches}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=120),
    budget=st.sampled_from([1, 64, 1000, 4096]),
    multiple=st.sampled_from([1, 3, 8]),
    last_tokens=st.booleans(),
)
def test_every_prompt_once_in_a_row_that_holds_it(lengths, budget, multiple, last_tokens):
    batches = pack(lengths, budget, multiple, last_tokens=last_tokens)
    assert sorted(i for b in batches for i in b.prompts) == list(range(len(lengths)))
    assert len(shapes(batches)) <= 2
    for b in batches:
        assert 0 < len(b.rows) <= b.size and b.size % multiple == 0
        assert all(0 < len(row) <= b.most for row in b.rows)
        assert all(sum(lengths[i] for i in row) <= b.length for row in b.rows)
        assert b.size * b.length <= budget or b.size == multiple


@pytest.mark.parametrize("count", [160, 400, 4000])
def test_under_four_percent_of_padding_in_one_shape(count):
    """The case that was measured: lengths of 4 to 252 tokens."""
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(4, 253, count).tolist()
        batches = pack(lengths, BUDGET)
        assert padding(batches, lengths) < 0.04
        assert len(shapes(batches)) <= 2
        assert sum(b.size * b.most for b in batches) < 0.05 * sum(lengths), "last tokens"


def test_a_long_prompt_among_many_short_ones():
    lengths = [2000] + [10] * 1500
    batches = pack(lengths, BUDGET)
    assert padding(batches, lengths) < 0.04
    assert 0 in batches[0].prompts, "what does not fit fails early"


def test_one_prompt():
    assert pack([5], BUDGET) == [Packed(((0,),), 1, 8, 1)]


def test_a_choice_by_a_sample_is_fast_and_depends_on_lengths_alone():
    lengths = np.random.default_rng(1).integers(4, 257, 50_000).tolist()
    batches = pack(lengths, BUDGET)
    assert batches == pack(list(lengths), BUDGET)
    assert padding(batches, lengths) < 0.02


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), max_size=150),
    length=st.integers(60, 200),
    most=st.sampled_from([None, 1, 3]),
)
def test_best_fit_takes_the_first_of_the_fullest_rows(sizes, length, most):
    sizes = sorted(sizes, reverse=True)
    rows: list[list[int]] = []
    for number, size in enumerate(sizes):
        left = [length - sum(sizes[i] for i in row) for row in rows]
        open_rows = [r for r, row in enumerate(rows) if most is None or len(row) < most]
        fitting = [(left[r], r) for r in open_rows if left[r] >= size]
        if fitting:
            rows[min(fitting)[1]].append(number)
        else:
            rows.append([number])
    assert best_fit(sizes, length, most) == rows


def test_rows_are_laid_out_and_unpacked():
    tokens = [np.arange(n, dtype=np.int32) + 10 * n for n in (3, 2, 4)]
    batch = Packed(((2, 1), (0,)), 3, 7, 3)
    rows = batch.arrays(tokens)
    assert rows["tokens"].tolist()[:2] == [[40, 41, 42, 43, 20, 21, 0], [30, 31, 32, 0, 0, 0, 0]]
    assert rows["segments"].tolist()[:2] == [[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 0, 0, 0, 0]]
    assert rows["columns"].tolist()[:2] == [[3, 5, 3], [2, 2, 2]]
    for name in ("tokens", "segments", "columns"):
        np.testing.assert_array_equal(rows[name][2], rows[name][0])
    np.testing.assert_array_equal(rows["mask"], rows["segments"] > 0)
    assert batch.prompts == [2, 1, 0]
    last = np.take_along_axis(rows["tokens"], rows["columns"], axis=1)
    assert batch.unpack(last).tolist() == [43, 21, 32]
    for i, row, columns in batch.spans(tokens):
        np.testing.assert_array_equal(rows["tokens"][row, columns], tokens[i])
