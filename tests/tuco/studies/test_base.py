"""The contract of a study and its runner, on a study made up here."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from common_jax import resume
from common_jax.errors import InputError
from common_jax.report.findings import Findings
from tests.tuco.cli_pair import save_pair
from tuco_jax.studies.base import Study, StudyOptions
from tuco_jax.studies.catalog import STUDIES, load_study


@dataclasses.dataclass(frozen=True)
class Config(StudyOptions):
    """Count.

    Args:
        words: to count.
    """

    words: tuple[str, ...] = ()


def prepare(config: Config) -> list[str]:
    if "" in config.words:
        raise InputError("words hold an empty one")
    return list(config.words)


def measure(pair: Any, tokenizer: Any, config: Config, words: list[str]) -> list[int]:
    assert config.out.is_dir() and pair.context == 64
    return [len(tokenizer(word)["input_ids"]) for word in words]


def findings(config: Config, words: list[str], measured: list[int] | None) -> Findings:
    facts = {"words": ", ".join(words)}
    return Findings("Words", ["So."], [], [], [], ["How."], [], facts, {"lengths": measured})


STUDY = Study(Config, prepare, measure, findings)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return dict(zip(("base", "tuned"), save_pair(tmp_path_factory.mktemp("pair")), strict=True))


def test_a_run_measures_and_writes_with_the_facts_of_the_run(models, tmp_path, capsys):
    config = Config(("tea", "to"), out=tmp_path / "new" / "out", seed=3, **models)
    found = STUDY.run(config)
    data = json.loads((config.out / "results.json").read_text())
    assert data["lengths"] == [4, 3]  # a BOS and a token a letter
    assert list(data["facts"])[:3] == ["base", "tuned", "weights"]
    assert list(data["facts"])[-4:] == ["words", "seed", "command", "run time"]
    assert data["facts"]["seed"] == "3" == found.facts["seed"]
    assert data["facts"]["command"].startswith("tuco-jax study test-base --base ")
    assert data["facts"]["command"].endswith("""--seed 3 --words '["tea", "to"]'""")
    note = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("note: "))
    assert data["facts"]["notes on the pair"].startswith(note.removeprefix("note: "))


def test_nothing_is_written_or_loaded_before_the_inputs_are_right(tmp_path):
    with pytest.raises(InputError, match="words hold an empty one"):
        STUDY.run(Config(("",), out=tmp_path / "out", base="nowhere"))
    assert not (tmp_path / "out").exists()


def test_without_inputs_no_model_is_loaded(tmp_path):
    STUDY.run(Config(out=tmp_path / "out", base="nowhere"))
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert data["lengths"] is None and "base" not in data["facts"]


def test_a_folder_that_another_run_writes_to_is_refused_before_a_model_is_loaded(tmp_path):
    with resume.alone(tmp_path), pytest.raises(InputError, match="another run is writing there"):
        STUDY.run(Config(("tea",), out=tmp_path, base="nowhere"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_the_name_of_its_module(name):
    study = load_study(name)
    assert study.name == name
    assert [f.name for f in dataclasses.fields(study.config)][:6] == [
        f.name for f in dataclasses.fields(StudyOptions)
    ]
    assert study.config.__annotations__.get("out", pathlib.Path) is pathlib.Path
