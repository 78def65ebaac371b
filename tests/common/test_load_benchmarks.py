"""The benchmarks of loading run, at their smallest: Stable Diffusion, a pair as GGUF; the rest by
its command.
"""

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT


def start(module: str, *argv: object) -> str:
    line = [sys.executable, "-m", module, *map(str, argv)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_stable_diffusion(tmp_path):
    argv = ["--width", 32, "--layouts", "1x8x1", "--out", tmp_path]
    assert "1x8x1: arrays " in start("benchmarks.load_images", *argv)
    (run,) = json.loads((tmp_path / "load_images.json").read_text())["runs"]
    # Almost all of it is kernels, which all devices share.
    assert run["arrays"] / 8 <= run["share"] < 0.2 * run["arrays"]
    assert 0 < run["largest"] < run["arrays"] and run["beyond"] <= run["allowed"]


@pytest.mark.slow
def test_a_pair_as_gguf(tmp_path):
    """Its small pair is held to the files it was made of, to 8 bits."""
    argv = ["--sources", "gguf", "--depth", 2, "--layouts", "1x8x1", "--out", tmp_path]
    assert "gguf 1x8x1 process 0: arrays " in start("benchmarks.load", *argv)
    (run,) = json.loads((tmp_path / "load_gguf.json").read_text())["runs"]
    assert 130e6 < run["arrays"] < 150e6  # float32
    assert run["arrays"] / 8 <= run["share"] < 0.2 * run["arrays"]
    assert run["beyond"] <= run["allowed"]


def test_the_command_of_pairs():
    said = start("benchmarks.load", "--help")
    assert "files by orbax" in said and "gguf" in said and "--depth" in said
