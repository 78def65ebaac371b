"""Where each family's parameters are in a Hugging Face checkpoint: one table for each family.

A table is used in both directions: a stored tensor is split into parameters (import), and the
parameters are joined into the tensor (export). Paths are those of `models/decoder.py`; `{l}` is
the layer, `{e}` the expert. Rows that a config does not need (biases, query/key norms) are
skipped.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from tuco_jax.models.config import ModelConfig
from tuco_jax.weights.assemble import Key, KeyTable, stored_names

__all__ = ["FAMILIES", "Family", "Layout", "Stored"]

Tensor = Shaped[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one stored tensor holds parameters, in both directions.

    `rows`: the parameter's axis along which the tensor's rows run, if `split` works row by row
    (`assemble.Key`).
    """

    split: Callable[[Tensor, ModelConfig], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], ModelConfig], Tensor]
    rows: Literal[0, 1] | None = None


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint and the parameters that it holds."""

    tensor: str
    paths: tuple[str, ...]
    layout: Layout

    def names(self, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Its name in every layer (and expert), and what part of the parameters it holds there."""
        return stored_names(self.tensor, self.paths[0], config)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's table. Its names are those written by transformers.

    prefixes: what may stand before a name, or be missing, in checkpoints that others wrote.
    aliases: other names of a tensor. ignore: patterns of tensors that no forward pass needs.
    """

    rows: tuple[Stored, ...]
    prefixes: tuple[str, ...] = ("model.",)
    aliases: tuple[tuple[str, str], ...] = ()
    ignore: tuple[str, ...] = ()

    def table(self) -> KeyTable:
        """The keys that a `Checkpoint` is read by."""
        return {
            path: Key(row.tensor, functools.partial(_part, row.layout, i), row.layout.rows)
            for row in self.rows
            for i, path in enumerate(row.paths)
        }

    def bare(self, tensor: str) -> str:
        """A tensor's name without prefix and alias: equal for all spellings of one tensor."""
        tensor = dict(self.aliases).get(tensor, tensor)
        for prefix in self.prefixes:
            if tensor.startswith(prefix):
                return tensor.removeprefix(prefix)
        return tensor


def _part(layout: Layout, index: int, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
    return layout.split(tensor, config)[index]


def _head_widths(c: ModelConfig) -> tuple[int, int, int]:
    """Output features of q, k and v."""
    return c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim


def _split_qkv(x: np.ndarray, c: ModelConfig) -> Sequence[np.ndarray]:
    """Rows of q, k and v one after another -> three kernels."""
    q, k, _ = _head_widths(c)
    return x[:q].T, x[q : q + k].T, x[q + k :].T


def _split_heads(x: np.ndarray, c: ModelConfig) -> list[np.ndarray]:
    """Rows q, k, v of head 0, then of head 1, ... (GPT-NeoX) -> three kernels or biases."""
    heads = x.reshape(c.heads, 3, c.head_dim, *x.shape[1:])
    return [heads[:, i].reshape(-1, *x.shape[1:]).T for i in range(3)]


def _join_heads(parts: Sequence[np.ndarray], c: ModelConfig) -> np.ndarray:
    heads = [p.T.reshape(c.heads, 1, c.head_dim, *p.T.shape[1:]) for p in parts]
    return np.concatenate(heads, axis=1).reshape(-1, *parts[0].T.shape[1:])


def _stacked_rows(parts: Sequence[np.ndarray], _: ModelConfig) -> np.ndarray:
    return np.concatenate([p.T for p in parts])


_SAME = Layout(lambda x, _: (x,), lambda parts, _: parts[0], rows=0)
_TRANSPOSED = Layout(lambda x, _: (x.T,), lambda parts, _: parts[0].T, rows=1)
_FUSED_QKV = Layout(_split_qkv, _stacked_rows)
_FUSED_HEADS = Layout(_split_heads, _join_heads)
_FUSED_GATE_UP = Layout(lambda x, _: [half.T for half in np.split(x, 2)], _stacked_rows)
_FUSED_COLUMNS = Layout(  # GPT-2's Conv1D holds [in, out]
    lambda x, _: np.split(x, 3, axis=-1), lambda parts, _: np.concatenate(parts, axis=-1)
)

_Q, _K, _V, _O = (f"layers/attention/{name}" for name in "qkvo")
_GATE, _UP, _DOWN = (f"layers/mlp/{name}" for name in ("gate", "up", "down"))


def _one(tensor: str, path: str, layout: Layout = _SAME) -> tuple[Stored, ...]:
    return (Stored(tensor, (path,), layout),)


def _linear(tensor: str, path: str, layout: Layout = _TRANSPOSED) -> tuple[Stored, ...]:
    return _one(f"{tensor}.weight", f"{path}/kernel", layout) + _one(
        f"{tensor}.bias", f"{path}/bias"
    )


def _fused(tensor: str, paths: Sequence[str], layout: Layout) -> tuple[Stored, ...]:
    return (
        Stored(f"{tensor}.weight", tuple(f"{p}/kernel" for p in paths), layout),
        Stored(f"{tensor}.bias", tuple(f"{p}/bias" for p in paths), layout),
    )


def _norm(tensor: str, path: str) -> tuple[Stored, ...]:
    return _one(f"{tensor}.weight", f"{path}/scale") + _one(f"{tensor}.bias", f"{path}/bias")


_LAYER = "model.layers.{l}"
_ENDS = (
    *_one("model.embed_tokens.weight", "embed/table"),
    *_norm("model.norm", "final_norm"),
    *_one("lm_head.weight", "head/kernel", _TRANSPOSED),
)
_ATTENTION = (
    *_linear(f"{_LAYER}.self_attn.q_proj", _Q),
    *_linear(f"{_LAYER}.self_attn.k_proj", _K),
    *_linear(f"{_LAYER}.self_attn.v_proj", _V),
    *_linear(f"{_LAYER}.self_attn.o_proj", _O),
    *_norm(f"{_LAYER}.self_attn.q_norm", "layers/attention/q_norm"),
    *_norm(f"{_LAYER}.self_attn.k_norm", "layers/attention/k_norm"),
)
_SEPARATE = (
    *_ATTENTION,
    *_linear(f"{_LAYER}.mlp.gate_proj", _GATE),
    *_linear(f"{_LAYER}.mlp.up_proj", _UP),
    *_linear(f"{_LAYER}.mlp.down_proj", _DOWN),
)
_PRE_NORMS = (
    *_norm(f"{_LAYER}.input_layernorm", "layers/attention_norm"),
    *_norm(f"{_LAYER}.post_attention_layernorm", "layers/mlp_norm"),
)
_POST_NORMS = (
    *_norm(f"{_LAYER}.post_attention_layernorm", "layers/attention_post_norm"),
    *_norm(f"{_LAYER}.post_feedforward_layernorm", "layers/mlp_post_norm"),
)
_SANDWICH_NORMS = (
    *_norm(f"{_LAYER}.input_layernorm", "layers/attention_norm"),
    *_norm(f"{_LAYER}.pre_feedforward_layernorm", "layers/mlp_norm"),
    *_POST_NORMS,
)
_ROTARY_BUFFER = (r".*\.rotary_emb\.inv_freq",)


def _mixture(module: str, gate: str, up: str, down: str) -> tuple[Stored, ...]:
    """A router and its experts, stored one by one; none has biases."""
    names = {gate: _GATE, up: _UP, down: _DOWN}
    return _one(f"{module}.gate.weight", "layers/mlp/router/kernel", _TRANSPOSED) + tuple(
        Stored(f"{module}.experts.{{e}}.{name}.weight", (f"{path}/kernel",), _TRANSPOSED)
        for name, path in names.items()
    )


_LLAMA = Family(_ENDS + _SEPARATE + _PRE_NORMS, ignore=_ROTARY_BUFFER)
_GEMMA2 = Family(_ENDS + _SEPARATE + _SANDWICH_NORMS, ignore=_ROTARY_BUFFER)
_GEMMA3 = Family(  # a multimodal checkpoint's text model, too
    _ENDS + _SEPARATE + _SANDWICH_NORMS,
    prefixes=("model.language_model.", "language_model.model.", "language_model.", "model."),
    ignore=(*_ROTARY_BUFFER, r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
)
_OLMO2 = Family(_ENDS + _SEPARATE + _POST_NORMS, ignore=_ROTARY_BUFFER)
_PHI3 = Family(
    (
        *_ENDS,
        *_fused(f"{_LAYER}.self_attn.qkv_proj", (_Q, _K, _V), _FUSED_QKV),
        *_linear(f"{_LAYER}.self_attn.o_proj", _O),
        *_fused(f"{_LAYER}.mlp.gate_up_proj", (_GATE, _UP), _FUSED_GATE_UP),
        *_linear(f"{_LAYER}.mlp.down_proj", _DOWN),
        *_PRE_NORMS,
    ),
    ignore=_ROTARY_BUFFER,
)
_MIXTRAL = Family(
    (
        *_ENDS,
        *_ATTENTION,
        *_PRE_NORMS,
        *_mixture(f"{_LAYER}.block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    ignore=_ROTARY_BUFFER,
)
_QWEN3_MOE = Family(
    (
        *_ENDS,
        *_ATTENTION,
        *_PRE_NORMS,
        *_mixture(f"{_LAYER}.mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    ignore=_ROTARY_BUFFER,
)
_GPT2 = Family(
    (
        *_one("transformer.wte.weight", "embed/table"),
        *_one("transformer.wpe.weight", "positions/table"),
        *_fused("transformer.h.{l}.attn.c_attn", (_Q, _K, _V), _FUSED_COLUMNS),
        *_linear("transformer.h.{l}.attn.c_proj", _O, _SAME),
        *_linear("transformer.h.{l}.mlp.c_fc", _UP, _SAME),
        *_linear("transformer.h.{l}.mlp.c_proj", _DOWN, _SAME),
        *_norm("transformer.h.{l}.ln_1", "layers/attention_norm"),
        *_norm("transformer.h.{l}.ln_2", "layers/mlp_norm"),
        *_norm("transformer.ln_f", "final_norm"),
        *_one("lm_head.weight", "head/kernel", _TRANSPOSED),
    ),
    prefixes=("transformer.",),
    ignore=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
)
_GPT_NEOX = Family(
    (
        *_one("gpt_neox.embed_in.weight", "embed/table"),
        *_fused("gpt_neox.layers.{l}.attention.query_key_value", (_Q, _K, _V), _FUSED_HEADS),
        *_linear("gpt_neox.layers.{l}.attention.dense", _O),
        *_linear("gpt_neox.layers.{l}.mlp.dense_h_to_4h", _UP),
        *_linear("gpt_neox.layers.{l}.mlp.dense_4h_to_h", _DOWN),
        *_norm("gpt_neox.layers.{l}.input_layernorm", "layers/attention_norm"),
        *_norm("gpt_neox.layers.{l}.post_attention_layernorm", "layers/mlp_norm"),
        *_norm("gpt_neox.final_layer_norm", "final_norm"),
        *_one("embed_out.weight", "head/kernel", _TRANSPOSED),
    ),
    prefixes=("gpt_neox.",),
    aliases=(("lm_head.weight", "embed_out.weight"),),
    ignore=(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _QWEN3_MOE,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi3": _PHI3,
    "olmo2": _OLMO2,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}
