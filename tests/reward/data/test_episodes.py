"""Rows that are no data, whatever file they come from."""

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.episodes import check_rows


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
