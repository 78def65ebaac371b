"""Base and expert data: one process, told apart by the goal alone."""

from typing import Any

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.episodes import transitions
from reward_jax.data.trajectory.normalisers import limits
from reward_jax.data.trajectory.windows import windows
from reward_jax.tasks.maze.collect import ARRIVED, collect, steps_for
from reward_jax.tasks.maze.mazes import environment, goals, maze
from reward_jax.tasks.maze.planner import longest_walk


def test_base_and_expert_differ_in_the_goal_alone():
    layout = maze("umaze")
    steps = longest_walk(layout)
    goal = goals(layout)[3]
    base = collect(layout, episodes=30, steps=steps, seed=5)
    again = collect(layout, episodes=30, steps=steps, seed=5)
    expert = collect(layout, goal=goal, episodes=30, steps=steps, seed=5)
    other = collect(layout, episodes=30, steps=steps, seed=6)
    np.testing.assert_array_equal(base.observations, again.observations)
    np.testing.assert_array_equal(base.actions, again.actions)
    first = base.observations[base.starts]
    np.testing.assert_array_equal(first, expert.observations[expert.starts])
    assert (first[:, 2:] == 0).all()
    assert not np.isclose(first, other.observations[other.starts])[:, :2].any()
    assert np.linalg.norm(expert.observations[expert.ends - 1, :2] - goal, axis=1).max() < 0.02
    spread = base.observations[base.ends - 1, :2]
    assert len(np.unique(layout.cell_of(spread), axis=0)) >= 6
    assert base.about["goal"] is None and expert.about["goal"] == goal.tolist()
    assert base.about["environment"] == "PointMaze_UMaze-v3"


def test_arrivals_are_for_good():
    layout = maze("medium")
    data = collect(layout, episodes=20, steps=steps_for(layout, 29), seed=0)
    assert data.arrivals is not None and data.goals is not None
    for start, end, arrival, goal in zip(
        data.starts, data.ends, data.arrivals, data.goals, strict=True
    ):
        distance = np.linalg.norm(data.observations[start:end, :2] - goal, axis=1)
        assert (distance[arrival:] <= ARRIVED + 1e-5).all()
        assert arrival == 0 or distance[arrival - 1] > ARRIVED - 1e-5
    cut = windows(data, limits(transitions(data)), horizon=8, stride=4)
    assert len(cut) == (data.arrivals + 1).sum()


def test_the_environment_replays_what_was_recorded():
    data: Any = collect(maze("large"), episodes=2, steps=longest_walk(maze("large")), seed=1)
    goals_of = data.goals.astype(np.float64)
    assert np.flatnonzero(data.truncations).tolist() == (data.ends - 1).tolist()
    with environment("large") as env:
        made: Any = env.unwrapped
        for start, end in zip(data.starts, data.ends, strict=True):
            env.reset(seed=0)
            made.point_env.set_state(*data.observations[start].reshape(2, 2))
            made.goal = goals_of[data.starts.tolist().index(start)]
            paid = []
            for row in range(start, end - 1):
                seen, reward, terminated, *_ = env.step(data.actions[row])
                np.testing.assert_allclose(
                    seen["observation"], data.observations[row + 1], atol=2e-6
                )
                assert not terminated and not data.terminations[row]
                paid.append(reward)
            np.testing.assert_array_equal(data.rewards[start : end - 1], paid)
            assert 0 < np.mean(paid) < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"goal": (0, 0)}, "goal (0, 0) lies in a wall of the maze 'umaze'"),
        ({"steps": 50}, "episodes of 50 steps are too short for the maze 'umaze', whose longest"),
        ({"episodes": 0}, "episodes must be 1 or more, not 0"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(InputError) as error:
        collect(maze("umaze"), **{"episodes": 2, "steps": 400, "seed": 0, **settings})
    assert message in str(error.value)
