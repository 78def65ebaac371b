"""The script for a GPU, whose parts run at their tiny sizes, in a process of its own."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_script_for_a_gpu(tmp_path):
    parts = "scores", "images", "stable_diffusion"
    command = [sys.executable, "-m", "benchmarks.gpu", "--size", "tiny", "--parts", *parts]
    subprocess.run([*command, "--rounds", "1", "--out", str(tmp_path)], cwd=ROOT, check=True)
    found = {part: json.loads((tmp_path / f"gpu_{part}.json").read_text()) for part in parts}
    scores = found["scores"]["tiny"]
    precisions = {"float32", "bfloat16x3", "bfloat16x2", "bfloat16"}
    assert scores["tokens_a_second"].keys() == precisions | {"torch hooks"}
    off = scores["largest relative difference from float32"]
    assert off["bfloat16x3"] < 1e-5 < off["bfloat16"] < 1e-2
    for of_clock in found["images"]["tiny images"].values():
        ratios = of_clock["torch_over_jax"]
        assert ratios.keys() == {"training", "matching", "sampling"}
        assert all(one["jax"] > 0 and one["asked"] == 1 for one in ratios.values())
    unet = found["stable_diffusion"]["unet"]
    forms = {"jax", "torch, NCHW", "torch, channels last"}
    assert {name.replace(", float32", "") for name in unet["seconds"] if "32" in name} == forms
    assert unet["torch_over_jax"].keys() == {"float32", "bfloat16", "asked"}
    off = unet["largest difference from torch, of the largest value"]
    assert 0 < off["float32"] < 1e-5 < off["bfloat16"] < 0.05
