"""Agreement with behaviours, maximised and minimised, from files to report."""

import dataclasses
import json

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.datasets.test_multiple_choice import BEHAVIOUR, write_jsonl
from tests.tuco.tiny import save_tiny
from tuco_jax.studies.alpha_mwe import CATEGORIES, STUDY, Config, category, findings, prepare


def behaviours(folder):
    """Two behaviours of the same statements, whose matching answers are each other's opposite."""
    folder.mkdir()
    for name, first in (("agreeableness", 0), ("patience", 1)):
        rows = []
        for i in range(8):
            answers = (" Yes", " No") if (i + first) % 2 else (" No", " Yes")
            fields = "answer_matching_behavior", "answer_not_matching_behavior"
            row = BEHAVIOUR | dict(zip(fields, answers, strict=True))
            rows.append(row | {"question": f"Would you say {i * i}?"})
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def test_23_behaviours():
    names = [name for members in CATEGORIES.values() for name in members]
    assert len(names) == len(set(names)) == 23
    assert category("narcissism") == "personality"
    assert category("patience") == "other tasks"


def test_from_files_to_report(tmp_path):
    models = {}
    for seed, name in enumerate(("base", "tuned")):
        save_tiny(tmp_path / name, "llama", seed)
        models[name] = str(tmp_path / name)
    data = behaviours(tmp_path / "data")
    found = STUDY.run(Config(data=data, out=tmp_path / "out", folds=4, **models))
    results = json.loads((tmp_path / "out/results.json").read_text())
    both = [results["agreement"][name] for name in ("agreeableness", "patience")]
    assert [a + b for a, b in zip(*both, strict=True)] == pytest.approx([1.0] * 7)
    up, down = results["maximised"], results["minimised"]
    # What maximises one minimises the other.
    assert up["agreeableness"]["gain"][0] == pytest.approx(-down["patience"]["gain"][0])
    assert up["agreeableness"]["chosen"] == down["patience"]["chosen"]
    assert [c.paper for c in found.claims] == ["+1.55 to +5.18%", "-2.80 to -25.24%"]
    assert (tmp_path / "out/agreement.svg").is_file()
    picks = next(t for t in found.tables if t.title == "Options picked")
    assert list(picks.columns) == ["share", "Yes", "No"]
    assert all(row[1] + row[2] == pytest.approx(1) for row in picks.rows)


def test_one_answer_to_every_statement_tells_nothing_of_alpha(tmp_path):
    config = Config(data=behaviours(tmp_path / "data"), out=tmp_path / "out", folds=4)
    tasks = prepare(config)
    found = findings(config, tasks, {t.name: np.zeros((7, len(t.questions)), int) for t in tasks})
    assert {c.verdict for c in found.claims} == {"not testable here"}
    assert found.claims[0].measured.startswith("one and the same option")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tasks=("anger",)), "task 'anger' is not in the data"),
        (dict(limit=3), "task agreeableness: 3 questions are too few for 5 folds"),
        (dict(limit=-1), "limit must be 0 or more, not -1"),
        (dict(alphas=(1.0,)), "with 1 among them"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_read(tmp_path, change, message):
    data = behaviours(tmp_path / "data")
    config = Config(data=data, out=tmp_path / "out", base="no", tuned="no")
    with pytest.raises(InputError, match=message):
        STUDY.run(dataclasses.replace(config, **change))
    assert not (tmp_path / "out").exists()
