"""Rows that are no data, whatever file they come from."""

import dataclasses

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.episodes import (
    Episodes,
    check_flags,
    check_rows,
    same_goal,
    without_terminations,
)


def with_value(value, row=2, column=1):
    rows = np.zeros((5, 3))
    rows[row, column] = value
    return rows


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (with_value(np.nan), np.zeros((5, 2)), "f: observations row 2, column 1 (from 0) is nan:"),
        (
            np.zeros((5, 3)),
            with_value(-np.inf, 4, 0),
            "f: actions row 4, column 0 (from 0) is -inf",
        ),
        (with_value(1e300), np.zeros((5, 2)), "f: observations row 2, column 1 (from 0) is inf"),
        (np.full((5, 2), np.nan), np.zeros((5, 2)), "(10 such values in all)"),
        (np.zeros((0, 3)), np.zeros((0, 2)), "f: observations are empty"),
        (np.zeros(5), np.zeros((5, 2)), "f: observations have shape (5,), not [steps, width]"),
        (np.zeros((5, 3)), np.array([["a"]] * 5), "f: actions hold <U1, not numbers"),
        (np.zeros((5, 3)), np.zeros((4, 2)), "f: 5 observations but 4 actions"),
    ],
)
def test_rows_that_are_no_data(observations, actions, message):
    with pytest.raises(InputError) as error:
        check_rows("f", observations, actions)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_flags_that_are_missing_are_no_flags(kind):
    """As pandas writes them: NaN counted as true."""
    flags = np.zeros(100, kind)
    flags[[9, 99]] = 1
    found = check_flags("f", "terminals", flags, 100)
    assert found is not None and np.flatnonzero(found).tolist() == [9, 99]
    flags[flags == 0] = np.nan
    with pytest.raises(InputError) as error:
        check_flags("f", "terminals", flags, 100)
    said = str(error.value)
    assert said.startswith("f: terminals row 0 (from 0) is nan (98 such values in all): a flag is")


@pytest.mark.parametrize("value", [2, -1])
def test_other_numbers_are_no_flags(value):
    flags = np.array([0, 1, value])
    with pytest.raises(InputError, match=f"timeouts row 2 .from 0. is {value}: a flag is 0 or 1"):
        check_flags("f", "timeouts", flags, 3)
    assert check_flags("f", "timeouts", None, 3) is None


def test_goals_that_differ_by_rounding_are_one():
    goal = np.array([[1.25, -3e4], [0.0, 0.0]], np.float32)
    near = goal + np.array([[5e-7, 0.01], [1e-9, 0]], np.float32)
    assert same_goal(goal, near).all() and not same_goal(goal, goal + 1).any()
    assert same_goal(goal[0], near[0]) and not same_goal(goal[0], goal[1])


def test_what_seems_a_terminal_state_ends_nothing_in_a_world_without():
    """Four episodes: ended by a flag, by time, by both, by a flag (the last of all)."""
    lengths = np.array([3, 2, 4, 2])
    flags, late = np.zeros(11, bool), np.zeros(11, bool)
    flags[[2, 8, 10]] = late[[4, 8]] = True
    rows = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    led_to = np.arange(8.0).reshape(4, 2).astype(np.float32)
    data = Episodes(
        rows[:, :2], rows[:, 2:], lengths, arrivals=np.arange(4), terminations=flags,
        truncations=late, led_to=led_to,
    )  # fmt: skip
    found = without_terminations(data)
    assert found.lengths.tolist() == [5, 4, 2]
    assert found.terminations is not None and not found.terminations.any()
    assert found.truncations is not None
    assert np.flatnonzero(found.truncations).tolist() == [4, 8, 10]
    np.testing.assert_array_equal(found.led_to, led_to[1:])  # pyright: ignore
    np.testing.assert_array_equal(found.arrivals, [0, 2, 3])  # pyright: ignore
    np.testing.assert_array_equal(found.observations, data.observations)
    assert without_terminations(found) is found
    unsaid = without_terminations(dataclasses.replace(data, terminations=None))
    assert unsaid.terminations is not None and unsaid.terminations.shape == (11,)
    assert not unsaid.terminations.any() and unsaid.lengths.tolist() == [3, 2, 4, 2]
