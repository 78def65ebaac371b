"""GGUF files of the architectures llama, qwen2 and gemma3, as llama.cpp's converter writes them.

The converter's changes are undone, so that parameters equal those of the Hugging Face checkpoint
up to quantisation. Llama's query and key rows, which it reorders for rotary embeddings of
neighbouring pairs, are put back into halves. Gemma3's norms, which it stores with 1 added, lose
it. Llama3's RoPE scaling is read from the tensor of frequency factors that it became. (Mistral
models are written as llama, mostly without their attention window: right up to its length.)
"""

import copy
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from common_jax.errors import InputError
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.families import from_huggingface
from tuco_jax.weights.assemble import Checkpoint, Key, KeyTable, Placement
from tuco_jax.weights.gguf.file import GGUFFile
from tuco_jax.weights.gguf.tokenizer import build_tokenizer
from tuco_jax.weights.model import Model, OpenModel

__all__ = ["load", "open_model", "read_config"]

_ROPE_FACTORS = "rope_freqs.weight"
_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma3": Gemma3TextConfig}


def load(
    path: str,
    *,
    dtype: str = "float32",
    placement: Placement | None = None,
    tokenizer: bool = True,
) -> Model:
    """Read a model, and with `tokenizer` its tokenizer, from one .gguf file.

    dtype: of the parameters, "float32", "bfloat16" or "float16". placement: where each parameter
    goes (`models/sharding.py`). Raises InputError, one line that names the file and the tensor or
    field: an architecture, tensor type or setting that is not supported, a truncated or corrupt
    file, a tensor that is missing, unknown, misshaped or not finite.
    """
    return open_model(path, dtype=dtype, tokenizer=tokenizer).load(placement)


def open_model(path: str, *, dtype: str = "float32", tokenizer: bool = True) -> OpenModel:
    """`load` before it reads the weights, their names checked."""
    file = GGUFFile(pathlib.Path(path).expanduser())
    config, hf_config, own_tokenizer = _describe(file, tokenizer)
    ignore = (re.escape(_ROPE_FACTORS), r"blk\.\d+\.attn_rot_embd\.weight")
    weights = Checkpoint(config, _Source(file), _TABLE, dtype=dtype, ignore=ignore)
    return OpenModel(config, weights, own_tokenizer, path, hf_config)


def read_config(path: str) -> ModelConfig:
    """The config of a file, from its metadata, tensor names and RoPE factors alone."""
    return _describe(GGUFFile(pathlib.Path(path).expanduser()), tokenizer=False)[0]


def _describe(
    file: GGUFFile, tokenizer: bool
) -> tuple[ModelConfig, PreTrainedConfig | None, PreTrainedTokenizerFast | None]:
    """Both configs (`Model`) and tokenizer, the file named in what is raised."""
    try:
        return *_configs(file), build_tokenizer(file.metadata) if tokenizer else None
    except (InputError, StrictDataclassError) as error:
        raise InputError(f"{file.path}: {' '.join(str(error).split())}") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        # A field may hold anything in a damaged file: a word for a number, a list for a word.
        raise InputError(
            f"{file.path}: its metadata cannot be understood ({' '.join(str(error).split())}); "
            "the file is corrupt, or convert the model again"
        ) from error


class _Source:
    """A GGUF file as a `TensorSource`."""

    def __init__(self, file: GGUFFile) -> None:
        self._file, self.name = file, str(file.path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._file.tensors.items()}

    def file(self, tensor: str) -> str:
        return self.name

    def stored(self, tensor: str) -> str:
        kind = self._file.tensors[tensor].type
        return "bfloat16" if kind == "BF16" else kind

    def read(
        self, tensor: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        value = self._file.read(tensor, rows)  # quantised numbers lie in blocks along rows
        return value if columns == slice(None) else value[:, columns]


class _Fields:
    """Metadata of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self._metadata, self._prefix = metadata, architecture + "."

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(self._prefix + key, default)

    def number(self, key: str, default: float | None = None) -> Any:
        """A number, which must be there if there is no default; not one that varies by layer."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray):
            if len(set(value.tolist())) != 1:
                raise InputError(f"{self._prefix}{key} differs by layer, which is not supported")
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
            flaw = "is missing" if value is None else f"is {value!r}, not a positive number"
            raise InputError(f"metadata {self._prefix}{key} {flaw}; convert the model again")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise InputError(f"metadata {self._prefix}{key} is {value!r}, not an integer")
        return value


def _configs(file: GGUFFile) -> tuple[ModelConfig, PreTrainedConfig | None]:
    """Our config and the Hugging Face config of a file, from its metadata and its tensors.

    The latter is None where no Hugging Face config can express what the tensors say.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in _CONFIGS:
        raise InputError(
            f"architecture {architecture!r} is not supported; supported are {', '.join(_CONFIGS)}"
        )
    if file.metadata.get("split.count", 1) > 1:
        raise InputError("is one part of a split model; merge the parts with llama-gguf-split")
    fields = _Fields(file.metadata, architecture)
    if fields.get("expert_count"):
        raise InputError(f"{architecture}.expert_count: mixtures of experts are not supported")
    shared, head_dim = _shared(file, fields)
    scaling = _rope(fields)
    if architecture == "gemma3":
        hf_config = _gemma3(fields, shared, head_dim, scaling)
    elif architecture == "llama" and fields.get("attention.sliding_window"):
        window = fields.count("attention.sliding_window")
        hf_config = MistralConfig(**shared, rope_parameters=scaling, sliding_window=window)
    else:
        hf_config = _CONFIGS[architecture](**shared, rope_parameters=scaling)
    biases = dict(
        qkv_bias=architecture == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
    )
    if isinstance(hf_config, LlamaConfig):
        hf_config.attention_bias = biases["qkv_bias"] and biases["out_bias"]
        hf_config.mlp_bias = biases["mlp_bias"]
    kind = type(hf_config).__name__.removesuffix("Config").removesuffix("Text")
    hf_config.architectures = [f"{kind}ForCausalLM"]
    for name in ("bos", "eos", "padding"):  # else the class's own, of some other vocabulary
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        field = "pad_token_id" if name == "padding" else f"{name}_token_id"
        setattr(hf_config, field, int(token) if token is not None else None)
    if _ROPE_FACTORS in file.tensors:
        return _with_rope_factors(hf_config, biases, file)
    known = from_huggingface(hf_config)
    config = dataclasses.replace(known, **biases)
    return config, hf_config if config == known else None


def _shared(file: GGUFFile, fields: _Fields) -> tuple[dict[str, Any], int]:
    """What every architecture's config says, and the width of a head."""
    if "token_embd.weight" not in file.tensors:
        raise InputError("tensor token_embd.weight is missing; the file is incomplete")
    width, heads = fields.count("embedding_length"), fields.count("attention.head_count")
    depth = fields.count("block_count")
    head_dim = fields.count("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.number(key, head_dim) != head_dim:
            raise InputError(
                f"metadata {key} is {fields.number(key)}, but heads are {head_dim} wide; "
                "only equal widths are supported"
            )
    rows = file.tensors["token_embd.weight"].shape[0]
    tokens = len(file.metadata.get("tokenizer.ggml.tokens", ()))
    if tokens > rows:
        raise InputError(f"{tokens} tokens, but token_embd.weight has {rows} rows; it is corrupt")
    # Before anything is made of that many layers or features.
    last, query = f"blk.{depth - 1}.attn_norm.weight", file.tensors.get("blk.0.attn_q.weight")
    if last not in file.tensors:
        raise InputError(f"tensor {last} is missing, but block_count is {depth}; it is incomplete")
    held = sum(1 for name in file.tensors if re.fullmatch(r"blk\.\d+\.attn_norm\.weight", name))
    if held < depth:
        raise InputError(f"holds {held} of {depth} tensors blk.*.attn_norm.weight; is incomplete")
    if query is None:
        raise InputError("tensor blk.0.attn_q.weight is missing; the file is incomplete")
    if query.shape[0] != heads * head_dim:
        raise InputError(
            f"tensor blk.0.attn_q.weight has shape {list(query.shape)}, but the metadata calls "
            f"for {heads} heads of {head_dim}"
        )
    shared = dict(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=fields.count("feed_forward_length"),
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=fields.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=fields.count("context_length"),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in file.tensors,
    )
    return shared, head_dim


def _rope(fields: _Fields) -> dict[str, Any]:
    """Base and scaling, as a Hugging Face config's `rope_parameters`."""
    base = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base", 10_000.0)}
    kind = fields.get("rope.scaling.type", "linear" if fields.get("rope.scale_linear") else "none")
    if kind == "none":
        return base
    factor = fields.number("rope.scaling.factor", fields.get("rope.scale_linear", 1.0))
    if kind == "linear":
        return base | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise InputError(f"rope.scaling.type {kind!r} is not supported; linear and yarn are")
    optional = {
        "original_max_position_embeddings": fields.get("rope.scaling.original_context_length"),
        "beta_fast": fields.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": fields.get("rope.scaling.yarn_beta_slow"),
    }
    given = {k: v for k, v in optional.items() if v is not None}
    scale = fields.number("rope.scaling.attn_factor", 1.0)
    temperature = 0.1 * np.log(factor) + 1 if factor > 1 else 1.0
    yarn = {"rope_type": "yarn", "factor": factor, "attention_factor": float(scale * temperature)}
    return base | yarn | given


def _gemma3(
    fields: _Fields, shared: dict[str, Any], head_dim: int, rope: dict[str, Any]
) -> PreTrainedConfig:
    """Five layers of six see a window and have their own RoPE base, unscaled."""
    depth = shared["num_hidden_layers"]
    pattern = fields.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, np.ndarray):
        sliding = pattern.astype(bool).tolist()
    else:
        pattern = fields.count("attention.sliding_window_pattern", 6)
        sliding = [(layer + 1) % pattern != 0 for layer in range(depth)]
    local = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", 10_000.0)}
    per_head = shared["hidden_size"] // shared["num_attention_heads"]
    return Gemma3TextConfig(
        **shared,
        sliding_window=fields.count("attention.sliding_window"),
        layer_types=["sliding_attention" if s else "full_attention" for s in sliding],
        rope_parameters={"full_attention": rope, "sliding_attention": local},
        # The file does not say; the 27B model, known by its 62 layers, differs from the others.
        query_pre_attn_scalar=per_head if depth == 62 else head_dim,
        final_logit_softcapping=fields.get("final_logit_softcapping"),
    )


def _with_rope_factors(
    hf_config: PreTrainedConfig, biases: Mapping[str, bool], file: GGUFFile
) -> tuple[ModelConfig, PreTrainedConfig | None]:
    """Frequencies divided by the factors that the file holds for llama3's scaling.

    Where llama3's formula, with the constants of every Llama since 3.1, gives these factors, the
    formula is used instead: it is exact, and a Hugging Face config can express it.
    """
    config = dataclasses.replace(from_huggingface(hf_config), **biases)
    factors = file.read(_ROPE_FACTORS).astype(np.float32)
    rope = config.ropes[0]
    if factors.shape != (len(rope.frequencies),) or not (factors > 0).all():
        raise InputError(
            f"tensor {_ROPE_FACTORS} must hold {len(rope.frequencies)} positive numbers"
        )
    frequencies = np.asarray(rope.frequencies, np.float32) / factors
    formula = _llama3_scaling(np.asarray(rope.frequencies), factors)
    if formula is not None:
        with_formula = copy.deepcopy(hf_config)
        with_formula.rope_parameters = {**hf_config.rope_parameters, **formula}
        known = from_huggingface(with_formula)
        if np.allclose(known.ropes[0].frequencies, frequencies, rtol=1e-5, atol=0):
            config = dataclasses.replace(config, ropes=known.ropes)
            return config, with_formula if config == known else None
    rope = dataclasses.replace(rope, frequencies=tuple(frequencies.tolist()))
    return dataclasses.replace(config, ropes=(rope, *config.ropes[1:])), None


def _llama3_scaling(frequencies: np.ndarray, factors: np.ndarray) -> dict[str, Any] | None:
    """`rope_parameters` of type llama3 that may be behind factors; None where none can be."""
    low, high, most = 1.0, 4.0, float(factors.max())
    between = (factors > 1.001) & (factors < 0.999 * most)
    if not between.any():
        return None
    # 1 / factor = (1 - s) / most + s, with s = (original / wavelength - low) / (high - low)
    smooth = (1 / factors[between] - 1 / most) / (1 - 1 / most)
    original = (low + smooth * (high - low)) * 2 * np.pi / frequencies[between]
    return {
        "rope_type": "llama3",
        "factor": most,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": round(float(np.median(original))),
    }


def _rows_in_halves(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from pairs (0, 1), (2, 3), ... to halves 0, 2, ... then 1, 3, ..."""
    pairs = x.reshape(heads, -1, 2, *x.shape[1:])
    return pairs.swapaxes(1, 2).reshape(x.shape)


_PAIRED = ("llama", "mistral")  # families that the converter writes as llama


def _query_rows(x: np.ndarray, c: ModelConfig) -> np.ndarray:
    return _rows_in_halves(x, c.heads).T if c.family in _PAIRED else x.T


def _key_rows(x: np.ndarray, c: ModelConfig) -> np.ndarray:
    return _rows_in_halves(x, c.kv_heads).T if c.family in _PAIRED else x.T


def _without_offset(x: np.ndarray, c: ModelConfig) -> np.ndarray:
    return x.astype(np.float32) - np.float32(c.norm_offset)


def _linear(path: str, tensor: str) -> KeyTable:
    return {
        f"{path}/kernel": Key(f"{tensor}.weight", lambda x, _: x.T, rows=1),
        f"{path}/bias": Key(f"{tensor}.bias", rows=0),
    }


def _norm(path: str, tensor: str) -> KeyTable:
    return {f"{path}/scale": Key(f"{tensor}.weight", _without_offset, rows=0)}


# `Checkpoint` takes the keys that a config calls for.
_TABLE: KeyTable = {
    "embed/table": Key("token_embd.weight", rows=0),
    **_norm("final_norm", "output_norm"),
    **_linear("head", "output"),
    **_norm("layers/attention_norm", "blk.{l}.attn_norm"),
    **_norm("layers/attention_post_norm", "blk.{l}.post_attention_norm"),
    **_norm("layers/mlp_norm", "blk.{l}.ffn_norm"),
    **_norm("layers/mlp_post_norm", "blk.{l}.post_ffw_norm"),
    **_norm("layers/attention/q_norm", "blk.{l}.attn_q_norm"),
    **_norm("layers/attention/k_norm", "blk.{l}.attn_k_norm"),
    "layers/attention/q/kernel": Key("blk.{l}.attn_q.weight", _query_rows),
    "layers/attention/q/bias": Key("blk.{l}.attn_q.bias", _query_rows),
    "layers/attention/k/kernel": Key("blk.{l}.attn_k.weight", _key_rows),
    "layers/attention/k/bias": Key("blk.{l}.attn_k.bias", _key_rows),
    **_linear("layers/attention/v", "blk.{l}.attn_v"),
    **_linear("layers/attention/o", "blk.{l}.attn_output"),
    **_linear("layers/mlp/gate", "blk.{l}.ffn_gate"),
    **_linear("layers/mlp/up", "blk.{l}.ffn_up"),
    **_linear("layers/mlp/down", "blk.{l}.ffn_down"),
}
