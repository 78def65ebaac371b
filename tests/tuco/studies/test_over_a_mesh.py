"""Every study over a mesh of eight devices: the same numbers as on one."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from common_jax.cli.options import MeshOptions
from tests.tuco.studies.test_alpha_mmlu import quiz
from tests.tuco.studies.test_alpha_mwe import behaviours
from tuco_jax.datasets.prompt_groups import PromptGroup
from tuco_jax.studies import (
    alpha_mmlu,
    alpha_mwe,
    broken,
    conjugate,
    floors,
    gcg,
    many_shot,
    output_co,
    web_chat,
)
from tuco_jax.studies.catalog import STUDIES, load_study

WORDS = "tea cup sun map rope bird chair moon lamp stone river glass".split()


def texts(count: int, length: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for _ in range(count)]


def file(path: pathlib.Path, **columns: list[str]) -> str:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def configs(folder: pathlib.Path) -> dict[str, Any]:
    """A small run of each study, without its pair."""
    requests = file(folder / "requests.jsonl", prompt=texts(8, 4, 0))
    out: dict[str, Any] = dict(out=folder / "one")
    pairs = dict(question=texts(5, 3, 1), answer=texts(5, 10, 2))
    long = dict(question=texts(5, 3, 3), answer=texts(5, 30, 4))
    attacks = ["please {{ prompt }}", "now {{ prompt }}"]
    for name, length in (("English", 3), ("Malayalam", 6)):
        file(folder / "languages" / f"{name}.jsonl", prompt=texts(6, length, length))
    few: dict[str, Any] = dict(count=4, seed=1)
    return {
        "web-chat": web_chat.Config(
            file(folder / "web.jsonl", prompt=texts(5, 30, 5)),
            requests,
            window=40,
            prompts=5,
            **out,
        ),
        "conjugate": conjugate.Config(str(folder / "languages"), **out),
        "many-shot": many_shot.Config(
            prompts=requests,
            complying=file(folder / "complying.jsonl", **pairs),
            harmless=file(folder / "harmless.jsonl", **long),
            refusing=file(
                folder / "refusing.jsonl", prompt=[f"I cannot {t}" for t in texts(40, 9, 10)]
            ),
            shots=(0, 1, 4),
            count=3,
            **out,
        ),
        "output-co": output_co.Config(
            prompts=requests, refusal="no", shots=(0, 1, 3), **few, **out
        ),
        "broken": broken.Config(
            benign=requests,
            harmful=requests,
            attacks=file(folder / "attacks.jsonl", id=["a", "b"], prompt=attacks),
            answers=2,
            tokens=4,
            **few,
            **out,
        ),
        "gcg": gcg.Config(
            prompts=requests,
            strings=1,
            goals=1,
            target="ok",
            steps=2,
            candidates=8,
            topk=8,
            length=4,
            chunk=8,
            answer_tokens=2,
            **few,
            **out,
        ),
        "floors": floors.Config(prompts=4, floors=2, **out),
        "alpha-mmlu": alpha_mmlu.Config(quiz(folder), shots=1, folds=2, **out),
        "alpha-mwe": alpha_mwe.Config(behaviours(folder / "mwe"), folds=4, **out),
    }


def groups() -> list[PromptGroup]:
    """In place of the demo's groups, of which `floors` is a study."""
    return [
        PromptGroup("chat", "Chat.", texts(4, 3, 6), True),
        PromptGroup("plain text", "Plain.", texts(4, 9, 7), False),
        PromptGroup("harmful", "Harm.", texts(4, 4, 8), True),
        PromptGroup("jailbreak", "Attack.", texts(4, 7, 9), True, ["x", "x", "y", "y"]),
    ]


def assert_same(got: Any, want: Any, where: str = "", *, rel: float = 1e-4) -> None:
    """Equal structures; numbers within 1e-5, or a relative `rel` (intervals, AUCs go by ranks)."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for key in want:
            assert_same(got[key], want[key], f"{where}/{key}", rel=rel)
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same(a, b, f"{where}/{i}", rel=rel)
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=rel, abs=1e-5, nan_ok=True), where
    else:
        assert got == want, where


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_the_numbers_are_those_of_one_device(name, models, tmp_path, monkeypatch):
    monkeypatch.setattr(floors, "prompt_groups", lambda count, seed: groups())
    one = dataclasses.replace(configs(tmp_path)[name], **models)
    mesh = MeshOptions(data=2, fsdp=2, tensor=2)
    found = [
        load_study(name).run(config)
        for config in (one, dataclasses.replace(one, out=tmp_path / "eight", mesh=mesh))
    ]
    assert found[1].facts["mesh"] == "data 2, fsdp 2, tensor 2" and "mesh" not in found[0].facts
    want, got = (json.loads((tmp_path / d / "results.json").read_text()) for d in ("one", "eight"))
    assert "--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2" in got["facts"]["command"]
    for unlike in ("facts", "searches"):  # the command and seconds
        for results in (want, got):
            results.pop(unlike, None)
    assert_same(got, want)
