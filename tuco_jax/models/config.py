"""One frozen, hashable description of a decoder, whatever its family.

A family is nothing but a choice of these fields: `from_huggingface` maps a Hugging Face config to
them, and the one block in `layers.py` reads them.
"""

import dataclasses
import math
from typing import Literal

__all__ = ["ModelConfig", "Precision", "Rope"]

# How products with weights take activations, see `numerics.product`.
Precision = Literal["float32", "bfloat16x3", "bfloat16x2", "bfloat16"]

_SIZES = ("vocab_size", "width", "depth", "heads", "kv_heads", "head_dim", "mlp_width")
_SIZES += ("max_positions",)
# No model has more; tuples are made of as many layers, and tables of as many features.
_MOST = dict.fromkeys(_SIZES, 2**31) | {"depth": 10_000, "head_dim": 65_536}
_MOST_EXPERTS = 2048  # of a layer
_SCALES = ("norm_eps", "norm_offset", "query_scale", "embed_scale")
_SCALES += ("attention_softcap", "logit_softcap")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, its scaling already resolved into frequencies.

    `frequencies` [rotary_dim / 2] turn a position into an angle. Rows longer than `switch` tokens
    use `long_frequencies` (LongRoPE), or a base that grows with the row (`dynamic_factor`, NTK).
    Both depend on the row, never on the batch, so that padding and packing change nothing.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0  # multiplies cos and sin (YaRN, LongRoPE)
    long_frequencies: tuple[float, ...] = ()
    long_scale: float = 1.0
    switch: int = 0
    dynamic_factor: float = 0.0
    base: float = 10_000.0

    @property
    def dim(self) -> int:
        """Number of leading features of a head that are rotated."""
        return 2 * len(self.frequencies)

    def kind(self, length: int) -> int:
        """A number that is the same for rows of the same frequencies; length: of a row."""
        if self.dynamic_factor:
            return max(length, self.switch)
        return int(bool(self.long_frequencies) and length > self.switch)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that a decoder's forward pass depends on, apart from its weights."""

    family: str
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma's norms multiply by offset + scale
    pre_norm: bool = True
    post_norm: bool = False  # norms on the outputs of attention and MLP (Gemma 2/3, OLMo 2)
    parallel: bool = False  # attention and MLP read the same stream (GPT-NeoX)

    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    experts: int = 0  # MLPs of a layer, each of mlp_width; 0: one, without a router
    experts_used: int = 0  # of them at a token
    experts_normed: bool = True  # weights of those used add up to 1
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "width"] = "none"
    query_scale: float = 0.0  # 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # 0: none
    logit_softcap: float = 0.0  # 0: none

    ropes: tuple[Rope, ...] = ()  # empty: learned positions
    rope_index: tuple[int, ...] = ()  # [depth], which of `ropes` a layer uses
    windows: tuple[int, ...] = ()  # [depth], 0: the layer sees every earlier token

    embed_scale: float = 1.0
    tied_head: bool = False

    # No part of what the model is: a checksum of its weights does not depend on it.
    precision: Precision = dataclasses.field(default="float32", repr=False)

    def __post_init__(self) -> None:
        if self.experts > _MOST_EXPERTS:
            raise ValueError(f"experts is {self.experts}, more than any model has")
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}")
            if value > _MOST[name]:
                raise ValueError(f"{name} is {value}, more than any model has")
        for name in _SCALES:
            value = float(getattr(self, name))
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
            object.__setattr__(self, name, value)
        if not self.query_scale:
            object.__setattr__(self, "query_scale", self.head_dim**-0.5)
        if not self.rope_index:
            object.__setattr__(self, "rope_index", (0,) * self.depth)
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.depth)
        if len(self.rope_index) != self.depth or len(self.windows) != self.depth:
            raise ValueError(
                f"rope_index and windows need one entry for each of {self.depth} layers"
            )
        if self.experts < 0 or not min(self.experts, 1) <= self.experts_used <= self.experts:
            raise ValueError(f"{self.experts_used} of {self.experts} experts cannot be used")
        if self.experts and (self.mlp_bias or not self.gated):
            raise ValueError("experts have gates, and no biases")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly"
            )
        rotated = {rope.dim for rope in self.ropes}
        if len(rotated) > 1 or any(dim > self.head_dim for dim in rotated):
            raise ValueError(f"heads of {self.head_dim} cannot have {rotated} features rotated")
        if any(not 0 <= index < max(len(self.ropes), 1) for index in self.rope_index):
            raise ValueError(f"rope_index names others than the {len(self.ropes)} rotary tables")

    @property
    def keys_dtype(self) -> str:
        """The dtype of keys and values, which stand in products as activations do."""
        return "bfloat16" if self.precision == "bfloat16" else "float32"
