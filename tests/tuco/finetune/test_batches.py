import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuco_jax.finetune.batches import BUCKETS, Plan, bucket, pack, rows_checksum, take
from tuco_jax.finetune.conversations import Example


def examples(sizes, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for size in sizes:
        answer = rng.random(size) < 0.4
        answer[-1] = True
        made.append(Example(rng.integers(1, 1000, size).astype(np.int32), answer))
    return made


def pairs(example):
    """(token before, target) of each answer token."""
    at = np.flatnonzero(example.answer[1:])
    return list(zip(example.tokens[at].tolist(), example.tokens[at + 1].tolist(), strict=True))


def documents(table):
    """Each segment's tokens and (token before, target) pairs."""
    found = []
    for r in range(len(table.tokens)):
        for s in range(1, table.segments[r].max() + 1):
            inside = table.segments[r] == s
            columns = table.columns[r][table.weights[r] > 0]
            mine = columns[inside[columns]]
            targets = table.targets[r][table.weights[r] > 0][inside[columns]]
            before = table.tokens[r][mine].tolist()
            found.append(
                (
                    table.tokens[r][inside].tolist(),
                    list(zip(before, targets.tolist(), strict=True)),
                )
            )
    return sorted(found)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 50), min_size=1, max_size=60), st.integers(50, 90))
def test_packing_keeps_every_example_once(sizes, length):
    data = examples(sizes)
    table = pack(data, length)
    assert table.tokens.shape[1] <= length
    assert documents(table) == sorted((e.tokens.tolist(), pairs(e)) for e in data)
    assert np.array_equal(table.mask, table.segments > 0)
    assert table.weights.sum() == sum(e.answer[1:].sum() for e in data)
    # A column predicts the token after it, within its own document.
    rows, cells = np.nonzero(table.weights)
    columns = table.columns[rows, cells]
    assert np.array_equal(table.targets[rows, cells], table.tokens[rows, columns + 1])
    assert np.array_equal(table.segments[rows, columns], table.segments[rows, columns + 1])


def test_packing_fills_rows():
    sizes = np.random.default_rng(0).integers(20, 120, 400)
    table = pack(examples(sizes), 256)
    assert table.mask.mean() > 0.97


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=60))
def test_buckets_keep_every_example_once(sizes):
    data = examples(sizes)
    tables = bucket(data)
    assert len(tables) <= BUCKETS
    found = sorted(d for table in tables for d in documents(table))
    assert found == sorted((e.tokens.tolist(), pairs(e)) for e in data)
    assert all(table.tokens.shape[1] % 8 == 0 for table in tables)


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_an_epoch_sees_every_row_once(rows):
    tables = bucket(examples(np.random.default_rng(1).integers(5, 60, 30)))
    plan = Plan(tables, rows, seed=3)
    for epoch in range(2):
        batches = [plan.batch(epoch * plan.steps + i) for i in range(plan.steps)]
        found = sorted(d for batch in batches for d in documents(batch))
        assert found == sorted(d for table in tables for d in documents(table))
        assert all(len(batch.tokens) == rows for batch in batches)
    assert sum(b.weights.sum() for b in plan.sweep()) == sum(t.weights.sum() for t in tables)


def test_order_is_a_function_of_seed_and_step():
    tables = [pack(examples([9] * 40), 16)]
    plan = Plan(tables, 4, seed=0)
    again, other = Plan(tables, 4, seed=0), Plan(tables, 4, seed=1)
    assert all(np.array_equal(plan.batch(i).tokens, again.batch(i).tokens) for i in (0, 7, 23))
    assert not np.array_equal(plan.batch(0).tokens, other.batch(0).tokens)
    assert not np.array_equal(plan.batch(0).tokens, plan.batch(plan.steps).tokens)


def test_empty_rows_weigh_nothing():
    batch = take(pack(examples([9, 9, 9]), 9), np.array([1, -1]))
    assert batch.weights[0].sum() > 0
    assert not any(np.asarray(a[1]).any() for a in batch)


def test_a_checksum_knows_the_data():
    tables = [pack(examples([9, 12, 5]), 16)]
    other = [pack(examples([9, 12, 5], seed=1), 16)]
    assert rows_checksum(tables) == rows_checksum([pack(examples([9, 12, 5]), 16)])
    assert rows_checksum(tables) != rows_checksum(other)
