"""Writes Hugging Face models as GGUF files the way llama.cpp's converter does, for tests.

Returns what the file holds, dequantised, in the names and layout of the Hugging Face model: a
reference that takes these weights is what the importer must equal.
"""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from transformers import PreTrainedConfig, PreTrainedModel

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gemma3_text": "gemma3"}
_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_PARTS = _PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# Where a block of a K-quant holds its float16 scales.
_SCALES = {
    "Q2_K": slice(80, 84),
    "Q3_K": slice(108, 110),
    "Q4_K": slice(0, 4),
    "Q5_K": slice(0, 4),
    "Q6_K": slice(208, 210),
}


def stored_name(name: str, family: str) -> str:
    """A Hugging Face tensor's name in the file."""
    stem, suffix = name.rsplit(".", 1)
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    parts = _GEMMA_PARTS if family == "gemma3_text" else _PARTS
    return f"blk.{layer}.{parts[part]}.{suffix}"


def _to_pairs(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head, halves (a_0.., b_0..), to pairs a_0, b_0, a_1, b_1, ..."""
    halves = x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:])
    return halves.swapaxes(1, 2).reshape(x.shape)


def _to_halves(x: np.ndarray, heads: int) -> np.ndarray:
    pairs = x.reshape(heads, x.shape[0] // heads // 2, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


def encode(value: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """Bytes or floats of a tensor; K-quants, which gguf cannot make, are random valid blocks."""
    if kind == "BF16":
        return torch.tensor(value).bfloat16().view(torch.int16).numpy().view(np.uint8)
    if kind not in _SCALES:
        return gguf.quantize(value, GGMLQuantizationType[kind])
    numbers, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows, columns = value.shape
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, columns // numbers, size), np.uint8)
    place = _SCALES[kind]
    blocks[..., place] = np.ones((place.stop - place.start) // 2, np.float16).view(np.uint8)
    spread = decode(blocks.reshape(rows, -1), kind).std()
    scale = rng.uniform(0.5, 1.5, (*blocks.shape[:2], (place.stop - place.start) // 2))
    scale = scale * value.std() / spread
    blocks[..., place] = scale.astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    return gguf.dequantize(data, GGMLQuantizationType[kind])


def write(
    path: pathlib.Path,
    model: PreTrainedModel,
    config: PreTrainedConfig,
    *,
    kinds: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    rope_factors: np.ndarray | None = None,
    without: str = "-",
) -> dict[str, torch.Tensor]:
    """Write `model`; `kinds` gives types by part of a stored name (matrices; else F32).

    metadata: further fields or, as None, fields to leave out; keys are without the architecture
    where they start with a dot. without: tensors with this in their stored name are left out.
    """
    family = config.model_type
    architecture = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, architecture)
    rope = config.rope_parameters
    fields = {
        ".context_length": config.max_position_embeddings,
        ".embedding_length": config.hidden_size,
        ".block_count": config.num_hidden_layers,
        ".feed_forward_length": config.intermediate_size,
        ".attention.head_count": config.num_attention_heads,
        ".attention.head_count_kv": config.num_key_value_heads,
        ".attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        ".attention.key_length": getattr(config, "head_dim", None),
        ".rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
    }
    for key, value in (fields | dict(metadata or {})).items():
        if value is not None:
            _add(writer, architecture + key if key.startswith(".") else key, value)
    held = {}
    tied = config.tie_word_embeddings
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        value = tensor.numpy()
        stored = stored_name(name, family)
        if without in stored:
            held[name] = torch.zeros_like(tensor)
            continue
        if family == "gemma3_text" and name.endswith("norm.weight"):
            value = value + 1
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        permuted = heads.get(name.split(".")[-2]) if architecture == "llama" else None
        if permuted:
            value = _to_pairs(value, permuted)
        kind = "F32"
        if value.ndim == 2:
            kind = next((k for part, k in (kinds or {}).items() if part in stored), "F32")
        data = encode(np.ascontiguousarray(value), kind, seed=i)
        plain = None if kind in ("F32", "F16") else GGMLQuantizationType[kind]
        writer.add_tensor(stored, data, raw_dtype=plain)
        value = decode(data, kind)
        if permuted:
            value = _to_halves(value, permuted)
        if family == "gemma3_text" and name.endswith("norm.weight"):
            value = value - 1
        held[name] = torch.tensor(value)
    if tied:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def llama3_factors(rope: Mapping[str, Any], dim: int) -> np.ndarray:
    """The divisors of frequencies that stand for llama3's scaling (Llama 3.1, RoPE scaling)."""
    original = rope["original_max_position_embeddings"]
    low, high = original / rope["low_freq_factor"], original / rope["high_freq_factor"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = original / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(factors)
