"""A maze as a task: goals, starts, outcomes, words."""

from typing import Any

import jax
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.trajectory.space import Plans
from reward_jax.tasks.maze.task import NEAR, TASKS, MazeTask, task_of


def test_goals_by_number_by_place_and_none():
    task = MazeTask("umaze")
    listed = task.goals()
    assert task.goal("0") == listed[0] and task.goal("1,1") == [1.0, 1.0]
    for given, said in ((None, "had no goal; give one"), ("99", "give 0 to 7"), ("0,0", "goal")):
        with pytest.raises(InputError, match=said):
            task.goal(given)
    assert task.describe(None) == "walks to random goals"
    assert task.describe([1.0, 2.5]) == "walks to the goal (1, 2.5)"


def test_starts_are_at_rest_and_the_same_for_a_seed():
    task = MazeTask("medium")
    starts = task.starts(20, 3)
    assert starts.shape == (20, 4) and not starts[:, 2:].any()
    assert task.layout.inside(starts[None, :, :2]).all()
    np.testing.assert_array_equal(starts, task.starts(20, 3))
    assert not np.array_equal(starts, task.starts(20, 4))


def test_outcomes_of_plans_alone():
    """One plan that ends at the goal, one outside the maze."""
    task, goal = MazeTask("umaze"), [1.0, 1.0]
    starts = np.array([[0.0, 1.0, 0, 0], [1.0, 1.0, 0, 0]])
    ends = np.array([[1.0, 1.0 + NEAR / 2], [9.0, 9.0]])
    rows = np.zeros((2, 5, 4))
    rows[..., :2] = np.linspace(starts[:, :2], ends, 5, axis=1)
    outcome = task.execute(
        lambda observations, key: Plans(rows, None, 10),
        starts,
        key=jax.random.key(0),
        goal=goal,
        simulate=False,
    )
    found: Any = outcome.measured
    assert found["planned"].tolist() == [True, False] and found["executed"] is None
    assert found["inside"][0] == 1 and found["inside"][1] < 1
    np.testing.assert_array_equal(outcome.shown, rows[..., :2])
    assert task.summarise(outcome.means()) == "0.50 of plans end at the goal"


def test_tasks_are_known_by_their_environment():
    assert set(TASKS) == {"open", "umaze", "medium", "large"}
    assert task_of("PointMaze_UMaze-v3") == "umaze" and task_of("Hopper-v5") is None
