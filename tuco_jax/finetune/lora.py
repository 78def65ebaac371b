"""Low-rank factors for training: target layers, initial values, scale.

Legend: L layers, r rank. W + scale A B, A [L, in, r], B [L, r, out]; each expert of a mixture has
factors of its own, A [L, E, in, r], B [L, E, r, out]. As in the PEFT library, A
starts uniform in +-1/sqrt(in) (Kaiming's, a = sqrt(5)), B starts at zero, and the scale is not
part of what is trained, so that learning rates mean the same as there.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Key

from common_jax.cli.ranges import PositiveFloat, PositiveInt
from common_jax.errors import InputError
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, param_shapes

__all__ = ["LoraOptions", "fold_scale", "init", "targets"]


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """An adapter.

    Args:
        rank: r, columns of A and rows of B.
        alpha: the update's scale is alpha / rank.
        rslora: make it alpha / sqrt(rank), which keeps updates of one size at high ranks.
        targets: all linear layers, or a list of q, k, v, o, gate, up, down; gate, up and down of
            every expert, where there are some, and their router.
    """

    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    rslora: bool = False
    targets: Literal["all"] | list[str] = "all"

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def targets(config: ModelConfig, names: Literal["all"] | Sequence[str]) -> list[str]:
    """Paths of the target linear layers, such as "layers/attention/q", in a fixed order.

    names: "all", or last components of paths. Raises InputError for one that the model lacks.
    """
    paths = [
        path.removesuffix("/kernel")
        for path in flatten_dict(param_shapes(config), sep="/")
        if path.startswith("layers/") and path.endswith("/kernel")
    ]
    known = {path.rsplit("/", 1)[1]: path for path in sorted(paths)}
    if names == "all":
        return list(known.values())
    for name in names:
        if name not in known:
            raise InputError(
                f"lora.targets: the model has no linear layer {name!r}; it has {', '.join(known)}"
            )
    if not names:
        raise InputError(f"lora.targets is empty; name some of {', '.join(known)}, or all")
    return [path for name, path in known.items() if name in names]


def init(config: ModelConfig, options: LoraOptions, key: Key[Array, ""]) -> Params:
    """Initial float32 factors, without the scale: {"layers": {"attention": {"q": {"a", "b"}}}}."""
    shapes: dict[str, Any] = flatten_dict(param_shapes(config), sep="/")
    factors = {}
    paths = targets(config, options.targets)
    for path, own in zip(paths, jax.random.split(key, len(paths)), strict=True):
        *stacked, rows, columns = shapes[f"{path}/kernel"].shape
        bound = 1 / math.sqrt(rows)
        shape = (*stacked, rows, options.rank)
        factors[f"{path}/a"] = jax.random.uniform(own, shape, minval=-bound, maxval=bound)
        factors[f"{path}/b"] = jnp.zeros((*stacked, options.rank, columns))
    return unflatten_dict(factors, sep="/")


def fold_scale(factors: Params, scale: float) -> Params:
    """The factors as the layers use them, with B multiplied by the scale."""
    if "b" in factors:
        return {"a": factors["a"], "b": scale * factors["b"]}
    return {name: fold_scale(value, scale) for name, value in factors.items()}
