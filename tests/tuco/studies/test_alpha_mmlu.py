"""Choosing alpha by folds, and the study from files to report."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from common_jax.errors import InputError
from tests.tuco.datasets.test_multiple_choice import ROWS, write_csv
from tuco_jax.core.alpha_grid import PAPER_GRID as ALPHAS
from tuco_jax.datasets.multiple_choice import Question, Task
from tuco_jax.studies.alpha_choice import check_alphas, cross_validate, mcnemar, over_tasks
from tuco_jax.studies.alpha_mmlu import CATEGORIES, STUDY, Config, category, findings, prepare
from tuco_jax.studies.alpha_tables import category_table, picks_table, points, verdict


def test_gains_by_hand():
    """Alpha 1.1 is right throughout; 1 on two questions of three."""
    right = np.zeros((3, 30), bool)
    right[1], right[2] = np.arange(30) % 3 > 0, True
    alphas = (0.9, 1.0, 1.1)
    gain = cross_validate(right, alphas)
    assert gain.chosen == (1.1,) * 5
    assert gain.at_one == pytest.approx(2 / 3)
    assert gain.gain.value == pytest.approx(1 / 3)
    assert gain.gain.low < 1 / 3 < gain.gain.high
    assert (gain.won, gain.lost) == (10, 0)
    assert gain.p == pytest.approx(2 / 2**10)
    least = cross_validate(right, alphas, minimise=True)
    assert least.chosen == (0.9,) * 5
    assert least.gain.value == pytest.approx(-2 / 3)


def test_chosen_without_the_fold_that_judges():
    """Noise gains nothing but by chance; chosen on all questions it would."""
    rng = np.random.default_rng(0)
    held, greedy = [], []
    for _ in range(200):
        right = rng.random((len(ALPHAS), 40)) < 0.5
        held.append(cross_validate(right, ALPHAS).gain.value)
        greedy.append(right.mean(axis=1).max() - right[ALPHAS.index(1.0)].mean())
    assert abs(np.mean(held)) < 3 * np.std(held) / np.sqrt(200)
    assert np.mean(greedy) > 0.05


def test_equal_alphas_stay_at_one():
    right = np.ones((len(ALPHAS), 11), bool)
    gain = cross_validate(right, ALPHAS)
    assert gain.chosen == (1.0,) * 5
    assert gain.p == 1.0
    right[ALPHAS.index(1.0)] = False
    assert cross_validate(right, ALPHAS).chosen == (0.95,) * 5


def test_tests_of_significance():
    pairs = np.asarray([[20, 9], [3, 40]])
    assert mcnemar(9, 3) == pytest.approx(stats.binomtest(9, 12).pvalue)
    assert mcnemar(9, 3) == pytest.approx(2 * stats.binom.cdf(pairs[1, 0], 12, 0.5))
    rng = np.random.default_rng(1)
    gains = {
        str(i): cross_validate(
            rng.random((3, 25)) < np.asarray([[0.4], [0.5], [0.7]]), (0.9, 1, 2)
        )
        for i in range(9)
    }
    values = [g.gain.value for g in gains.values()]
    mean, share, p = over_tasks(gains)
    assert mean.value == pytest.approx(np.mean(values))
    assert share == np.mean(np.asarray(values) > 0)
    wanted: Any = stats.wilcoxon(values)
    assert p == pytest.approx(wanted.pvalue)
    assert verdict(gains) == ("reproduced" if mean.low > 0 else "not clear")
    assert verdict(gains, -1) != "reproduced"


def test_57_tasks():
    names = [name for members in CATEGORIES.values() for name in members]
    assert len(names) == len(set(names)) == 57
    assert category("virology") == "other"
    assert category("alchemy") == "other tasks"


def quiz(folder):
    """Six questions of two tasks, one of which MMLU has not; one example each."""
    for name in ("virology", "alchemy"):
        write_csv(folder, "dev", name, ROWS[1:])
        rows = [[f"Two and {i}?", "1", "2", "3", "4", "ABCD"[i % 4]] for i in range(6)]
        write_csv(folder, "test", name, rows)
    return folder


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


@pytest.mark.slow
def test_from_files_to_report(models, tmp_path, capsys):
    config = Config(out=tmp_path / "out", data=quiz(tmp_path), shots=1, seed=3, **models)
    found = STUDY.run(config)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["alphas"] == list(ALPHAS)
    assert set(results["accuracy"]) == {"virology", "alchemy"}
    assert all(len(a) == 7 and 0 <= min(a) <= max(a) <= 1 for a in results["accuracy"].values())
    assert [row[0] for row in found.tables[0].rows] == ["other tasks", "other", "all"]
    assert (tmp_path / "out/report.html").is_file()
    assert "Gains by category" in capsys.readouterr().out
    alone = STUDY.run(dataclasses.replace(config, share_prefix=False))
    assert alone.data["accuracy"] == results["accuracy"]
    one = dataclasses.replace(config, out=tmp_path / "one", tasks=("virology",))
    alone = STUDY.run(one)
    assert alone.data["accuracy"]["virology"] == results["accuracy"]["virology"]
    assert alone.claims[1].verdict == "not testable here"


def test_a_category_of_one_task_has_the_task_s_own_interval():
    right = np.zeros((2, 40), bool)
    right[0, :10], right[1] = True, np.arange(40) % 4 > 0
    gain = cross_validate(right, (1.0, 1.1), folds=4)
    table = category_table("Gains", {"virology": gain}, {"virology": "other"})
    assert [row[2] for row in table.rows] == [points(gain.gain)] * 2
    assert [row[4] for row in table.rows] == [f"{gain.p:.3g}"] * 2


def test_one_option_for_every_question_tells_nothing_of_alpha(tmp_path):
    config = Config(out=tmp_path / "out", data=quiz(tmp_path), shots=1)
    tasks = prepare(config)
    picked = {t.name: np.full((len(ALPHAS), len(t.questions)), 2) for t in tasks}
    found = findings(config, tasks, picked)
    assert found.claims[0].verdict == "not testable here"
    assert found.claims[0].measured.startswith("one and the same option")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data=None), "give --data, MMLU's folder or a .jsonl, or --source socialiqa"),
        (dict(source="socialiqa"), "data and source socialiqa: give one of the two"),
        (dict(data=None, source="socialiqa", split="val"), "split is val: Social IQA has test"),
        (dict(tasks=("logic",)), "task 'logic' is not in the data; there are alchemy, virology"),
        (dict(folds=7), "task alchemy: 6 questions are too few for 7 folds"),
        (dict(folds=1), "folds must be 2 or more, not 1"),
        (dict(shots=2), "task alchemy: 1 examples in dev, but 2 shots asked for; lower --shots"),
        (dict(shots=-1), "shots must be 0 or more, not -1"),
        (dict(alphas=(0.9, 1.1)), "give two or more, each once, with 1 among them"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_read(tmp_path, change, message):
    config = Config(out=tmp_path / "out", data=quiz(tmp_path), shots=1, base="no", tuned="no")
    with pytest.raises(InputError, match=message):
        STUDY.run(dataclasses.replace(config, **change))
    assert not (tmp_path / "out").exists()


def test_bad_grids():
    with pytest.raises(InputError, match="they must be finite"):
        check_alphas((1.0, float("nan")))
