"""A point among obstacles as a task: data, goals, outcomes."""

from typing import Any

import jax
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.trajectory.space import Plans
from reward_jax.tasks.obstacles.task import NEAR, ObstaclesTask


def test_base_and_expert_differ_in_the_goal_alone():
    task = ObstaclesTask("discs")
    base, again = (task.record(episodes=5, span=9, seed=3) for _ in range(2))
    expert = task.record(episodes=5, span=9, seed=3, goal=[1.7, 1.7])
    np.testing.assert_array_equal(base.observations, again.observations)
    np.testing.assert_array_equal(base.observations[base.starts], expert.observations[base.starts])
    np.testing.assert_allclose(expert.observations[expert.ends - 1], 1.7, atol=1e-5)
    assert base.about["goal"] is None and expert.about["goal"] == [1.7, 1.7]
    assert base.arrivals is not None and (base.arrivals + 9 <= base.lengths).all()


def test_goals():
    task = ObstaclesTask("disc")
    assert [task.goal(i) for i in ("3", "1,-1.5", [1, -1.5])] == [[1.7, 1.7], *[[1, -1.5]] * 2]
    for given, said in (("0,0", "lies in a disc"), ("9,0", "or outside"), ("4", "give 0 to 3")):
        with pytest.raises(InputError, match=said):
            task.goal(given)
    with pytest.raises(InputError, match="had no goal"):
        task.goal(None)


def test_outcomes():
    """A plan at the goal, one that ends elsewhere, and one through the disc."""
    task, goal = ObstaclesTask("disc"), [1.7, 0.0]
    ends = np.array([[1.7, 0.0], [1.0, 1.2], [1.7, 0.0]])
    starts = np.array([[1.0, 1.0], [1.0, 1.5], [-1.7, 0.0]])
    rows = np.linspace(starts, ends, 12, axis=1)
    seen = []

    def planner(observations, key):
        seen.append((observations, key))
        return Plans(rows, None, 4)

    key = jax.random.key(0)
    outcome = task.execute(planner, starts, key=key, goal=goal)
    ((observations, used),) = seen
    assert observations is starts and used is key
    found: Any = outcome.measured
    assert found["planned"].tolist() == [True, False, True]
    assert found["reached"].tolist() == [True, False, False]
    clear = (np.linalg.norm(rows, axis=-1) >= 0.8).mean(axis=1)
    np.testing.assert_allclose(found["clear"], clear)
    alone = task.execute(planner, starts, key=key, goal=goal, simulate=False)
    assert alone.means()["reached"] is None and alone.means()["planned"] == pytest.approx(2 / 3)
    assert NEAR < 0.5
