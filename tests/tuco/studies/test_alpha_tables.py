"""Tables of picks and of categories."""

import numpy as np

from tuco_jax.datasets.multiple_choice import Question, Task
from tuco_jax.studies.alpha_choice import cross_validate
from tuco_jax.studies.alpha_tables import category_table, picks_table, points


def test_picks_show_a_model_that_goes_by_place():
    tasks = [
        Task(name, (), tuple(Question("q", tuple("wxyz"), a, "f:1") for a in answers))
        for name, answers in (("a", [0, 1, 2, 3]), ("b", [1, 1, 1, 1]))
    ]
    picked = {
        "a": np.asarray([[0, 0, 0, 0], [0, 1, 2, 3]]),
        "b": np.asarray([[0, 0, 0, 0], [1, 1, 1, 0]]),
    }
    table = picks_table(tasks, picked, (0.5, 1.0))
    assert list(table.columns) == ["share", "A", "B", "C", "D"]
    assert table.rows == [
        ["picked at alpha 0.5", 1.0, 0.0, 0.0, 0.0],
        ["picked at alpha 1", 0.25, 0.5, 0.125, 0.125],
        ["right answers", 0.125, 0.625, 0.125, 0.125],
    ]


def test_a_category_of_one_task_has_the_task_s_own_interval():
    right = np.zeros((2, 40), bool)
    right[0, :10], right[1] = True, np.arange(40) % 4 > 0
    gain = cross_validate(right, (1.0, 1.1), folds=4)
    table = category_table("Gains", {"virology": gain}, {"virology": "other"})
    assert [row[2] for row in table.rows] == [points(gain.gain)] * 2
    assert [row[4] for row in table.rows] == [f"{gain.p:.3g}"] * 2
