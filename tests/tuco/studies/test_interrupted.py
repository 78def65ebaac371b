"""Every study, killed in the midst of its measuring: it goes on, and loses a batch at most."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from common_jax.errors import InputError
from tests.tuco.interrupted import computed, killed_after
from tests.tuco.studies.test_over_a_mesh import configs, groups
from tuco_jax.studies import floors
from tuco_jax.studies.catalog import STUDIES, load_study

QUICK = ("broken", "floors", "alpha-mwe")  # between them all that studies call


def results(out: pathlib.Path) -> str:
    """What a study leaves, without what tells the time."""
    found = json.loads((out / "results.json").read_text())
    found["facts"].pop("run time")
    for search in found.get("searches", ()):
        search.pop("seconds")
    return json.dumps(found)


def batches(entries: list[Any]) -> list[Any]:
    return [(type(entry), entry.rows) for entry in entries]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in STUDIES]
)
def test_it_goes_on_to_the_same_results(name, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(floors, "prompt_groups", lambda count, seed: groups())
    for module in ("scoring.score", "evaluation.baselines", "evaluation.option_scores"):
        monkeypatch.setattr(f"tuco_jax.{module}.default_budget", lambda: 128)
    study, config = load_study(name), dataclasses.replace(configs(tmp_path)[name], **models)
    with monkeypatch.context() as patch:
        every = computed(patch)
        study.run(config)
    assert len(every) > 1 and not (config.out / "journal").exists()
    config = dataclasses.replace(config, out=tmp_path / "killed")
    done = 2 * len(every) // 3
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(patch, done)
        study.run(config)
    journal = config.out / "journal"
    assert len(journal.read_bytes().splitlines()) == 1 + done
    assert not (config.out / "results.json").exists()
    with pytest.raises(InputError, match="the run there has seed"):
        study.run(dataclasses.replace(config, seed=7))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        rest = computed(patch)
        study.run(config)
    assert batches(rest) == batches(every[done:])
    assert f"are done: {journal}" in capsys.readouterr().err
    assert results(config.out) == results(tmp_path / "one")
    assert not journal.exists()
