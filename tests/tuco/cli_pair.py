"""A tiny pair on disk and a way to run the command line on it, in this process or another."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import pytest

from tests.tuco.tiny import save_tiny
from tests.tuco.tiny_tokenizer import bos_tokenizer
from tuco_jax.cli import main

ROOT = pathlib.Path(__file__).parents[2]


def save_pair(folder: pathlib.Path) -> tuple[str, str]:
    """Two random models of one shape with one tokenizer; their context holds 64 tokens."""
    for name, seed in (("base", 0), ("tuned", 1)):
        save_tiny(folder / name, "llama", seed)
        bos_tokenizer().save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "tuned")


def file_options(
    pair: tuple[str, str], folder: pathlib.Path, rows: list, **more: Any
) -> dict[str, Any]:
    """Options of a command that reads prompts of a file, and writes another."""
    prompts = write_jsonl(folder / "p.jsonl", rows)
    out = str(folder / "o.jsonl")
    return {"base": pair[0], "tuned": pair[1], "prompts": prompts, "out": out} | more


def write_jsonl(path: pathlib.Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def read_jsonl(path: str | pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text("utf-8").splitlines()]


def start(argv: list[str], cache: pathlib.Path) -> subprocess.Popen:
    """The command line in a process of its own, one CPU device."""
    return subprocess.Popen(
        [sys.executable, "-m", "tuco_jax.cli", *argv],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_in_process(monkeypatch: pytest.MonkeyPatch, cache: pathlib.Path, argv: list[str]) -> int:
    """`main(argv)` with a compilation cache of its own, which is left off afterwards."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    try:
        return main(argv)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
