"""What every task has: means of outcomes, and the measure that a table with room for one shows."""

import types
from typing import Any

import numpy as np
import pytest

from reward_jax.tasks.base import Measure, Outcome, Task
from reward_jax.tasks.find import TASKS, find


def test_means_are_shares_and_numbers_and_none():
    measured = {"reached": np.array([True, False, True, True]), "left": None, "far": np.arange(4)}
    assert Outcome(measured, np.zeros((4, 2))).means() == {
        "reached": 0.75,
        "left": None,
        "far": 1.5,
    }


def test_standard_errors_of_means():
    rows = np.random.default_rng(0).normal(size=9)
    found = Outcome({"far": rows, "left": None}, np.zeros((9, 2))).standard_errors()
    assert found == {"far": pytest.approx(np.sqrt(rows.var(ddof=1) / 9)), "left": None}
    one = Outcome({"reached": np.array([True])}, np.zeros((1, 2)))
    assert one.standard_errors() == {"reached": None}


def test_errors_over_starts_and_over_seeds():
    """Of two blocks of three starts."""
    rows = np.array([1.0, 2.0, 6.0, 3.0, 6.0, 6.0])
    measured = {"far": rows, "reached": rows > 2, "left": None}
    found = Outcome(measured, np.zeros((6, 2)), seeds=2)
    of_starts, of_seeds = [2.0, 4.0, 6.0], [3.0, 5.0]
    assert found.means()["far"] == 4.0
    assert found.standard_errors()["far"] == pytest.approx(np.std(of_starts, ddof=1) / 3**0.5)
    assert found.seed_means() == {"far": of_seeds, "reached": [1 / 3, 1.0], "left": None}
    errors = found.seed_standard_errors()
    assert errors["far"] == pytest.approx(np.std(of_seeds, ddof=1) / 2**0.5)
    assert errors["reached"] == pytest.approx(1 / 3) and errors["left"] is None
    assert Outcome(measured, np.zeros((6, 2))).seed_standard_errors()["far"] is None


def test_the_measure_that_is_shown():
    measures = (
        Measure("a", "", "", executed=False),
        Measure("b", "", "", executed=True),
        Measure("c", "", "", executed=True),
    )

    def shown(executed, *measures):
        one: Any = types.SimpleNamespace(measures=measures)
        return getattr(Task.shown_measure(one, executed=executed), "name", None)

    assert [shown(e, *measures) for e in (False, True)] == ["a", "b"]
    assert shown(True, measures[0]) is None


@pytest.mark.parametrize("name", TASKS)
def test_every_task_keeps_the_contract(name):
    task = find(name)
    assert task.name == name and task.measures and task.captions.story
    starts = task.starts(3, 0)
    assert len(starts) == 3 and np.isfinite(starts).all()
    goals = task.goals()
    assert goals == task.goals() and [task.goal(i) for i in range(len(goals))] == goals
    assert not goals or task.describe(None) != task.describe(goals[0])
