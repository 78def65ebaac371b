"""What is no plain LoRA, as `peft` saves it: logits equal those of the wrapped model."""

import json

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from common_jax.errors import InputError
from tests.tuco.tiny import VOCAB, tiny_hf
from tests.tuco.weights.peft import test_read as shared
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.peft import read


def lora(**fields):
    return peft.LoraConfig(
        r=3, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **fields
    )


TOKENS = [3, 250, 7]
MLP = ["gate_proj", "up_proj", "down_proj"]
# name: (family, config, changes to the tiny model, paths that become tuned weights)
CASES = {
    "dora": ("llama", lora(target_modules=["q_proj", "down_proj"], use_dora=True), {}),
    "dora, rslora, some layers": (
        "qwen2",
        lora(
            target_modules=["v_proj"], use_dora=True, use_rslora=True, layers_to_transform=[0, 2]
        ),
        {},
    ),
    "dora, conv1d": (
        "gpt2",
        lora(target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True),
        {},
    ),
    "dora, fused": ("phi3", lora(target_modules=["qkv_proj", "o_proj"], use_dora=True), {}),
    "dora, head": ("olmo2", lora(target_modules=["lm_head"], use_dora=True), {}),
    "dora, tied head": ("gemma", lora(target_modules=["lm_head", "k_proj"], use_dora=True), {}),
    "dora, embedding": ("llama", lora(target_modules=["embed_tokens"], use_dora=True), {}),
    "dora, tied embedding": (
        "gemma3_text",
        lora(target_modules=["embed_tokens"], use_dora=True),
        {},
    ),
    "biases": ("llama", lora(target_modules=["q_proj"], bias="all"), {}),
    "biases, norms too": (
        "gpt2",
        lora(target_modules=["c_attn"], bias="all", fan_in_fan_out=True),
        {},
    ),
    "biases of adapted modules": (
        "gpt_neox",
        lora(target_modules=["query_key_value"], bias="lora_only"),
        {},
    ),
    "bias on B": ("llama", lora(target_modules=["k_proj", "up_proj"], lora_bias=True), {}),
    "adalora": (
        "mistral",
        peft.AdaLoraConfig(
            target_modules=["q_proj", "up_proj"],
            init_r=4,
            target_r=2,
            lora_alpha=6,
            total_step=10,
            task_type="CAUSAL_LM",
        ),
        {},
    ),
    "ia3": (
        "llama",
        peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        {},
    ),
    "ia3, conv1d": (
        "gpt2",
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
        {},
    ),
    "ia3, fused": (
        "gpt_neox",
        peft.IA3Config(
            target_modules=["query_key_value", "dense_4h_to_h"],
            feedforward_modules=["dense_4h_to_h"],
        ),
        {},
    ),
    "norms": ("llama", peft.LNTuningConfig(task_type="CAUSAL_LM"), {}),
    "norms, with biases": (
        "gpt_neox",
        peft.LNTuningConfig(
            target_modules=["input_layernorm", "final_layer_norm"], modules_to_save=["embed_in"]
        ),
        {},
    ),
    "norms around zero": (
        "gemma2",
        peft.LNTuningConfig(target_modules=["post_feedforward_layernorm", "norm"]),
        {},
    ),
    "loha": (
        "llama",
        peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"], init_weights=False),
        {},
    ),
    "loha, patterns": (
        "qwen3",
        peft.LoHaConfig(
            r=3,
            alpha=5,
            target_modules=MLP,
            init_weights=False,
            rank_pattern={"up_proj": 2},
            alpha_pattern={"gate_proj": 9},
        ),
        {},
    ),
    "lokr": (
        "llama",
        peft.LoKrConfig(r=2, alpha=5, target_modules=["k_proj", "up_proj"], init_weights=False),
        {},
    ),
    "lokr, both in parts": (
        "phi3",
        peft.LoKrConfig(
            r=1,
            alpha=2,
            target_modules=["qkv_proj", "o_proj"],
            decompose_both=True,
            init_weights=False,
        ),
        {},
    ),
    "lokr, whole": (
        "llama",
        peft.LoKrConfig(r=20, alpha=5, target_modules=["v_proj"], init_weights=False),
        {},
    ),
    "rows of the embedding": (
        "llama",
        lora(target_modules=["q_proj"], trainable_token_indices=TOKENS),
        {},
    ),
    "rows of a tied embedding": (
        "gemma2",
        lora(target_modules=["q_proj"], trainable_token_indices=TOKENS),
        {},
    ),
    "rows of both ends": (
        "llama",
        lora(
            target_modules=["q_proj"],
            trainable_token_indices={"embed_tokens": TOKENS, "lm_head": [9, 3]},
        ),
        {},
    ),
    "rows alone": (
        "gpt2",
        peft.TrainableTokensConfig(target_modules=["wte"], token_indices=TOKENS),
        {},
    ),
    "tied embedding that stays tied": (
        "gemma2",
        lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
        {},
    ),
    "tied embedding that is saved and stays tied": (
        "gemma",
        lora(
            target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
        ),
        {},
    ),
}


def agree(tmp_path, wrapped, vocab=VOCAB):
    pair = shared.read(tmp_path)
    tokens, mask = shared.batch(vocab=vocab)
    expected = shared.torch_logits(wrapped, tokens, mask)
    ours = shared.our_logits(pair, tokens, mask)
    np.testing.assert_allclose(ours[mask], expected[mask], atol=1e-4)
    return pair, expected[mask]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_peft(case, tmp_path):
    family, config, changes = CASES[case]
    wrapped = shared.write_any(tmp_path, family, config, **changes)
    pair, expected = agree(tmp_path, wrapped)
    tokens, mask = shared.batch()
    plain, _ = tiny_hf(family, **changes)
    moved = np.abs(shared.torch_logits(plain, tokens, mask)[mask] - expected).max()
    assert moved > 0.01
    assert bool(pair.lora) != case.startswith(("dora", "ia3", "lo", "norms", "rows alone"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_a_resized_vocabulary_that_is_saved(family, saved, tmp_path):
    """The ends come two or three times: as trained, as a wrapper's, as they were before."""
    model, _ = tiny_hf(family)
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    config = lora(target_modules=["q_proj"], modules_to_save=saved)
    wrapped = shared.randomise(peft.get_peft_model(model, config)).eval()
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    names = load_file(shared.weights(tmp_path))
    assert any(".modules_to_save.weight" in name for name in names)
    assert any(".original_module.weight" in name for name in names)
    pair, _ = agree(tmp_path, wrapped, vocab=VOCAB + 5)
    assert pair.tuned_config.vocab_size == VOCAB + 5


def test_a_resized_embedding_without_its_head_is_refused(tmp_path):
    model, _ = tiny_hf("llama")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    wrapped = peft.get_peft_model(model, lora(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    held = load_file(shared.weights(tmp_path))
    for lacking, sizes in (("lm_head", "277 rows and a head of 272"), ("embed", "272 .* of 277")):
        rest = {name: x for name, x in held.items() if lacking not in name}
        save_file(rest, shared.weights(tmp_path))
        with pytest.raises(InputError, match=f"embedding of {sizes}.*save_embedding_layers") as e:
            shared.read(tmp_path)
        assert "\n" not in str(e.value)


def test_adalora_that_pruned_its_ranks(tmp_path):
    """A module whose rank went to 0, and one whose rank is less than it was at first."""
    config = peft.AdaLoraConfig(
        target_modules=["q_proj"], init_r=4, target_r=2, lora_alpha=6, total_step=10
    )
    wrapped = shared.write_any(tmp_path, "llama", config)
    masks = [[True, False, True, False], [False] * 4, [True] * 4]
    with torch.no_grad():
        for layer, mask in enumerate(masks):
            module = wrapped.base_model.model.model.layers[layer].self_attn.q_proj
            module.lora_E["default"][~torch.tensor(mask)] = 0
    name = "model.layers.{}.self_attn.q_proj.lora_E.default"
    wrapped.peft_config["default"].rank_pattern = {name.format(i): m for i, m in enumerate(masks)}
    wrapped.save_pretrained(tmp_path / "adapter")
    pair, _ = agree(tmp_path, wrapped)
    assert pair.lora["layers"]["attention"]["q"]["a"].shape == (3, 32, 4)
    assert not pair.lora["layers"]["attention"]["q"]["b"][1].any()


def spoilt(tmp_path, fields=None, tensors=None):
    """The refusal of an adapter whose files were changed."""
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (fields or {})))
    held = load_file(shared.weights(tmp_path))
    save_file((tensors or dict)(held), shared.weights(tmp_path))
    with pytest.raises(InputError) as caught:
        read.load(tmp_path / "adapter", huggingface.load(str(tmp_path / "base")))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    return str(caught.value)


def test_parts_that_do_not_fit_are_named(tmp_path):
    _, config, _ = CASES["lokr"]
    shared.write_any(tmp_path / "lokr", "llama", config)
    cut = spoilt(tmp_path / "lokr", tensors=lambda t: {k: v[:-1] for k, v in t.items()})
    assert "what it holds for model.layers.0." in cut and "does not fit the base" in cut
    _, config, _ = CASES["loha"]
    shared.write_any(tmp_path / "loha", "llama", config)
    lacking = spoilt(tmp_path / "loha", tensors=lambda t: dict(list(t.items())[1:]))
    assert "which make no whole adapter" in lacking
    _, config, _ = CASES["rows alone"]
    shared.write_any(tmp_path / "rows", "gpt2", config)
    assert "does not fit the base" in spoilt(tmp_path / "rows", {"token_indices": [3, 250, 272]})
    assert "must list the trained rows" in spoilt(tmp_path / "rows", {"token_indices": [1, -2, 3]})
    shared.write_any(tmp_path / "lora", "llama", lora(target_modules=["q_proj"]))
    large = spoilt(tmp_path / "lora", {"lora_alpha": 1e300})
    assert "its factors of layers/attention/q are, scaled, too large for float32" in large
    _, config, _ = CASES["dora"]
    shared.write_any(tmp_path / "dora", "llama", config)
    zero = spoilt(tmp_path / "dora", tensors=lambda t: {k: v * 0 + 3e38 for k, v in t.items()})
    assert "gives NaN or infinity" in zero
