"""The robots as tasks: returns against Gymnasium's, goals, data of others, pictures."""

from typing import Any

import jax
import matplotlib.figure
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.trajectory.space import Plans
from reward_jax.tasks.base import Rollout
from reward_jax.tasks.find import find
from reward_jax.tasks.locomotion.bodies import capsules
from reward_jax.tasks.locomotion.robots import ROBOTS, environment
from tests.reward.tasks.locomotion.conftest import another, random_policy


def plan_by(policy, rows, calls):
    """A planner whose plans are the policy's action, then others that tell their row."""

    def planned(observations, key):
        calls.append(np.asarray(jax.random.key_data(key)))
        first = policy.act(observations)
        actions = np.stack([np.roll(first, row, axis=1) for row in range(rows)], axis=1)
        return Plans(np.zeros((len(first), rows, observations.shape[1])), actions, 1)

    return planned


@pytest.mark.parametrize("execute", [1, 3])
@pytest.mark.parametrize("name", ["halfcheetah", "walker2d"])
def test_returns_are_those_of_the_environment(name, execute):
    task, policy, calls = find(name), random_policy(name, 3), []
    starts = task.starts(4, seed=5)
    rollout = Rollout(steps=40, execute=execute)
    found: Any = task.execute(
        plan_by(policy, 3, calls), starts, key=jax.random.key(0), goal=None, rollout=rollout
    )
    env, returns, steps = another(name), [], []
    seeds = np.random.SeedSequence(5).generate_state(4)
    for seed in seeds:
        seen, _ = env.reset(seed=int(seed))
        total, count, over = 0.0, 0, False
        while count < 40 and not over:
            first = policy.act(seen[None])[0]
            for row in range(execute):
                if count < 40 and not over:
                    seen, reward, over, _, _ = env.step(np.roll(first, row))
                    total, count = total + reward, count + 1
        returns.append(total)
        steps.append(count)
    np.testing.assert_array_equal(found.measured["steps"], steps)
    # The robots' track begins at 0, the environment's within .1 m: rounding differs by that.
    np.testing.assert_allclose(found.measured["return"], returns, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        found.measured["normalized"], ROBOTS[name].normalized(np.array(returns)), rtol=1e-6
    )
    assert len(calls) == -(-max(steps) // execute)
    assert len({tuple(k.ravel().tolist()) for k in calls}) == len(calls)  # a key for each plan
    assert set(found.seconds) == {"planning", "stepping"} and min(found.seconds.values()) > 0
    assert found.shown.shape[:2] == (4, 10) and (found.shown[:, -1] != found.shown[:, 0]).any()


def test_plans_that_cannot_be_acted_on():
    task = find("hopper")
    starts = task.starts(2, seed=0)

    def execute(actions, stride, rollout=None):
        plans = Plans(np.zeros((2, 4, 11)), actions, stride)
        task.execute(
            lambda observations, key: plans,
            starts,
            key=jax.random.key(0),
            goal=None,
            rollout=rollout,
        )

    with pytest.raises(InputError, match=r"have no actions: train it with --actions true"):
        execute(None, 1)
    with pytest.raises(InputError, match="a row every 10 steps"):
        execute(np.zeros((2, 4, 3)), 10)
    with pytest.raises(InputError, match=r"has actions \[B, 3\], not \[2, 6\]"):
        execute(np.zeros((2, 4, 6)), 1)
    with pytest.raises(InputError, match="execute is 5, but a plan of hopper has 4 steps .its ho"):
        execute(np.zeros((2, 4, 3)), 1, Rollout(execute=5))
    alone = task.execute(
        lambda observations, key: pytest.fail("planned"),
        starts,
        key=jax.random.key(0),
        goal=None,
        simulate=False,
    )
    assert alone.means() == dict.fromkeys(("return", "normalized", "steps"))
    assert task.summarise(alone.means()) == "not executed"


def test_goals_are_sets_of_data():
    task = find("halfcheetah")
    assert task.goals()[0] == "expert" and task.goal("0") == task.goal(0) == "expert"
    assert task.goal(None) is None and task.goal("medium-replay") == "medium-replay"
    for bad in ("good", "3", -1):
        with pytest.raises(InputError, match="give one of these, or a number from 0 to 2"):
            task.goal(bad)


def torso_of(model):
    return next(n for i in range(model.ngeom) if (n := model.geom(i).name).startswith("torso"))


@pytest.mark.parametrize("name", ROBOTS)
def test_capsules_are_where_the_environment_has_them(name):
    env: Any = environment(name)
    made = env.unwrapped
    rng = np.random.default_rng(0)
    states = rng.normal(0, 0.3, (3, made.model.nq))
    ends, radii = capsules(name, states)
    env.reset(seed=0)
    for row, state in enumerate(states):
        made.set_state(state, np.zeros(made.model.nv))
        torso = made.data.geom(name := torso_of(made.model))
        middle = ends[row].mean(axis=1)
        near = np.abs(middle - torso.xpos[[0, 2]]).sum(axis=1).argmin()
        np.testing.assert_allclose(middle[near], torso.xpos[[0, 2]], atol=1e-12)
        length = np.linalg.norm(np.diff(ends[row], axis=1)[:, 0], axis=1)
        np.testing.assert_allclose(length[near], 2 * made.model.geom(name).size[1], atol=1e-9)
    assert radii.min() > 0.02 and radii.max() < 0.2


def test_recorded_windows_move_as_far_as_their_velocities_say():
    task = find("hopper")
    observations = np.random.default_rng(0).normal(1, 0.1, (2, 10, 11))
    found = task.recorded(observations)
    np.testing.assert_array_equal(found[..., 1:], observations[..., :5])
    np.testing.assert_allclose(found[:, 3, 0], 0.008 * observations[:, 1:4, 5].sum(axis=1))


def test_pictures():
    task = find("walker2d")
    shown = np.random.default_rng(0).normal(0, 0.2, (5, 10, 9))
    shown[..., 1] += 1.2
    figure = matplotlib.figure.Figure(figsize=(8, 4))
    axes = figure.subplots()
    task.draw(axes, shown, goal="expert")
    parts: Any = axes.collections
    lines = [len(part.get_segments()) for part in parts]
    assert lines == [10 * len(capsules("walker2d", shown[0])[1])] * 3
    assert f"{shown[0, 0, 0]:.1f} m" in {t.get_text() for t in axes.texts}


def test_a_warm_start_hands_the_last_plans_over():
    task, given = find("hopper"), []

    def planned(observations, key, previous=None, executed=0):
        given.append((previous, executed))
        return Plans(np.full((2, 4, 11), len(given)), np.zeros((2, 4, 3)), 1)

    rollout = Rollout(steps=6, execute=2, warm_start=True)
    key = jax.random.key(0)
    task.execute(planned, task.starts(2, 0), key=key, goal=None, rollout=rollout)
    assert given[0] == (None, 0)
    assert [(p.observations.max(), n) for p, n in given[1:]] == [(1, 2), (2, 2)]
