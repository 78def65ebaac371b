"""Choosing alpha by folds, and the study from files to report."""

import dataclasses
import json

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.datasets.test_multiple_choice import ROWS, write_csv
from tuco_jax.core.alpha_grid import PAPER_GRID as ALPHAS
from tuco_jax.studies.alpha_mmlu import CATEGORIES, STUDY, Config, category, findings, prepare


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
