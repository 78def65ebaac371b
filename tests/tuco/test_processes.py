"""Commands over two and over four processes give what one process gives.

All of a group run one after another in one start of its processes; what one process makes of the
same commands is made once, for both groups.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
import shlex
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from common_jax.journal import Journal
from tests.processes import Ended, Group, collect, in_one_start, start
from tests.tuco import random_models as rm
from tests.tuco.cli_pair import file_options, read_jsonl, save_pair, write_jsonl
from tests.tuco.interrupted import killed_after as interrupted_after
from tests.tuco.member import decomposed
from tests.tuco.scoring.test_score_file import killed_after
from tests.tuco.studies.test_over_a_mesh import assert_same, configs
from tests.tuco.tiny import save_tiny
from tests.tuco.tiny_dora import save_dora
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.cli import main
from tuco_jax.studies.base import command
from tuco_jax.weights.load import load_pair, model_config


def text(seed: int, length: int) -> str:
    return "".join(np.random.default_rng(seed).choice(list("abcdefghijklmnop"), length))


def prompt(i: int) -> str:
    """One that begins like no other, and is scored by itself."""
    return text(i, 8) + "ab c" * (1 + i * 5 % 13)


def turns(i: int) -> list[dict[str, str]]:
    """A conversation like no other, as long as any."""
    said = ("user", text(i, 5)), ("assistant", text(100 + i, 3))
    return [{"role": role, "content": content} for role, content in said]


MESHES: dict[int, dict[str, int]] = {1: {}, 2: {}, 4: {"mesh.data": 2, "mesh.fsdp": 2}}
# Answers, and full tuning: fsdp and tensor, too, lie between processes.
ANSWERING = MESHES | {4: {"mesh.fsdp": 2, "mesh.tensor": 2}}
SHARDED = ANSWERING | {2: {"mesh.fsdp": 2}}
STUDIES = ("gcg", "conjugate")
RESULTS = {name: f"{name}/results.json" for name in STUDIES}
RESULTS["state"] = "gcg/search_1/search.json"


def argv(options: dict[str, Any], **more: Any) -> list[str]:
    return [str(x) for k, v in {**options, **more}.items() for x in (f"--{k}", v)]


def commands(made: pathlib.Path, out: pathlib.Path, count: int) -> dict[str, list[str]]:
    """Each by what it writes to the folder `out`."""
    mesh, base = MESHES[count], {"base": made / "base"}
    pair = base | {"tuned": made / "tuned", "prompts": made / "prompts.jsonl"}
    answers = {"alpha": 0.6, "tuco": "true", "max_new_tokens": 6, "stop": '["q"]'}
    answers |= {"batch_size": 4, "temperature": 0.7, **ANSWERING[count]}
    tuning = {"data": made / "rows.jsonl", "batch": 4, "length": 32, "packing": "false"}
    tuning |= {"steps": 50, "save_every": 25, "optimizer.learning_rate": 0.001, "lora.rank": 2}
    full = tuning | {"method": "full", "steps": 2, "save_every": 2, **SHARDED[count]}
    scored = pair | {"layers": "true", "token_budget": 256}
    int8 = scored | {"dtype": "int8", "mesh.fsdp": count}
    return {
        "scores.jsonl": ["score", *argv(scored, **mesh)],
        "begun.jsonl": ["score", *argv(scored | {"token_budget": 64}, **mesh)],
        "int8.jsonl": ["score", *argv(int8)],
        "answers.jsonl": ["generate", *argv(pair | answers, page=out / "page.html")],
        "begun answers.jsonl": ["generate", *argv(pair | answers)],
        "tuned": ["finetune", *argv(base | tuning, **mesh)],
        "full": ["finetune", *argv(base | full)],
        "store": ["import", *argv({"model": made / "base", "tuned": made / "tuned"})],
    }


def in_folder(out: pathlib.Path, given: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: [*line, "--out", str(out / name)] for name, line in given.items()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Of a pair with room for attacks, each by its name."""
    made, models = tmp_path_factory.mktemp("studied"), {}
    for name, seed in (("base", 0), ("tuned", 1)):
        save_tiny(made / name, "llama", seed, max_position_embeddings=512)
        models[name] = str(made / name)
    every = configs(made)
    found = {name: dataclasses.replace(every[name], **models) for name in STUDIES}
    return {name: shlex.split(command(name, config))[1:] for name, config in found.items()}


def begun(studies: dict[str, list[str]]) -> dict[str, list[str]]:
    """The study that one process begins, and several go on with."""
    return {"begun study": studies["conjugate"]}


@pytest.fixture(scope="module")
def alone(pair, studies, tmp_path_factory):
    """What one process makes, and journals that it left, of a study, too."""
    made = pathlib.Path(pair[0]).parent
    write_jsonl(made / "prompts.jsonl", [{"id": f"p{i}", "prompt": prompt(i)} for i in range(11)])
    write_jsonl(made / "rows.jsonl", [{"messages": turns(i)} for i in range(8)])
    save_dora(made / "dora", config := model_config(made / "base"), rm.lora(config, 3))
    save_tiny(made / "other", "llama", 2)
    bos_tokenizer().save_pretrained(made / "other")
    out = tmp_path_factory.mktemp("alone")
    given = in_folder(out, commands(made, out, 1) | studies | begun(studies))
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 3)
        assert main(given.pop("begun.jsonl")) == 130
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(patch, 2)
        assert main(given.pop("begun answers.jsonl")) == 130
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(patch, 1)
        assert main(given.pop("begun study")) == 130
    assert [main(line) for line in given.values()] == [0] * len(given)
    decomposed(str(out / "decomposed.npz"), "11")
    return out


@pytest.fixture(scope="module", params=[2, 4])
def group(request, pair, studies, alone, tmp_path_factory):
    """Over several processes, with a fine-tuning, scores and a study that one has begun."""
    count, made = request.param, pathlib.Path(pair[0]).parent
    out = tmp_path_factory.mktemp(f"of {count}")
    every = studies | begun(studies)
    over = {name: [*line, *argv(MESHES[count])] for name, line in every.items()}
    given = in_folder(out, commands(made, out, count) | over)
    for journal in ("begun.jsonl.journal", "begun answers.jsonl.journal"):
        shutil.copy(alone / journal, out / journal)
    shutil.copytree(alone / "begun study", out / "begun study")
    shutil.copytree(alone / "tuned", out / "begun")
    cut_back(out / "begun")
    runs = [*given.values()]
    runs += [[*given["tuned"], "--out", str(out / "begun"), "--resume", "true"]]
    runs += [["tests.tuco.member:rounded", pair[0], str(out)]]
    runs += [["tests.tuco.member:behind", str(out)]]
    runs += [["tests.tuco.member:edited", pair[0], made / "dora"]]
    sizes = "21" if count == 2 else "22"
    runs += [["tests.tuco.member:where_parts_pay"], ["tests.tuco.member:old_news", str(out)]]
    runs += [["tests.tuco.member:refused", *pair, str(made / "other"), str(out), sizes]]
    sizes = "12" if count == 2 else "22"
    runs += [["tests.tuco.member:decomposed", str(out / "decomposed.npz"), sizes]]
    return Group(count, in_one_start("tuco-jax", runs, out, count), out, alone)


def test_score(group):
    out, count = group.out / "scores.jsonl", group.count
    compare(out, group.alone / "scores.jsonl")
    meta = json.loads(pathlib.Path(f"{out}.meta.json").read_text())
    assert meta["device"]["count"] == count and np.prod(list(meta["mesh"].values())) == count
    assert not list(group.out.glob(".*")) + list(group.out.glob("*.journal"))
    printed = [bool(one.out) for one in group.ended]
    assert printed == [True] + [False] * (count - 1) and "Gloo" not in group.ended[0].out
    for i, one in enumerate(group.ended[1:], 1):
        assert f"process {i} of {count}: process 0 writes and prints the results" in one.err


def test_scores_that_one_process_began(group):
    """Three batches, which stand in its journal."""
    done = journaled(group.alone / "begun.jsonl.journal")
    meta = json.loads((group.out / "begun.jsonl.meta.json").read_text())
    assert len(done) == 3 and meta["resumed_rows"] == sum(map(len, done)) < meta["rows"] == 11
    compare(group.out / "begun.jsonl", group.alone / "scores.jsonl")


def test_files_that_are_not_the_same_for_all(group):
    """Which `tests.tuco.member:refused` has seen in every process."""
    for one in group.ended:
        assert "several: tests.tuco.member:refused" in one.err


def test_precision_is_one_for_all(group):
    """Also where one process's device would take another."""
    for one in group.ended:
        assert "several: tests.tuco.member:where_parts_pay" in one.err


def test_a_disk_that_some_see_late(group):
    for one in group.ended:
        for name in ("old_news", "behind"):
            assert f"several: tests.tuco.member:{name}" in one.err


def test_options_that_are_not_the_same_for_all(tmp_path):
    """In one line, in both, before any file is looked for."""
    given = {name: tmp_path / name for name in ("base", "tuned", "prompts", "out")}
    with start("tuco_jax.cli", ["score", *argv(given)], 2, [["--norm=1"], ["--norm=2"]]) as begun:
        ended = collect(begun)
    said = "process 1 was started with norm 2, process 0 with norm 1: give all the same options"
    assert_refused(ended, said)


@pytest.mark.parametrize("package", ["tuco-reward-jax", "jax"])
def test_versions_that_are_not_the_same_for_all(package, tmp_path):
    """Likewise."""
    given = {name: tmp_path / name for name in ("base", "tuned", "prompts", "out")}
    with start("tests.tuco.outdated", [package, "score", *argv(given)], 2) as begun:
        ended = collect(begun)
    mine = f"{package} {importlib.metadata.version(package)}"
    said = f"process 1 was started with {package} 0.0.1, process 0 with {mine}: install the same"
    assert_refused(ended, f"{said} versions for all")


def assert_refused(ended: list[Ended], said: str) -> None:
    """All in the same line, and nothing else went wrong."""
    assert len(ended) == 2
    for one in ended:
        lines = [line for line in one.err.splitlines() if "error" in line or "ended" in line]
        assert one.code == 2 and lines == [f"tuco-jax: error: {said}"], one


def test_int8(group):
    """Over fsdp, whichever side of a matrix that cuts: no number is read for its scale alone."""
    compare(group.out / "int8.jsonl", group.alone / "int8.jsonl")
    for i in range(group.count):
        found = json.loads((group.out / f"rounded {i}").read_text())
        assert found["same"] and found["rounded"] == found["numbers"] / group.count


def test_adapters_that_edit_weights(group):
    """Which `tests.tuco.member:edited` has seen in every process."""
    for one in group.ended:
        assert "several: tests.tuco.member:edited" in one.err


def test_import(group):
    """A pair's store, which each process writes its share of."""
    stores = [str(folder / "store") for folder in (group.out, group.alone)]
    got, want = (load_pair(store, store)[0] for store in stores)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got.notes == want.notes
    written = [
        sum(path.stat().st_size for path in folder.rglob("*"))
        for folder in (group.out / "store" / "params").glob("ocdbt.process_*")
    ]
    assert len(written) == group.count and max(written) < 1.2 * sum(written) / group.count


def test_decompose(group):
    """Of a mixture of experts and of a dense pair, every layer's parts and the logits."""
    got, want = (np.load(folder / "decomposed.npz") for folder in (group.out, group.alone))
    assert set(got) == set(want) and len(want) == 6
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-5, err_msg=name)


def test_generate(group):
    """With each token's TuCo, which the full decomposition gives."""
    compare(group.out / "answers.jsonl", group.alone / "answers.jsonl")
    assert "TuCo along the answers" in (group.out / "page.html").read_text("utf-8")
    meta = json.loads((group.out / "answers.jsonl.meta.json").read_text())
    assert meta["resumed_rows"] == 0
    assert group.count == 2 or meta["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}


def test_answers_that_one_process_began(group):
    """Two batches of four, which stand in its journal."""
    meta = json.loads((group.out / "begun answers.jsonl.meta.json").read_text())
    assert meta["resumed_rows"] == 8
    compare(group.out / "begun answers.jsonl", group.alone / "answers.jsonl")
    assert not list(group.out.glob("*.journal"))


def test_studies(group):
    """A search by gradients, with the state that it goes on from, and a study that scores."""
    for name, file in RESULTS.items():
        compare_results(group.out / file, group.alone / file, name)


def test_a_study_that_one_process_began(group):
    """Its scores, which stand in its journal."""
    (line,) = (group.alone / "begun study/journal").read_bytes().splitlines()[1:]
    rows = json.loads(line)[1][0]
    folder, want = group.out / "begun study", group.alone / RESULTS["conjugate"]
    said = f"note: {len(rows)} scores are done: {folder / 'journal'}\n"
    assert [one.err.count(said) for one in group.ended] == [1] + [0] * (group.count - 1)
    compare_results(folder / "results.json", want, "begun study")
    assert not (folder / "journal").exists()


def compare_results(path: pathlib.Path, other: pathlib.Path, name: str) -> None:
    """Equal, but for the command, the mesh and times."""
    got, want = (json.loads(p.read_text()) for p in (path, other))
    for unlike in ("facts", "searches", "seconds"):
        assert (got.pop(unlike, None) is None) == (want.pop(unlike, None) is None)
    assert_same(got, want, name, rel=0)


def test_finetune(group, pair):
    """50 steps; what one process began several go on with, and the other way round."""
    alone, out = group.alone / "tuned", group.out / "tuned"
    check_finetuned(out, alone)
    check_finetuned(group.out / "begun", alone)
    cut_back(out)
    again = commands(pathlib.Path(pair[0]).parent, group.out, 1)["tuned"]
    assert main([*again, "--out", str(out), "--resume", "true"]) == 0
    check_finetuned(out, alone)


def test_full_finetune(group, pair):
    """All parameters over fsdp and tensor, and the model that comes of it."""
    runs = group.out / "full", group.alone / "full"
    losses = [[row["loss"] for row in read_jsonl(run / "metrics.jsonl")] for run in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-5)
    got, want = (load_file(run / "model/model.safetensors") for run in runs)
    before = load_file(pathlib.Path(pair[0]) / "model.safetensors")
    assert got.keys() == want.keys() == before.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(want[name] - before[name]).max() > 1e-4, name


def cut_back(run: pathlib.Path) -> None:
    """To what a run has that is killed between its last checkpoint but one and the last."""
    shutil.rmtree(run / "checkpoints" / "50")
    shutil.rmtree(run / "adapter")


def check_finetuned(out: pathlib.Path, alone: pathlib.Path) -> None:
    losses = [[row["loss"] for row in read_jsonl(p / "metrics.jsonl")] for p in (out, alone)]
    assert len(losses[0]) == 50
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=1e-5)
    got, want = (load_file(p / "adapter/adapter_model.safetensors") for p in (out, alone))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-5, err_msg=name)


def test_scores_go_on_with_another_number_of_processes(pair, tmp_path, monkeypatch):
    """One of two is killed; the other says which; one ends the work, and computes none again."""
    rows = [{"id": i, "prompt": prompt(i)} for i in range(600)]
    options = file_options(pair, tmp_path, rows, token_budget=128)
    journal = pathlib.Path(options["out"] + ".journal")
    with start("tests.tuco.lost", ["score", *argv(options)], 2) as begun:
        left, killed = collect(begun)
    assert left.code == 1 and "process 1 was lost" in left.err and killed.code == -signal.SIGKILL
    done = journaled(journal)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", Journal.close)
        assert main(["score", *argv(options)]) == 0
    assert sorted(itertools.chain(*journaled(journal))) == [row["id"] for row in rows]
    meta = json.loads(pathlib.Path(options["out"] + ".meta.json").read_text())
    assert len(done) > 1 and meta["rows"] == len(rows)
    assert meta["resumed_rows"] == sum(map(len, done))
    journal.unlink()
    alone = tmp_path / "alone.jsonl"
    assert main(["score", *argv(options, out=alone)]) == 0
    compare(pathlib.Path(options["out"]), alone)


def journaled(path: pathlib.Path) -> list[list[int]]:
    """The prompts of each batch of scores in a journal."""
    return [json.loads(line)[1][0] for line in path.read_bytes().splitlines()[1:]]


def compare(path: pathlib.Path, other: pathlib.Path) -> None:
    """Equal rows in the same order, numbers within 1e-5."""
    mine, theirs = read_jsonl(path), read_jsonl(other)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name], name, rel=0)
