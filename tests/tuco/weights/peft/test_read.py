"""LoRA adapters against the `peft` library on random tiny Hugging Face models."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft as reference
import pytest
import torch
from safetensors.numpy import load_file, save_file

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from tests.tuco.tiny import VOCAB, tiny_hf
from tuco_jax.models import decoder
from tuco_jax.models.families import from_huggingface
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import Positions
from tuco_jax.models.sharding import placement
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.load import tuned_config
from tuco_jax.weights.peft import read as peft
from tuco_jax.weights.peft.config import is_adapter

MLP = ["gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama": ("llama", {}, dict(target_modules=["q_proj", "v_proj"], lora_alpha=3)),
    "regex": (
        "llama", {}, dict(target_modules=r".*\.layers\.[02]\.(self_attn\.o|mlp\.down)_proj"),
    ),
    "all_linear_rslora": (
        "mistral", {}, dict(target_modules="all-linear", use_rslora=True, lora_alpha=5),
    ),
    "layers_and_patterns": (
        "qwen2",
        {},
        dict(
            target_modules=["q_proj", "k_proj", "up_proj"],
            layers_to_transform=[0, 2],
            rank_pattern={"q_proj": 2, r"layers\.2\..*\.up_proj": 5, "up_proj": 1},
            alpha_pattern={"self_attn.k_proj": 7, r"model\.layers\.0\.mlp\.up_proj": 2},
        ),
    ),
    "saved_ends": (
        "qwen3",
        {},
        dict(target_modules=["k_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"]),
    ),
    "saved_modules": (
        "llama",
        {},
        dict(
            target_modules=["q_proj"],
            modules_to_save=["v_proj", "post_attention_layernorm", "layers.1.mlp.up_proj"],
        ),
    ),
    "saved_embedding_unties": (
        "gemma2", {}, dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    ),
    "saved_head_unties": (
        "gemma3_text", {}, dict(target_modules=["v_proj", *MLP], modules_to_save=["lm_head"]),
    ),
    "head": ("olmo2", {}, dict(target_modules=["lm_head", "o_proj"])),
    "tied_head": ("gemma", {}, dict(target_modules=["lm_head"])),
    "embedding": ("llama", {}, dict(target_modules=["embed_tokens", "q_proj"])),
    "tied_embedding": ("gemma2", {}, dict(target_modules=["embed_tokens", "q_proj"])),
    "phi3_fused": (
        "phi3", {}, dict(target_modules=["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]),
    ),
    "phi3_saved_fused": (
        "phi3", {}, dict(target_modules=["o_proj"], modules_to_save=["qkv_proj"]),
    ),
    "gpt2_conv1d": (
        "gpt2",
        {},
        dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
             rank_pattern={"attn.c_proj": 2}),
    ),
    "gpt2_saved": (
        "gpt2", {}, dict(target_modules=["c_fc"], fan_in_fan_out=True,
                         modules_to_save=["wpe", "c_attn", "ln_f"]),
    ),
    "gpt_neox": (
        "gpt_neox",
        {},
        dict(target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    ),
    "gpt_neox_head": (
        "gpt_neox", {}, dict(target_modules=["query_key_value"], modules_to_save=["lm_head"]),
    ),
}  # fmt: skip


def batch(rows=2, length=9, vocab=VOCAB):
    rng = np.random.default_rng(0)
    mask = np.ones((rows, length), bool)
    mask[1, 6:] = False
    return rng.integers(0, vocab, (rows, length)), mask


def randomise(model, seed=3):
    """Every trainable tensor random: PEFT starts with B = 0, which hides everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_magnitude_vector" in name or "ia3_l" in name:
                tensor.mul_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
            elif re.search("lora_|hada_|lokr_", name):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
            elif tensor.requires_grad:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model


def torch_logits(model, tokens, mask):
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits.numpy()


@jax.jit
def our_logits(pair, tokens, mask):
    config, params = pair.tuned_config, pair.tuned_params
    at = Positions.of(config, mask)
    x = decoder.embed(config, params, tokens, at)
    x, _ = decoder.forward(config, params, x, at, pair.lora)
    return decoder.logits(config, params, x, pair.lora)


def write(tmp_path, family, options, **changes):
    """A base and a LoRA adapter on disk, and the PEFT-wrapped model that they came from."""
    options = dict(r=3, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM") | options
    return write_any(tmp_path, family, reference.LoraConfig(**options), **changes)


def write_any(tmp_path, family, config, **changes):
    """`write` with any of PEFT's configs."""
    model, _ = tiny_hf(family, **changes)
    model.save_pretrained(tmp_path / "base")
    wrapped = reference.get_peft_model(model, config)
    randomise(wrapped).eval().save_pretrained(tmp_path / "adapter")
    return wrapped


def read(tmp_path, **options):
    base = huggingface.load(str(tmp_path / "base"))
    lora, overrides = peft.load(tmp_path / "adapter", base, **options)
    config = tuned_config(base.config, overrides)
    return Pair(base.params, overrides, lora, base.config, config)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_peft(case, tmp_path):
    family, changes, options = CASES[case]
    wrapped = write(tmp_path, family, options, **changes)
    pair = read(tmp_path)
    tokens, mask = batch()
    expected = torch_logits(wrapped, tokens, mask)
    np.testing.assert_allclose(our_logits(pair, tokens, mask)[mask], expected[mask], atol=1e-4)
    with wrapped.disable_adapter():
        plain = torch_logits(wrapped, tokens, mask)
    assert np.abs(plain - expected)[mask].max() > 0.05


def test_resized_embedding(tmp_path):
    model, _ = tiny_hf("llama")
    model.save_pretrained(tmp_path / "base")
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    options = reference.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = randomise(reference.get_peft_model(model, options))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    pair = read(tmp_path)
    assert pair.tuned_config.vocab_size == VOCAB + 5
    tokens, mask = batch(vocab=VOCAB + 5)
    expected = torch_logits(wrapped, tokens, mask)
    np.testing.assert_allclose(our_logits(pair, tokens, mask)[mask], expected[mask], atol=1e-4)


def test_only_what_differs_is_held(tmp_path):
    write(tmp_path, "llama", dict(target_modules=["lm_head", "q_proj"]))
    assert any("base_layer" in name for name in load_file(weights(tmp_path)))
    pair = read(tmp_path)
    assert pair.tuned == {}  # the head that PEFT stored again equals the base's
    assert jax.tree.map(jnp.shape, pair.lora["layers"]) == {
        "attention": {"q": {"a": (3, 32, 3), "b": (3, 3, 64)}}
    }


def test_ranks_are_padded_with_zeros(tmp_path):
    family, changes, options = CASES["layers_and_patterns"]
    write(tmp_path, family, options, **changes)
    lora = read(tmp_path).lora["layers"]
    up = lora["mlp"]["up"]
    assert up["a"].shape == (3, 32, 5) and up["b"].shape == (3, 5, 48)
    assert not up["a"][0, :, 1:].any() and up["a"][0, :, :1].any()
    assert not up["a"][1].any() and not up["b"][1].any()
    assert up["b"][2].any()


def test_factors_go_to_their_shards_in_their_dtype(tmp_path):
    write(tmp_path, "llama", dict(target_modules=["q_proj", "down_proj"], r=4))
    mesh = make_mesh(1, 2, 4)
    pair = read(tmp_path, dtype="bfloat16", placement=placement(mesh))
    q, down = pair.lora["layers"]["attention"]["q"], pair.lora["layers"]["mlp"]["down"]
    assert {x.dtype for x in jax.tree.leaves(pair.lora)} == {jnp.dtype("bfloat16")}
    assert tuple(q["a"].sharding.spec) == (None, "fsdp", None)
    assert tuple(q["b"].sharding.spec) == (None, None, "tensor")
    assert tuple(down["a"].sharding.spec) == (None, "tensor", None)


def weights(tmp_path, name="adapter"):
    return tmp_path / name / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One adapter on disk and its base, to be copied and spoilt."""
    directory = tmp_path_factory.mktemp("small")
    write(directory, "llama", dict(target_modules=["q_proj"]))
    return directory, huggingface.load(str(directory / "base"))


def spoil(small, tmp_path, fields=None, tensors=None):
    directory, base = small
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    held = load_file(weights(directory))
    if tensors:
        held = tensors(held)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | (fields or {})))
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError) as caught:
        peft.load(tmp_path, base)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "PREFIX_TUNING"}, "type PREFIX_TUNING adds virtual tokens"),
        ({"peft_type": "VERA"}, "type VERA are not supported"),
        ({"use_qalora": True}, "use_qalora: QALoRA is not supported; merge it"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias: with use_dora it is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
        ({"lora_alpha": None}, "adapter_config.json: lora_alpha: must be a number, not None"),
        ({"rank_pattern": ["q"]}, "rank_pattern: must map names to numbers, not .'q'."),
        ({"alpha_pattern": {"q": "8"}}, "alpha_pattern: q: must be a number, not '8'"),
        ({"r": 5}, "A .3, 32. and B .64, 3., but adapter_config.json gives it rank 5"),
    ],
)
def test_unsupported_adapters_name_what_they_are(small, tmp_path, fields, message):
    assert re.search(message, spoil(small, tmp_path, fields=fields))


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {k: v for k, v in t.items() if k != Q.format("B")}, "only one of its two"),
        (lambda t: t | {Q.format("A"): t[Q.format("A")] * np.nan}, "holds NaN or infinity"),
        (lambda t: t | {Q.format("B"): t[Q.format("B")][:-1]}, "base has 32 inputs and 64"),
        (
            lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()},
            r"layers.7.self_attn.q_proj.lora_A.weight is unknown to family 'llama' with 3 layers",
        ),
        (lambda t: t | {"base_model.model.x.weight": np.ones(2)}, "x.weight is unknown"),
        (
            lambda t: t | {"base_model.model.model.norm.weight": np.ones(5, np.float32)},
            r"shape \[5\], which does not give final_norm/scale \[32\]",
        ),
    ],
)  # fmt: skip
def test_spoilt_files_name_the_tensor(small, tmp_path, change, message):
    assert re.search(message, spoil(small, tmp_path, tensors=change))


def test_pickles_and_missing_files(small, tmp_path):
    directory, base = small
    config = (directory / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(InputError, match="adapter_model.safetensors: no such file"):
        peft.load(tmp_path, base)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickled weights can run code.*save_pretrained it again"):
        peft.load(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="adapter_config.json: cannot be read as JSON"):
        peft.load(tmp_path, base)


def test_is_adapter(small):
    directory, base = small
    assert is_adapter(directory / "adapter") and not is_adapter(directory / "base")
    assert from_huggingface(tiny_hf("llama")[1]) == base.config
