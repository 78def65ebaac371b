"""Factors that are written here load in `peft`, and here again."""

import json

import jax.numpy as jnp
import numpy as np
import peft as reference
import pytest
from safetensors.numpy import load_file

from common_jax.errors import InputError
from tests.tuco.tiny import VOCAB, tiny_hf
from tests.tuco.weights.peft import test_read as shared
from tuco_jax.models.pair import Pair
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.peft import write as peft


@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gpt2", "gpt_neox", "gemma3_text", "mixtral", "qwen3_moe"]
)
def test_saved_factors_load_in_peft(family, tmp_path):
    """Factors as training makes them, each part with an "a" of its own, also those that fuse."""
    model, hf_config = tiny_hf(family)
    model.save_pretrained(tmp_path / "base")
    base = huggingface.load(str(tmp_path / "base"))
    rng = np.random.default_rng(1)

    def factors(tree, rank):
        if "kernel" in tree:
            *stacked, rows, columns = tree["kernel"].shape
            return {
                "a": jnp.asarray(rng.normal(size=(*stacked, rows, rank)) * 0.3, jnp.float32),
                "b": jnp.asarray(rng.normal(size=(*stacked, rank, columns)) * 0.3, jnp.float32),
            }
        step = 0 if base.config.experts else 1  # of experts PEFT takes one rank alone
        linear = (k for k, v in tree.items() if "scale" not in v)
        return {k: factors(tree[k], 2 + step * i) for i, k in enumerate(linear)}

    layers = {k: factors(base.params["layers"][k], 2) for k in ("attention", "mlp")}
    width = base.config.width
    head = {
        "a": jnp.asarray(rng.normal(size=(width, 2)) * 0.3, jnp.float32),
        "b": jnp.asarray(rng.normal(size=(2, VOCAB)) * 0.3, jnp.float32),
    }
    lora = {"layers": layers, "head": head}
    peft.save(tmp_path / "adapter", base.config, lora, base_name="tiny")
    pair = Pair(base.params, {}, lora, base.config, base.config)
    wrapped = reference.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    tokens, mask = shared.batch()
    expected = shared.torch_logits(wrapped, tokens, mask)
    np.testing.assert_allclose(
        shared.our_logits(pair, tokens, mask)[mask], expected[mask], atol=1e-4
    )
    again = shared.our_logits(shared.read(tmp_path), tokens, mask)
    np.testing.assert_allclose(again[mask], expected[mask], atol=1e-4)
    with wrapped.disable_adapter():
        assert np.abs(shared.torch_logits(wrapped, tokens, mask) - expected)[mask].max() > 0.1
    with pytest.raises(InputError, match="exists and is not empty"):
        peft.save(tmp_path / "adapter", base.config, lora, base_name="tiny")


def test_shared_factors_of_a_fused_module_stay_shared(tmp_path):
    shared.write(tmp_path, "phi3", dict(target_modules=["qkv_proj"], layers_to_transform=[1]))
    pair = shared.read(tmp_path)
    peft.save(tmp_path / "again", pair.base_config, pair.lora, base_name="tiny")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["r"] == 3
    old, new = load_file(shared.weights(tmp_path)), load_file(shared.weights(tmp_path, "again"))
    name = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_{}.weight"
    np.testing.assert_array_equal(new[name.format("A")], old[name.format("A")])
    np.testing.assert_allclose(new[name.format("B")], old[name.format("B")] * 4 / 3, rtol=1e-6)
