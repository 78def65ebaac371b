"""From a Hugging Face config to a `ModelConfig`: one small mapping for each family.

A mapping reads the fields that the family's code in transformers reads, and no others: a field
that is ignored there is ignored here, and one that fails there is refused
(`tests/tuco/models/test_config_fields.py` goes through all of them).

A new family is one mapping here, one key table (`weights/keys.py`) and one parity case
(`tests/tuco/models/test_parity.py`). Zephyr is Mistral or Gemma, Vicuna is Llama.
"""

import copy
import math
from collections.abc import Callable, Mapping
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
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}

_MULTIMODAL = "gemma3"  # wraps a gemma3_text

Fields = dict[str, Any]


def from_huggingface(config: PreTrainedConfig) -> ModelConfig:
    """Map a transformers config to ours; of a multimodal Gemma 3, the text model.

    Raises InputError, one line that names the field, for a family or a setting that the block
    does not have, or that transformers refuses.
    """
    check_supported(config.model_type)
    text = config.get_text_config() if config.model_type == _MULTIMODAL else config
    for part in (config, text):
        _check_plain(part)
    try:
        fields = _MAPPINGS[text.model_type](text)
        if text is not config:  # the whole model ties by its own field, and caps no logits
            tied = bool(getattr(config, "tie_word_embeddings", True))
            fields |= dict(tied_head=tied, logit_softcap=0.0)
        return ModelConfig(family=text.model_type, **fields)
    except ValueError as error:
        raise InputError(f"{error}; mend the config") from None
    except (TypeError, AttributeError, KeyError) as error:  # such as a number in quotes
        raise InputError(f"a setting is of the wrong type ({error}); mend the config") from None
    except ArithmeticError as error:
        raise InputError(
            f"a size or a scale is 0 or too large ({error}); mend the config"
        ) from None


def _check_plain(c: PreTrainedConfig) -> None:
    """InputError for what transformers would apply to any family, and this block to none."""
    if getattr(c, "quantization_config", None):
        raise InputError(
            "quantization_config: quantised weights are not read; "
            "dequantise the model, or give an unquantised one"
        )
    if not getattr(c, "is_causal", True):
        raise InputError("is_causal: only causal models are supported")
    if getattr(c, "is_heterogeneous", False):
        raise InputError("per_layer_config: layers of different shapes are not supported")


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


def _windows(
    c: PreTrainedConfig, layer_types: list[str] | None, *, required: bool = False
) -> tuple[int, ...]:
    """Each layer's window: the sliding layers have it, or all where layers have no types.

    required: transformers asks for a window even where no layer slides.
    """
    window = c.sliding_window
    if layer_types is None:
        slides = (window is not None,) * c.num_hidden_layers
    else:
        known = {"full_attention": False, "sliding_attention": True}
        for kind in layer_types:
            if kind not in known:
                raise InputError(f"layer_types: {kind!r} is not supported")
        slides = tuple(known[kind] for kind in layer_types)
    if (any(slides) or required) and (window is None or window < 1):
        raise InputError(f"sliding_window is {window}; layers that slide need 1 or more")
    return tuple(window if s else 0 for s in slides)


def _softcap(c: PreTrainedConfig, field: str) -> float:
    """A cap of logits, symmetric about 0; 0 for none, which a config writes as null."""
    cap = getattr(c, field)
    if cap == 0:
        raise InputError(f"{field} is 0, which divides by it; write null for no cap")
    return abs(cap) if cap is not None else 0.0


def _head_dim(c: PreTrainedConfig) -> int:
    """Features of a head, which may be more or fewer than width / heads."""
    head_dim = getattr(c, "head_dim", c.hidden_size // c.num_attention_heads)
    if head_dim is None:
        raise InputError("head_dim is null; give the number, or remove the field")
    return head_dim


def _common(
    c: PreTrainedConfig, *, activation: str = "hidden_act", ropes: tuple[Rope, ...] | None = None
) -> Fields:
    """Fields that Llama and its successors share.

    activation: the field that the family's code in transformers reads. ropes: those of a family
    that has not just one.
    """
    kv_heads, pad = c.num_key_value_heads, c.pad_token_id
    if pad is not None and not -c.vocab_size <= pad < c.vocab_size:
        raise InputError(
            f"pad_token_id is {pad}, beyond the vocabulary of {c.vocab_size}; mend one of them"
        )
    return dict(
        vocab_size=c.vocab_size,
        width=c.hidden_size,
        depth=c.num_hidden_layers,
        heads=c.num_attention_heads,
        kv_heads=c.num_attention_heads if kv_heads is None else kv_heads,
        head_dim=_head_dim(c),
        mlp_width=c.intermediate_size,
        max_positions=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        activation=_activation(getattr(c, activation)),
        ropes=(_rope(c, _rope_parameters(c), _head_dim(c)),) if ropes is None else ropes,
        tied_head=bool(c.tie_word_embeddings),
    )


def _rope_parameters(c: PreTrainedConfig) -> Any:
    """A config's `rope_parameters` as transformers reads them when it builds the model.

    Fields beside them, such as original_max_position_embeddings, then go before those in them.
    """
    c = copy.deepcopy(c)
    c.standardize_rope_params()
    return c.rope_parameters


def _rope(c: PreTrainedConfig, parameters: Any, head_dim: int, *, partial: bool = False) -> Rope:
    """One rotary embedding.

    partial: whether the family can rotate a part of each head. Where it cannot, the default type
    ignores partial_rotary_factor, and transformers fails with any other.
    """
    if not isinstance(parameters, Mapping) or "rope_type" not in parameters:
        raise InputError(
            f"rope_parameters: {c.model_type} has one set of them for all its layers, with a "
            f"rope_type; found {parameters!r}"
        )
    factor = parameters.get("partial_rotary_factor", 1.0)
    whole = parameters["rope_type"] == "default" and not partial
    dim = head_dim if whole else int(head_dim * factor)
    rotated = dim + dim % 2
    if dim < 0 or rotated > head_dim or (rotated < head_dim and not partial):
        raise InputError(
            f"partial_rotary_factor {factor}: would rotate {rotated} features of heads of "
            f"{head_dim}, which {c.model_type} cannot; mend the config"
        )
    return resolve_rope(parameters, dim, c.max_position_embeddings)


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


def _mixtral(c: PreTrainedConfig) -> Fields:
    if c.head_dim is None:
        c = copy.deepcopy(c)
        c.head_dim = c.hidden_size // c.num_attention_heads
    return _mistral(c) | dict(experts=_experts(c), experts_used=c.num_experts_per_tok)


def _qwen3_moe(c: PreTrainedConfig) -> Fields:
    if c.mlp_only_layers or c.decoder_sparse_step != 1:
        field = "mlp_only_layers" if c.mlp_only_layers else "decoder_sparse_step"
        raise InputError(
            f"{field} is {getattr(c, field)}: layers without experts beside layers with them are "
            "not supported"
        )
    bias = c.attention_bias
    return _common(c) | dict(
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        mlp_width=c.moe_intermediate_size,
        windows=_windows(c, None),
        experts=_experts(c),
        experts_used=c.num_experts_per_tok,
        experts_normed=bool(c.norm_topk_prob),
    )


def _experts(c: PreTrainedConfig) -> int:
    if c.num_experts < 1:
        raise InputError(f"num_experts is {c.num_experts}; {c.model_type} has 1 or more")
    return c.num_experts


def _gemma(c: PreTrainedConfig, **common: Any) -> Fields:
    if c.use_bidirectional_attention:
        raise InputError("use_bidirectional_attention: only causal models are supported")
    bias, scale = c.attention_bias, math.sqrt(c.hidden_size)
    return _common(c, **common) | dict(
        qkv_bias=bias, out_bias=bias, norm_offset=1.0, embed_scale=scale
    )


def _gemma2(c: PreTrainedConfig, **common: Any) -> Fields:
    if c.query_pre_attn_scalar < 0:
        raise InputError(f"query_pre_attn_scalar is {c.query_pre_attn_scalar}, below 0")
    return _gemma(c, activation="hidden_activation", **common) | dict(
        post_norm=True,
        windows=_windows(c, c.layer_types, required=True),
        query_scale=c.query_pre_attn_scalar**-0.5,
        attention_softcap=_softcap(c, "attn_logit_softcapping"),
        logit_softcap=_softcap(c, "final_logit_softcapping"),
    )


def _gemma3(c: PreTrainedConfig) -> Fields:
    parameters = _rope_parameters(c)
    kinds = [k for k in ("full_attention", "sliding_attention") if k in c.layer_types]
    # YaRN's truncate is read beside the sets of parameters, where no config has it.
    own = [{k: v for k, v in parameters[kind].items() if k != "truncate"} for kind in kinds]
    ropes = tuple(_rope(c, p, _head_dim(c)) for p in own)
    # transformers reads attn_logit_softcapping here and never applies it.
    c = copy.deepcopy(c)
    c.attn_logit_softcapping = None
    fields = _gemma2(c, ropes=ropes)
    index = tuple(kinds.index(kind) for kind in c.layer_types)
    return fields | dict(qk_norm="head", rope_index=index)


def _phi3(c: PreTrainedConfig) -> Fields:
    rope = _rope(c, _rope_parameters(c), _head_dim(c), partial=True)
    return _common(c, ropes=(rope,)) | dict(windows=_windows(c, None))


def _olmo2(c: PreTrainedConfig) -> Fields:
    bias = c.attention_bias
    return _common(c) | dict(
        qkv_bias=bias, out_bias=bias, pre_norm=False, post_norm=True, qk_norm="width"
    )


def _gpt2(c: PreTrainedConfig) -> Fields:
    for field in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(c, field):
            raise InputError(f"{field}: true is not supported")
    if c.n_embd % c.n_head:
        raise InputError(f"n_embd {c.n_embd} is not a multiple of n_head {c.n_head}")
    return dict(
        vocab_size=c.vocab_size,
        width=c.n_embd,
        depth=c.n_layer,
        heads=c.n_head,
        kv_heads=c.n_head,
        head_dim=c.n_embd // c.n_head,
        mlp_width=4 * c.n_embd if c.n_inner is None else c.n_inner,
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
    rotated = getattr(c, "head_dim", None) or head_dim  # attention itself does not read the field
    rope = _rope(c, _rope_parameters(c), rotated, partial=True)
    if rope.dim > head_dim:
        raise InputError(f"head_dim {rotated}: {rope.dim} features of {head_dim} would be rotated")
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
        ropes=(rope,),
        tied_head=bool(c.tie_word_embeddings),
    )


_MAPPINGS: dict[str, Callable[[PreTrainedConfig], Fields]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}
