"""A decoder as pure functions on a plain dict of parameters, layers stacked on axis 0.

Legend: B batch, T tokens, D residual width, V vocabulary, L layers, P learned positions, r rank.

    {"embed": {"table": [V, D]}, "positions": {"table": [P, D]} (learned positions only),
     "layers": {... each leaf [L, ...] ...}, "final_norm": {...},
     "head": {"kernel": [D, V]} (absent when tied)}

Low-rank factors live in a tree of their own, "lora", with {"a": [L, in, r], "b": [L, r, out]} in
place of a {"kernel", "bias"}.
"""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from common_jax.mesh import constrain
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.layers import Block, Linear, make_norm, whole_block
from tuco_jax.models.numerics import softcap
from tuco_jax.models.positions import LayerInfo, Positions, layer_infos
from tuco_jax.models.sharding import looked_up

__all__ = [
    "Params",
    "embed",
    "forward",
    "init",
    "logits",
    "merge",
    "param_shapes",
    "variables",
]

Params = dict[str, Any]


def param_shapes(config: ModelConfig) -> Params:
    """The parameter tree of a model of this config, as `jax.ShapeDtypeStruct` leaves (float32)."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Random parameters in float32, norms at one and biases at zero."""
    keys = jax.random.split(key, 5)
    x = jnp.zeros((1, 1, config.width))
    positions = Positions.of(config, jnp.ones((1, 1)))
    info = LayerInfo(jnp.int32(0), jnp.int32(0))

    def init_layer(key: jax.Array) -> Params:
        return cast(Params, Block(config).init(key, x, positions, info)["params"])

    def table(key: jax.Array, rows: int) -> Params:
        return {"table": jax.random.normal(key, (rows, config.width)) / math.sqrt(config.width)}

    params: Params = {
        "embed": table(keys[0], config.vocab_size),
        "layers": jax.vmap(init_layer)(jax.random.split(keys[1], config.depth)),
        "final_norm": make_norm(config).init(keys[2], x)["params"],
    }
    if not config.ropes:
        params["positions"] = table(keys[3], config.max_positions)
    if not config.tied_head:
        params["head"] = Linear(config.vocab_size).init(keys[4], x)["params"]
    return params


def merge(params: Params, overrides: Params | None) -> Params:
    """`params` with the leaves of `overrides` in place of its own; no leaf is copied."""
    if not overrides:
        return params
    merged = dict(params)
    for name, value in overrides.items():
        old = params.get(name)
        merged[name] = merge(old, value) if isinstance(value, dict) and old else value
    return merged


def variables(layer: Params, lora: Params | None = None) -> dict[str, Params]:
    """One layer's parameters and low-rank factors as the variables of `Block.apply`."""
    return {"params": layer, "lora": lora} if lora else {"params": layer}


def embed(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Positions,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> Float[Array, "B T D"]:
    """The residual stream before the first layer, float32. mesh: the one of the parameters."""
    x = looked_up("embed/table", params["embed"]["table"], tokens, mesh)
    if config.embed_scale != 1:
        x *= config.embed_scale
    if "positions" in params:
        index = jnp.maximum(positions.index, 0)
        x += looked_up("positions/table", params["positions"]["table"], index, mesh)
    return x


def forward(
    config: ModelConfig,
    params: Params,
    x: Float[Array, "B T D"],
    positions: Positions,
    lora: Params | None = None,
    *,
    hidden_states: bool = False,
    remat: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "L B T D"] | None]:
    """Run all layers over the residual stream x.

    It is for one model without a pair, in fine-tuning and in parity tests; whatever compares two
    models is a step of `core/walk.py`.

    Returns the stream after the last layer, before the final norm, and, with `hidden_states`, the
    stream after every layer. `remat` recomputes activations in the backward pass. Over a `mesh`,
    the stream stays sharded by rows.
    """

    def body(x: jax.Array, xs: tuple[Params, Params, LayerInfo]):
        layer, factors, info = xs
        x = x + whole_block(config, variables(layer, factors), x, positions, info).total
        x = constrain(x, mesh)
        return x, x if hidden_states else None

    if remat:
        body = jax.checkpoint(body)
    factors = (lora or {}).get("layers", {})
    xs = (params["layers"], factors, layer_infos(config))
    return jax.lax.scan(body, constrain(x, mesh), xs)


def logits(
    config: ModelConfig, params: Params, x: Float[Array, "... D"], lora: Params | None = None
) -> Float[Array, "... V"]:
    """Final norm and unembedding: logits, float32."""
    normed = make_norm(config).apply({"params": params["final_norm"]}, x)
    head = params["head"] if "head" in params else {"kernel": params["embed"]["table"].T}
    y = Linear(config.vocab_size, precision=config.precision).apply(
        variables(head, (lora or {}).get("head")), normed
    )
    return softcap(cast(jax.Array, y), config.logit_softcap)
