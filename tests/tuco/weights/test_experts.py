"""Experts in one tensor are the same model, whatever the family names them; damage is named."""

import re

import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.tuco.tiny import save_tiny, tiny_hf
from tests.tuco.weights.refused import refusal
from tuco_jax.weights.hf.model import load

WEIGHTS = "model.safetensors"
FAMILIES = ["mixtral", "qwen3_moe"]
ONE = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
}
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


def edit(directory, change):
    tensors = change(load_file(directory / WEIGHTS))
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def save_fused(directory, family):
    tiny_hf(family)[0].save_pretrained(directory, save_original_format=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_are_one_model(family, tmp_path, monkeypatch):
    """What is published, one tensor an expert; and what transformers 5 holds."""
    save_tiny(tmp_path / "apart", family, tokenizer=False)
    apart = load(str(tmp_path / "apart"))
    assert ONE[family] in load_file(tmp_path / "apart" / WEIGHTS)
    save_fused(tmp_path / "fused", family)
    assert FUSED in load_file(tmp_path / "fused" / WEIGHTS)
    monkeypatch.setattr("tuco_jax.weights.assemble._BLOCK", 100)  # 3 rows of width 32
    fused = load(str(tmp_path / "fused"))
    assert fused.config == apart.config
    chex.assert_trees_all_equal(fused.params, apart.params)
    wrapped = "module._orig_mod."
    edit(tmp_path / "fused", lambda t: {wrapped + name: x for name, x in t.items()})
    chex.assert_trees_all_equal(load(str(tmp_path / "fused")).params, apart.params)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_is_missing_misshaped_or_damaged_is_named(family, tmp_path):
    save_tiny(tmp_path, family, tokenizer=False)
    one, whole = ONE[family], load_file(tmp_path / WEIGHTS)
    edit(tmp_path, lambda t: {name: x for name, x in t.items() if name != one})
    assert f"tensor {one} is missing; the checkpoint is incomplete" in refusal(tmp_path)
    for change, message in (
        ({one: whole[one][:-1]}, "which does not give layers/mlp/gate/kernel the shape"),
        ({one: whole[one] * np.nan}, f"tensor {one} holds NaN or infinity"),
        ({one.replace("experts.3", "experts.7"): whole[one]}, "experts.7.*is unknown to family"),
    ):
        save_file(whole | change, tmp_path / WEIGHTS, metadata={"format": "pt"})
        assert re.search(message, refusal(tmp_path))


def test_fused_experts_of_another_model_and_twice(tmp_path):
    save_fused(tmp_path, "qwen3_moe")
    whole = load_file(tmp_path / WEIGHTS)
    edit(tmp_path, lambda t: t | {FUSED: t[FUSED][:-1]})
    message = refusal(tmp_path)
    assert f"tensor {FUSED} has shape [6, 40, 32], but the config calls for [7, 40, 32]" in message
    twice = {ONE["qwen3_moe"]: whole[FUSED][3, :20]}
    save_file(whole | twice, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert f"tensor {ONE['qwen3_moe']} is doubled" in refusal(tmp_path)
