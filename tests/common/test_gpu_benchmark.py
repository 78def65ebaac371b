"""The script for a GPU scores its tiny pair, as a process of its own."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_script_for_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--size", "tiny", "--parts", "scores"]
    subprocess.run([*command, "--rounds", "1", "--out", str(tmp_path)], cwd=ROOT, check=True)
    found = json.loads((tmp_path / "gpu.json").read_text())
    scores = found["tiny"]
    precisions = {"float32", "bfloat16x3", "bfloat16x2", "bfloat16"}
    assert scores["tokens_a_second"].keys() == precisions | {"torch hooks"}
    off = scores["largest relative difference from float32"]
    assert off["bfloat16x3"] < 1e-5 < off["bfloat16"] < 1e-2
