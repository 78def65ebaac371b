"""The reward's targets: scaled by step, or by step and entry, and drawn by the step's number."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from reward_jax.planning.fit import RunContext
from reward_jax.studies.i2p.reward import _Batches, fit_reward, measure
from tests.reward.studies.i2p.test_store import S, filled

ROWS = np.array([0, 1, 3, 4])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("store"))


def of_rows(whole, name):
    """[chains and rows, S, h, w, C] of the training rows."""
    both = np.concatenate([getattr(one, name) for one in whole], 1)[:, ROWS]
    return both.reshape(-1, *both.shape[2:])


@pytest.mark.parametrize(("by", "axes"), [("timestep", (0, 2, 3, 4)), ("pixel", 0)])
def test_scaling_is_that_of_the_training_rows_at_each_step(store, by, axes):
    found, whole = measure(store[0], ROWS, by), store[1]
    x, difference = of_rows(whole, "x_t"), of_rows(whole, "base") - of_rows(whole, "safe")
    wanted = x.mean(axes), x.std(axes), np.sqrt((difference**2).mean(axes))
    for one, other in zip((found.mean, found.deviation, found.size), wanted, strict=True):
        np.testing.assert_allclose(one.squeeze(), other, atol=5e-3)
    np.testing.assert_array_equal(found.t, [40, 20, 1])


def test_a_step_that_is_walked_twice_has_one_scaling(tmp_path):
    found = measure(filled(tmp_path, t=(20, 20, 1))[0], ROWS, "pixel")
    for one in (found.mean, found.deviation, found.size):
        np.testing.assert_array_equal(one[0], one[1])
        assert np.abs(one[1] - one[2]).max() > 0.01


def test_epsilon_space_leaves_all_as_it_is(store):
    found = measure(store[0], ROWS, "none")
    x = np.ones((2, 2, 4, 4), np.float32)
    np.testing.assert_array_equal(found.inputs(x, np.array([0, 2])), x)
    assert (found.size == 1).all()


def test_a_step_without_a_difference_has_no_target(tmp_path):
    store, whole = filled(tmp_path)
    for shard, one in enumerate(whole):
        one.safe[:, :, 0] = one.base[:, :, 0]
        store.write(shard, one, ["text"] * one.x_t.shape[1])
    scaling = measure(store, ROWS, "timestep")
    assert np.isfinite(1 / scaling.size).all() and scaling.size[0] < 1e-2 * scaling.size[1]
    batch = _Batches(store, ROWS, scaling, (64, 0))(0)
    t, size = np.asarray(batch.t), np.abs(np.asarray(batch.value)).max((1, 2, 3))
    assert (size[t == 40] == 0).all() and (size[t != 40] > 0.5).all() and (t == 40).any()


def test_batches_are_of_the_training_rows_and_the_same_when_asked_again(store):
    pairs, whole = store
    scaling = measure(pairs, ROWS, "pixel")
    batches, again = (_Batches(pairs, ROWS, scaling, (40, 7)) for _ in range(2))
    one, same, next_one = batches(5), again(5), batches(6)
    np.testing.assert_array_equal(one.x, same.x)
    np.testing.assert_array_equal(one.value, same.value)
    assert not np.array_equal(one.t, next_one.t) and one.target == "epsilon"
    step = np.array([list(scaling.t).index(t) for t in np.asarray(one.t)])
    x = np.asarray(one.x) * scaling.deviation[step] + scaling.mean[step]
    value = np.asarray(one.value) * scaling.size[step]
    known, difference = of_rows(whole, "x_t"), of_rows(whole, "base") - of_rows(whole, "safe")
    found = set()
    for row in range(40):
        (at,) = np.flatnonzero(np.abs(known[:, step[row]] - x[row]).max((1, 2, 3)) < 5e-3)
        np.testing.assert_allclose(value[row], difference[at, step[row]], atol=1e-2)
        found.add((int(at), int(step[row])))
    assert len({at for at, _ in found}) > 4 and {s for _, s in found} == set(range(S))


class _Squares:
    """A store of random latents, where the safe epsilon is the base's less a multiple of x_t."""

    def steps(self):
        return np.array([151, 101, 101, 51, 1], np.int32)

    def read(self, name, chain, row, step=None):
        draw = np.random.default_rng((chain, row)).normal(size=(2, 5, 4, 4, 4))
        x, base = draw.astype(np.float32)
        whole = {"x_t": x, "base": base, "safe": base - 0.3 * x, "last": x[-1]}[name]
        return whole if step is None else whole[step]


def test_a_reward_whose_gradient_is_known_is_learned(done):
    """grad r is x_t times a number; the program is that of the study, and compiled already."""
    store: Any = _Squares()
    rows, explained = np.arange(200), []
    matching = dataclasses.replace(done.config.matching, steps=300, learning_rate=2e-2)
    context = RunContext(lambda step, found: explained.extend(found["explained"].ravel()))
    fit_reward(
        store,
        rows,
        measure(store, rows[:20], "timestep"),
        done.drawn[0][0].schedule,
        done.config.network,
        matching,
        seed=0,
        context=context,
    )
    assert np.mean(explained[:6]) < 0.2 and np.mean(explained[-30:]) > 0.8
