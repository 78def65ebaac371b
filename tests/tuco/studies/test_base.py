"""The contract of a study and its runner, on a study made up here."""

import dataclasses
import importlib.metadata
import json
import pathlib
import re
import shutil
from typing import Any, NamedTuple

import pytest

from common_jax import resume
from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError
from common_jax.journal import Sections
from common_jax.report.findings import Findings
from tests.tuco.cli_pair import save_pair
from tests.tuco.interrupted import computed, killed_after
from tuco_jax.studies.base import Study, StudyOptions
from tuco_jax.studies.catalog import STUDIES, load_study


@dataclasses.dataclass(frozen=True)
class Config(StudyOptions):
    """Count.

    Args:
        texts: to count.
    """

    texts: tuple[str, ...] = ()


def prepare(config: Config) -> list[str]:
    if "" in config.texts:
        raise InputError("texts hold an empty one")
    return list(config.texts)


class Count(NamedTuple):
    """The tokens of a text."""

    rows: list[int]
    length: int


def measure(
    pair: Any, tokenizer: Any, config: Config, texts: list[str], journal: Sections
) -> list[int]:
    assert config.out.is_dir() and pair.context == 64
    counts = journal.section("texts", "key", lambda record: Count(*record))
    lengths = {count.rows[0]: count.length for count in counts.entries}
    for i, text in enumerate(texts):
        if i not in lengths:
            lengths[i] = len(tokenizer(text)["input_ids"])
            counts.append(Count([i], lengths[i]))
    return [lengths[i] for i in range(len(texts))]


def findings(config: Config, texts: list[str], measured: list[int] | None) -> Findings:
    facts = {"texts": ", ".join(texts)}
    return Findings("Texts", ["So."], [], [], [], ["How."], [], facts, {"lengths": measured})


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
    assert list(data["facts"])[-4:] == ["texts", "seed", "command", "run time"]
    assert data["facts"]["seed"] == "3" == found.facts["seed"]
    assert data["facts"]["command"].startswith("tuco-jax study test-base --base ")
    assert data["facts"]["command"].endswith("""--seed 3 --texts '["tea", "to"]'""")
    note = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("note: "))
    assert data["facts"]["notes on the pair"].startswith(note.removeprefix("note: "))


def test_nothing_is_written_or_loaded_before_the_inputs_are_right(tmp_path):
    with pytest.raises(InputError, match="texts hold an empty one"):
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


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_folder_holds_one_study_with_one_set_of_options(tmp_path):
    out = tmp_path / "out"
    STUDY.run(Config(out=out))
    before = contents(out)
    other = load_study("conjugate")
    for study, config, difference in (
        (STUDY, Config(out=out, seed=1), "seed 0, not 1"),
        (STUDY, Config(("tea",), out=out), "texts [], not ['tea']"),
        (STUDY, Config(out=out, dtype="bfloat16"), "dtype 'float32', not 'bfloat16'"),
        (other, other.config(out=out), "study 'test-base', not 'conjugate'"),
    ):
        line = f"out: the run there has {difference}; give the same settings, or name a new"
        with pytest.raises(InputError, match=re.escape(line)):
            study.run(config)
        assert contents(out) == before
    # The same options: it is done anew. Over how many devices is no matter.
    (out / "report.html").unlink()
    STUDY.run(Config(out=out, mesh=MeshOptions(data=2)))
    assert contents(out).keys() == before.keys()


@pytest.mark.parametrize("name", ["results.json", "settings.json"])
def test_a_folder_of_something_else_is_refused(tmp_path, name):
    """What came before settings were stored, and another command's run."""
    (tmp_path / name).write_text('{"steps": 3}')
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"holds (no run|something else); name a new directory"):
        STUDY.run(Config(out=tmp_path))
    assert contents(tmp_path) == before


def test_options_with_which_nothing_was_measured_are_no_obstacle(models, tmp_path):
    config = Config(("tea",), out=tmp_path / "out", **models)
    with pytest.raises(InputError, match="nowhere"):
        STUDY.run(dataclasses.replace(config, base="nowhere"))
    assert not any(config.out.iterdir())
    STUDY.run(config)
    assert (config.out / "results.json").exists()


def test_what_a_killed_run_left_is_for_the_same_options_alone(models, tmp_path):
    def killed(*given: Any) -> Any:
        (given[2].out / "half.json").write_text("{}")
        raise KeyboardInterrupt

    config = Config(("tea",), out=tmp_path / "out", **models)
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(STUDY, measure=killed).run(config)
    with pytest.raises(InputError, match="the run there has seed 0, not 1"):
        STUDY.run(dataclasses.replace(config, seed=1))
    STUDY.run(config)
    assert {"half.json", "results.json"} <= contents(config.out).keys()


def test_what_a_killed_run_measured_is_not_measured_again(models, tmp_path, monkeypatch):
    """By the version that measured it; for other options another folder is to be named."""
    config = Config(("tea", "to", "a"), out=tmp_path / "out", **models)
    journal = config.out / "journal"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(patch, 2)
        STUDY.run(config)
    before = contents(config.out)
    assert before.keys() == {"journal", "settings.json"}
    with pytest.raises(InputError, match="the run there has seed 0, not 1"):
        STUDY.run(dataclasses.replace(config, seed=1))
    version = importlib.metadata.version
    with monkeypatch.context() as patch:
        newer = {"tuco-reward-jax": "9.9.9"}
        patch.setattr(importlib.metadata, "version", lambda n: newer.get(n) or version(n))
        with pytest.raises(
            InputError, match=f"{journal}: holds the work of .* of another version"
        ):
            STUDY.run(config)
    assert contents(config.out) == before
    with monkeypatch.context() as patch:
        found = computed(patch)
        STUDY.run(config)
    assert found == [Count([2], 2)] and not journal.exists()
    assert json.loads((config.out / "results.json").read_text())["lengths"] == [4, 3, 2]


def test_a_folder_of_results_is_of_the_same_weights(models, tmp_path):
    """Though their folder has the same name."""
    for name, folder in models.items():
        shutil.copytree(folder, tmp_path / name)
    config = Config(
        ("tea",), out=tmp_path / "out", base=str(tmp_path / "base"), tuned=str(tmp_path / "tuned")
    )
    STUDY.run(config)
    STUDY.run(config)
    shutil.rmtree(tmp_path / "tuned")
    shutil.copytree(models["base"], tmp_path / "tuned")
    with pytest.raises(InputError, match=r"the run there has weights \(their checksum\) '"):
        STUDY.run(config)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_the_name_of_its_module(name):
    study = load_study(name)
    assert study.name == name
    every = [f.name for f in dataclasses.fields(StudyOptions)]
    assert [f.name for f in dataclasses.fields(study.config)][: len(every)] == every
    assert study.config.__annotations__.get("out", pathlib.Path) is pathlib.Path
