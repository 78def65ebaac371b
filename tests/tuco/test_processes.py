"""Commands over several processes give what one process gives."""

import json
import pathlib
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.processes import collect, start, together
from tests.tuco.cli_pair import file_options, read_jsonl, save_pair, write_jsonl
from tests.tuco.studies.test_over_a_mesh import assert_same
from tuco_jax.cli import main

ROWS = [{"id": f"p{i}", "prompt": "ab c" * (1 + i * 5 % 13)} for i in range(11)]


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


def test_generate(pair, tmp_path):
    """With each token's TuCo, which the full decomposition gives."""
    options = file_options(pair, tmp_path, ROWS, alpha=0.6, tuco="true", max_new_tokens=6)
    options |= {"stop": '["q"]', "batch_size": 4, "temperature": 0.7}
    alone = tmp_path / "alone.jsonl"
    assert main(["generate", *map(str, argv(options, out=alone))]) == 0
    together("tuco_jax.cli", ["generate", *argv(options, page=tmp_path / "page.html")])
    compare(pathlib.Path(options["out"]), alone)
    assert "TuCo along the answers" in (tmp_path / "page.html").read_text("utf-8")


def test_finetune(pair, tmp_path):
    """50 steps, over fsdp."""
    turns = [{"role": r, "content": c} for r, c in (("user", "ab c?"), ("assistant", "ba"))]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}] * 8)
    options = {"base": pair[0], "data": data, "batch": 4, "length": 32, "packing": "false"}
    options |= {"steps": 50, "save_every": 25, "optimizer.learning_rate": 0.001, "lora.rank": 2}
    alone, out = tmp_path / "alone", tmp_path / "two"
    assert main(["finetune", *map(str, argv(options, out=alone))]) == 0
    together("tuco_jax.cli", ["finetune", *argv(options, out=out, **{"mesh.fsdp": 2})])
    check_finetuned(out, alone)


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
    rows = [{"id": i, "prompt": "ab c" * (1 + i * 5 % 13)} for i in range(600)]
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


def compare(path: pathlib.Path, other: pathlib.Path) -> None:
    """Equal rows in the same order, numbers within 1e-5."""
    mine, theirs = read_jsonl(path), read_jsonl(other)
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name], name)
