"""From a Hugging Face config to a `ModelConfig`: one small mapping for each family.

A new family is one mapping here, one key table (`weights/keys.py`) and one parity case
(`tests/tuco/models/test_parity.py`). Zephyr is Mistral or Gemma, Vicuna is Llama.
"""

import math
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from common_jax.errors import InputError
from tuco_jax.models.config import ModelConfig, Rope
from tuco_jax.models.rope import resolve_rope

__all__ = ["check_supported", "from_huggingface"]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_MULTIMODAL = "gemma3"  # wraps a gemma3_text

Fields = dict[str, Any]


def from_huggingface(config: PreTrainedConfig) -> ModelConfig:
    """Map a transformers config to ours; of a multimodal Gemma 3, the text model.

    Raises InputError, one line that names the field, for a family or a setting that the block
    does not have.
    """
    check_supported(config.model_type)
    if config.model_type == _MULTIMODAL:
        config = config.get_text_config()
    if getattr(config, "quantization_config", None):
        raise InputError(
            "quantization_config: quantised weights are not read; "
            "dequantise the model, or give an unquantised one"
        )
    if getattr(config, "use_bidirectional_attention", None) not in (None, False):
        raise InputError("use_bidirectional_attention: only causal models are supported")
    try:
        return ModelConfig(family=config.model_type, **_MAPPINGS[config.model_type](config))
    except ValueError as error:
        raise InputError(f"{error}; mend the config") from None
    except TypeError as error:  # such as a number in quotes
        raise InputError(f"a setting is of the wrong type ({error}); mend the config") from None
    except ArithmeticError as error:
        raise InputError(
            f"a size or a scale is 0 or too large ({error}); mend the config"
        ) from None


def check_supported(model_type: str) -> None:
    """Raise InputError, naming what is supported, unless `model_type` is."""
    if model_type not in _MAPPINGS and model_type != _MULTIMODAL:
        raise InputError(
            f"model_type {model_type!r} is not supported; supported are "
            f"{', '.join(sorted(_MAPPINGS))} (Vicuna is llama, Zephyr mistral or gemma)"
        )


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise InputError(
            f"activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _windows(c: PreTrainedConfig, layer_types: list[str] | None) -> tuple[int, ...]:
    """Each layer's window: the sliding layers have it, or all where layers have no types."""
    window = getattr(c, "sliding_window", None) or 0
    if layer_types is None:
        return (window,) * c.num_hidden_layers
    known = {"full_attention": 0, "sliding_attention": window}
    for kind in layer_types:
        if kind not in known:
            raise InputError(f"layer_types: {kind!r} is not supported")
    return tuple(known[kind] for kind in layer_types)


def _common(c: PreTrainedConfig, activation: str = "hidden_act") -> Fields:
    """Fields that Llama and its successors share; a head may be wider than width / heads.

    activation: the field that the family's code in transformers reads.
    """
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return dict(
        vocab_size=c.vocab_size,
        width=c.hidden_size,
        depth=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads or c.num_attention_heads,
        head_dim=head_dim,
        mlp_width=c.intermediate_size,
        max_positions=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        activation=_activation(getattr(c, activation)),
        ropes=_ropes(c, head_dim),
        tied_head=bool(c.tie_word_embeddings),
    )


def _ropes(c: PreTrainedConfig, head_dim: int) -> tuple[Rope, ...]:
    """One rotary embedding, or, where each type of layer has its own, (full, sliding)."""
    parameters = c.rope_parameters
    nested = [parameters[k] for k in ("full_attention", "sliding_attention") if k in parameters]
    return tuple(
        resolve_rope(p, head_dim, c.max_position_embeddings) for p in nested or [parameters]
    )


def _llama(c: PreTrainedConfig) -> Fields:
    bias = c.attention_bias
    return _common(c) | dict(qkv_bias=bias, out_bias=bias, mlp_bias=c.mlp_bias)


def _mistral(c: PreTrainedConfig) -> Fields:
    return _common(c) | dict(windows=_windows(c, None))


def _qwen2(c: PreTrainedConfig) -> Fields:
    return _common(c) | dict(qkv_bias=True, windows=_windows(c, c.layer_types))


def _qwen3(c: PreTrainedConfig) -> Fields:
    bias, windows = c.attention_bias, _windows(c, c.layer_types)
    return _common(c) | dict(qkv_bias=bias, out_bias=bias, windows=windows, qk_norm="head")


def _gemma(c: PreTrainedConfig, activation: str = "hidden_act") -> Fields:
    bias, scale = c.attention_bias, math.sqrt(c.hidden_size)
    return _common(c, activation) | dict(
        qkv_bias=bias, out_bias=bias, norm_offset=1.0, embed_scale=scale
    )


def _gemma2(c: PreTrainedConfig) -> Fields:
    return _gemma(c, "hidden_activation") | dict(
        post_norm=True,
        windows=_windows(c, c.layer_types),
        query_scale=c.query_pre_attn_scalar**-0.5,
        attention_softcap=c.attn_logit_softcapping or 0.0,
        logit_softcap=c.final_logit_softcapping or 0.0,
    )


def _gemma3(c: PreTrainedConfig) -> Fields:
    sliding = tuple(int(kind == "sliding_attention") for kind in c.layer_types)
    # transformers reads attn_logit_softcapping here and never applies it.
    return _gemma2(c) | dict(attention_softcap=0.0, qk_norm="head", rope_index=sliding)


def _phi3(c: PreTrainedConfig) -> Fields:
    return _common(c) | dict(windows=_windows(c, None))


def _olmo2(c: PreTrainedConfig) -> Fields:
    bias = c.attention_bias
    return _common(c) | dict(
        qkv_bias=bias, out_bias=bias, pre_norm=False, post_norm=True, qk_norm="width"
    )


def _gpt2(c: PreTrainedConfig) -> Fields:
    for field in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(c, field):
            raise InputError(f"{field}: true is not supported")
    return dict(
        vocab_size=c.vocab_size,
        width=c.n_embd,
        depth=c.n_layer,
        heads=c.n_head,
        kv_heads=c.n_head,
        head_dim=c.n_embd // c.n_head,
        mlp_width=c.n_inner or 4 * c.n_embd,
        max_positions=c.n_positions,
        norm="layer",
        norm_eps=c.layer_norm_epsilon,
        activation=_activation(c.activation_function),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        query_scale=0.0 if c.scale_attn_weights else 1.0,
        tied_head=bool(c.tie_word_embeddings),
    )


def _gpt_neox(c: PreTrainedConfig) -> Fields:
    head_dim = c.hidden_size // c.num_attention_heads
    return dict(
        vocab_size=c.vocab_size,
        width=c.hidden_size,
        depth=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=c.num_attention_heads,
        head_dim=head_dim,
        mlp_width=c.intermediate_size,
        max_positions=c.max_position_embeddings,
        norm="layer",
        norm_eps=c.layer_norm_eps,
        parallel=c.use_parallel_residual,
        activation=_activation(c.hidden_act),
        gated=False,
        qkv_bias=c.attention_bias,
        out_bias=c.attention_bias,
        mlp_bias=True,
        ropes=_ropes(c, head_dim),
        tied_head=bool(c.tie_word_embeddings),
    )


_MAPPINGS: dict[str, Callable[[PreTrainedConfig], Fields]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
