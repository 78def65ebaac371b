"""Commands over several processes give what one process gives."""

import dataclasses
import json
import pathlib
import shlex
import shutil
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes import collect, start, together
from tests.tuco.cli_pair import file_options, read_jsonl, save_pair, write_jsonl
from tests.tuco.member import decomposed
from tests.tuco.scoring.test_score_file import killed_after
from tests.tuco.studies.test_over_a_mesh import assert_same, configs
from tests.tuco.tiny import save_tiny
from tuco_jax.cli import main
from tuco_jax.studies.base import command


def prompt(i: int) -> str:
    """One that begins like no other, and is scored by itself."""
    return "".join(np.random.default_rng(i).choice(list(LETTERS), 8)) + "ab c" * (1 + i * 5 % 13)


LETTERS = "abcdefghijklmnop"
ROWS = [{"id": f"p{i}", "prompt": prompt(i)} for i in range(11)]
STATE = ("gcg/search_1", "search.json")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def argv(options: dict, **more) -> list:
    return [x for k, v in {**options, **more}.items() for x in (f"--{k}", v)]


@pytest.mark.parametrize("count, mesh", [(2, {}), (4, {"mesh.fsdp": 2, "mesh.data": 2})])
def test_score(pair, tmp_path, count, mesh):
    options = file_options(pair, tmp_path, ROWS, layers="true", token_budget=256)
    alone = tmp_path / "alone.jsonl"
    assert main(["score", *map(str, argv(options, out=alone))]) == 0
    found = together("tuco_jax.cli", ["score", *argv(options, **mesh)], count)
    assert [bool(one.out) for one in found] == [True] + [False] * (count - 1)
    assert f"process 1 of {count}: process 0 writes and prints the results" in found[1].err
    assert "Gloo" not in found[0].out
    compare(pathlib.Path(options["out"]), alone)
    meta = json.loads(pathlib.Path(options["out"] + ".meta.json").read_text())
    assert meta["device"]["count"] == count and np.prod(list(meta["mesh"].values())) == count
    assert not list(tmp_path.glob(".*")) + list(tmp_path.glob("*.journal"))


def test_int8(pair, tmp_path):
    """Over fsdp, whichever side of a matrix that cuts: no number is read for its scale alone."""
    options = file_options(pair, tmp_path, ROWS[:6], dtype="int8", token_budget=256)
    alone = tmp_path / "alone.jsonl"
    assert main(["score", *map(str, argv(options, out=alone))]) == 0
    runs = [["score", *argv(options, **{"mesh.fsdp": 2})]]
    runs += [["tests.tuco.member:rounded", pair[0], str(tmp_path)]]
    (tmp_path / "runs.json").write_text(json.dumps(runs, default=str))
    together("tests.several", ["tuco-jax", tmp_path / "runs.json"])
    compare(pathlib.Path(options["out"]), alone)
    for i in range(2):
        found = json.loads((tmp_path / f"rounded {i}").read_text())
        assert found["same"] and found["rounded"] == found["numbers"] / 2


def test_generate(pair, tmp_path):
    """With each token's TuCo, which the full decomposition gives."""
    options = file_options(pair, tmp_path, ROWS, alpha=0.6, tuco="true", max_new_tokens=6)
    options |= {"stop": '["q"]', "batch_size": 4, "temperature": 0.7}
    alone = tmp_path / "alone.jsonl"
    assert main(["generate", *map(str, argv(options, out=alone))]) == 0
    together("tuco_jax.cli", ["generate", *argv(options, page=tmp_path / "page.html")])
    compare(pathlib.Path(options["out"]), alone)
    assert "TuCo along the answers" in (tmp_path / "page.html").read_text("utf-8")


def test_finetune_and_runs_that_go_on_with_more_processes(pair, tmp_path, monkeypatch):
    """50 steps, over fsdp; what one process began two go on with, and the other way round."""
    turns = [{"role": r, "content": c} for r, c in (("user", "ab c?"), ("assistant", "ba"))]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 8)
    options = {"base": pair[0], "data": data, "batch": 4, "length": 32, "packing": "false"}
    options |= {"steps": 50, "save_every": 25, "optimizer.learning_rate": 0.001, "lora.rank": 2}
    alone, begun, out = (tmp_path / name for name in ("alone", "begun", "two"))
    assert main(["finetune", *map(str, argv(options, out=alone))]) == 0
    shutil.copytree(alone, begun)
    cut_back(begun)
    scores = file_options(pair, tmp_path, ROWS, token_budget=64)
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        assert main(["score", *map(str, argv(scores))]) == 130
    journaled = len(pathlib.Path(scores["out"] + ".journal").read_bytes().splitlines()) - 1

    runs = [["finetune", *argv(options, out=out, **{"mesh.fsdp": 2})]]
    runs += [["finetune", *argv(options, out=begun, resume="true")], ["score", *argv(scores)]]
    (tmp_path / "runs.json").write_text(json.dumps(runs, default=str))
    together("tests.several", ["tuco-jax", tmp_path / "runs.json"])
    check_finetuned(out, alone)
    check_finetuned(begun, alone)
    meta = json.loads(pathlib.Path(scores["out"] + ".meta.json").read_text())
    assert journaled == 3 and 3 <= meta["resumed_rows"] < len(ROWS)  # batches, and their rows
    assert main(["score", *map(str, argv(scores, out=tmp_path / "alone.jsonl"))]) == 0
    compare(pathlib.Path(scores["out"]), tmp_path / "alone.jsonl")

    cut_back(out)
    assert main(["finetune", *map(str, argv(options, out=out, resume="true"))]) == 0
    check_finetuned(out, alone)


def cut_back(run: pathlib.Path) -> None:
    """To what a run has that is killed between its last checkpoint but one and the last."""
    shutil.rmtree(run / "checkpoints" / "50")
    shutil.rmtree(run / "adapter")


def check_finetuned(out: pathlib.Path, alone: pathlib.Path) -> None:
    losses = [[row["loss"] for row in read_jsonl(p / "metrics.jsonl")] for p in (out, alone)]
    assert len(losses[0]) == 50
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)
    got, want = (load_file(p / "adapter/adapter_model.safetensors") for p in (out, alone))
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)


def test_scores_go_on_with_another_number_of_processes(pair, tmp_path):
    """One of two is killed; the other says which, and one process ends the work."""
    rows = [{"id": i, "prompt": prompt(i)} for i in range(600)]
    options = file_options(pair, tmp_path, rows, token_budget=128)
    journal = pathlib.Path(options["out"] + ".journal")
    with start("tuco_jax.cli", ["score", *argv(options)], 2) as begun:
        while not journal.exists() or len(journal.read_bytes().splitlines()) < 3:
            assert begun[1].process.poll() is None
            time.sleep(0.01)
        begun[1].process.kill()
        (left,) = collect(begun[:1])
    assert left.code == 1 and "process 1 was lost" in left.err
    written = len(journal.read_bytes().splitlines()) - 1
    assert main(["score", *map(str, argv(options))]) == 0
    meta = json.loads(pathlib.Path(options["out"] + ".meta.json").read_text())
    assert written > 1 and meta["rows"] == len(rows) and meta["resumed_rows"] >= written
    alone = tmp_path / "alone.jsonl"
    assert main(["score", *map(str, argv(options, out=alone))]) == 0
    compare(pathlib.Path(options["out"]), alone)


def test_attacks_and_decompositions(tmp_path):
    """In one start: a search by gradients, the studies that score attacks, and `decompose`."""
    models = {}
    for name, seed in (("base", 0), ("tuned", 1)):
        save_tiny(tmp_path / name, "llama", seed, max_position_embeddings=512)
        models[name] = str(tmp_path / name)
    folders = {name: tmp_path / name for name in ("one", "two")}
    runs: dict[str, list[list[str]]] = {name: [] for name in folders}
    every = configs(tmp_path)
    for study in ("gcg", "conjugate"):
        config = dataclasses.replace(every[study], **models)
        argv = shlex.split(command(study, config))[1:]
        for name, folder in folders.items():
            runs[name].append([*argv, "--out", str(folder / study)])
    decomposed(str(tmp_path / "one.npz"), "11")
    runs["two"].append(["tests.tuco.member:decomposed", str(tmp_path / "two.npz"), "12"])
    assert [main(argv) for argv in runs["one"]] == [0, 0]
    (tmp_path / "runs.json").write_text(json.dumps(runs["two"]))
    together("tests.several", ["tuco-jax", tmp_path / "runs.json"])

    for study, file in (("gcg", "results.json"), ("conjugate", "results.json"), STATE):
        got, want = (json.loads((f / study / file).read_text()) for f in folders.values())
        for unlike in ("facts", "searches", "seconds"):  # the command, the mesh and times
            assert (got.pop(unlike, None) is None) == (want.pop(unlike, None) is None)
        assert_same(got, want, study)
    got, want = (np.load(tmp_path / f"{name}.npz") for name in ("two", "one"))
    assert set(got) == set(want) and len(want) == 6
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5, err_msg=name)


def compare(path: pathlib.Path, other: pathlib.Path) -> None:
    """Equal rows in the same order, numbers within 1e-5."""
    mine, theirs = read_jsonl(path), read_jsonl(other)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name], name)
