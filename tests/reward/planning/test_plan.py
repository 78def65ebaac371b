"""Rewards of whole trajectories, scored in padded batches; plans in the world's own units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from common_jax.mesh import make_mesh
from reward_jax.planning.plan import (
    Watched,
    plan,
    planner,
    precomputed,
    score_windows,
    start_rows,
)
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.paths import draw_path_targets
from reward_jax.reward.targets import ExtractionOptions
from tests.reward.cli_runs import model, reward, space


@pytest.mark.parametrize(
    ("count", "mesh"), [*((n, None) for n in (1, 7, 8, 9, 20)), (6, (4, 2)), (20, (4, 2))]
)
def test_batches_and_devices_change_nothing(count, mesh):
    guide, mesh = reward().guide, mesh and make_mesh(*mesh)
    rows = np.random.default_rng(2).normal(size=(count, 8, 4)).astype(np.float32)
    found = score_windows(guide, rows, t=2, batch=8, mesh=mesh)
    assert found.shape == (count,)
    expected = guide(jnp.asarray(rows), jnp.full(count, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_one_shape_is_compiled():
    traced = []

    @struct.dataclass
    class Guide:
        def __call__(self, x, t):
            traced.append(x.shape)
            return x.sum((1, 2))

    rows = np.arange(21 * 2, dtype=np.float32).reshape(21, 2, 1)
    np.testing.assert_array_equal(score_windows(Guide(), rows, batch=8), rows.sum((1, 2)))
    assert traced == [(8, 2, 1)]


def test_a_planner_gives_plans_in_the_world_s_own_units():
    """Of a model with actions: split off, restored, from the start that was given."""
    n = space().normaliser
    normaliser = n.replace(offset=np.arange(4, dtype=np.float32))  # pyright: ignore[reportAttributeAccessIssue]
    base, key = model(actions=1, normaliser=normaliser), jax.random.key(3)
    starts = np.random.default_rng(0).normal(size=(5, 3))
    options = GuidanceOptions(temperature=0.5)
    plans = planner(base, options=options)(starts, key)
    assert plans.observations.shape == (5, 8, 3) and plans.stride == 10
    assert plans.actions is not None and plans.actions.shape == (5, 8, 1)
    np.testing.assert_allclose(plans.observations[:, 0], starts, atol=1e-5)
    x = normaliser.restore(np.asarray(plan(base, starts, key=key, options=options)))
    np.testing.assert_allclose(plans.actions, x[..., :1], atol=1e-5)
    np.testing.assert_allclose(plans.observations, x[..., 1:], atol=1e-5)
    assert precomputed(plans)(starts, key) is plans
    assert model().space.plans(np.zeros((2, 8, 4))).actions is None


def test_states_that_a_world_comes_by_are_where_paths_begin():
    """In the base's own coordinates; a row that has ended is met once."""
    offset = np.arange(4, dtype=np.float32)
    base = model(actions=1, normaliser=space().normaliser.replace(offset=offset))  # pyright: ignore[reportAttributeAccessIssue]
    asked = []

    def plans(observations, key, previous=None, executed=0):
        asked.append((previous, executed))
        return base.space.plans(np.zeros((len(observations), 8, 4)))

    watched, key = Watched(plans), jax.random.key(0)
    states = np.random.default_rng(0).normal(size=(3, 2, 3))
    states[2, 1] = states[1, 1]  # the second has fallen
    now = states[0].copy()
    watched(now, key)
    now[:] = states[1]  # as a simulator may, in place
    watched(now, key, previous="last", executed=2)  # pyright: ignore[reportArgumentType]
    watched(states[2], key)
    assert asked == [(None, 0), ("last", 2), (None, 0)]
    np.testing.assert_array_equal(watched.met, np.concatenate([*states[:2], states[2, :1]]))

    rows = start_rows(base.space, watched.met)
    assert rows.shape == (5, 8, 4)
    found = base.space.plans(base.space.pin(rows)(jnp.ones((5, 8, 4))))
    np.testing.assert_allclose(found.observations[:, 0], watched.met, atol=1e-5)
    targets = draw_path_targets(
        base.denoiser, model(1, actions=1).denoiser, rows, base.denoiser.schedule,
        guide=ScoreDifference(base.denoiser, model(1, actions=1).denoiser), count=64,
        key=key, options=ExtractionOptions(batch_size=8), pin=base.space.pin,
    )  # fmt: skip
    at = base.space.plans(targets.x).observations[:, 0]
    away = np.abs(at[:, None] - watched.met[None]).max(-1).min(1)
    assert away.max() < 1e-4 and len(np.unique(at.round(3), axis=0)) > 2


def test_a_warm_start_begins_with_what_is_left_of_the_last_plans():
    """Noised to the last step of DDIM alone, a plan is near them, shifted."""
    base, key = model(actions=1), jax.random.key(3)
    starts = np.random.default_rng(0).normal(size=(5, 3))
    options = GuidanceOptions(sampler="ddim", sampling_steps=4, skip=2)
    plans = planner(base, options=options)(starts, key)
    np.testing.assert_allclose(
        base.space.plans(base.space.rows(plans)).observations, plans.observations, atol=1e-6
    )
    again = planner(base, options=options)(starts, key, previous=plans, executed=3)
    rows = base.space.rows(plans)[:, [3, 4, 5, 6, 7, 7, 7, 7]]
    expected = plan(base, starts, key=key, options=options, warm=jnp.asarray(rows))
    np.testing.assert_allclose(
        again.observations, base.space.plans(expected).observations, atol=1e-6
    )
    np.testing.assert_allclose(again.observations[:, 0], starts, atol=1e-5)
    assert np.abs(again.observations - plans.observations).max() > 1e-3
