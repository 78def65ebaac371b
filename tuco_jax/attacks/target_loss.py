"""Losses of a target text behind many attack strings, and their gradient by the strings' tokens.

    loss = -mean_c log p(target_c | before, attack, after, target_<c)

What stands before the attack is read once: its keys and values serve every candidate and the
gradient. All prompts are padded to one shape, so that each function is compiled once.

Legend: L layers, K key/value heads, h head width, P tokens before the attack (padded), A tokens of
the attack, S tokens of attack, rest and target (padded), C tokens of the target (padded), N
candidates, V vocabulary, D residual width.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, variables
from tuco_jax.models.layers import (
    KeysValues,
    Positions,
    block_delta,
    block_keys_values,
    layer_infos,
)
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = ["Model", "Pieces", "Scene", "candidate_losses", "scenes", "token_gradient"]


@struct.dataclass
class Model:
    """One model to attack: parameters and low-rank factors ({}: none), its config static."""

    params: Params
    lora: Params
    config: ModelConfig = struct.field(pytree_node=False)

    @classmethod
    def tuned(cls, pair: Pair) -> "Model":
        """The tuned half of a pair."""
        return cls(pair.tuned_params, pair.lora, pair.tuned_config)

    @classmethod
    def base(cls, pair: Pair) -> "Model":
        """The base half of a pair."""
        return cls(pair.base, {}, pair.base_config)


class Pieces(NamedTuple):
    """Token ids of one prompt, int32: what stands before the attack, it, the rest, the target."""

    before: np.ndarray
    attack: np.ndarray
    after: np.ndarray
    target: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """All of it in order."""
        return np.concatenate(self)


@struct.dataclass
class Scene:
    """One prompt, ready for attack strings of one length.

    held: keys and values of what stands before, [L, K, P, h] each; before: how many of them are
    real. tokens [S]: attack, rest, target; length: how many are real. columns [C] of S after which
    the target's tokens stand; targets [C]; real [C], False at padding.
    """

    held: KeysValues
    before: jax.Array
    tokens: jax.Array
    length: jax.Array
    columns: jax.Array
    targets: jax.Array
    real: jax.Array


def scenes(model: Model, prompts: Sequence[Pieces]) -> list[Scene]:
    """Every prompt with its keys and values, all padded to one shape."""
    ahead = max(1, max(p.before.size for p in prompts))
    behind = max(p.whole.size - p.before.size for p in prompts)
    longest = max(p.target.size for p in prompts)
    found = []
    for p in prompts:
        rest = p.whole[p.before.size :]
        first = rest.size - p.target.size - 1
        columns = np.minimum(first + np.arange(longest), rest.size - 1)
        before = jnp.int32(p.before.size)
        found.append(
            Scene(
                _read(model, _padded(p.before, ahead), before, jnp.int32(p.whole.size)),
                before,
                _padded(rest, behind),
                jnp.int32(rest.size),
                jnp.asarray(columns, jnp.int32),
                _padded(p.target, longest),
                jnp.arange(longest) < p.target.size,
            )
        )
    return found


def _padded(ids: np.ndarray, size: int) -> jax.Array:
    return jnp.asarray(np.pad(ids, (0, size - ids.size)), jnp.int32)


@jax.jit
def _read(model: Model, tokens: jax.Array, before: jax.Array, total: jax.Array) -> KeysValues:
    """Keys and values [L, K, P, h] of the first `before` of tokens [P], in a row of `total`."""
    mask = (jnp.arange(tokens.size) < before)[None]
    at = Positions.of(model.config, mask, lengths=total[None])
    x = decoder.embed(model.config, model.params, tokens[None], at)

    def body(x, xs):
        layer, lora, info = xs
        weights = variables(layer, lora)
        held = block_keys_values(model.config, weights, x, at, info)
        x = x + block_delta(model.config, weights, x, held, at, at, info).total
        return x, jax.tree.map(lambda a: a[0], held)

    return jax.lax.scan(body, x, _layers(model))[1]


def _layers(model: Model):
    lora = model.lora.get("layers", {})
    return model.params["layers"], lora, layer_infos(model.config)


def _positions(config: ModelConfig, scene: Scene) -> tuple[Positions, Positions]:
    """Of the tokens behind `before`, one row; of all keys."""
    behind, ahead = jnp.arange(scene.tokens.size), jnp.arange(scene.held[0].shape[2])
    index, mask = scene.before + behind, behind < scene.length
    total = (scene.before + scene.length)[None]
    query = Positions.at(config, index[None], mask[None], None, total)
    index = jnp.concatenate([ahead, index])
    mask = jnp.concatenate([ahead < scene.before, mask])
    return query, Positions(index[None], mask[None], None, None, None)


def _target_logits(model: Model, scene: Scene, x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Logits [N, C, V] at the target's columns, for streams x_0 [N, S, D]."""
    query, key = _positions(model.config, scene)

    def body(x, xs):
        (layer, lora, info), held = xs
        weights = variables(layer, lora)
        new = block_keys_values(model.config, weights, x, query, info)
        seen = tuple(
            jnp.concatenate([jnp.broadcast_to(old, (len(x), *old.shape)), own], axis=2)
            for old, own in zip(held, new, strict=True)
        )
        x = x + block_delta(model.config, weights, x, seen, query, key, info).total
        return constrain(x, mesh), None

    x, _ = jax.lax.scan(body, constrain(x, mesh), (_layers(model), scene.held))
    return decoder.logits(model.config, model.params, x[:, scene.columns], model.lora)


def _losses(
    model: Model, scene: Scene, x: jax.Array, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """Mean negative log likelihood of the target [N], and the target's greedy tokens [N, C]."""
    logits = _target_logits(model, scene, x, mesh)
    chances = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(chances, scene.targets[None, :, None], axis=2)[..., 0]
    loss = -jnp.sum(jnp.where(scene.real, own, 0), axis=1) / jnp.sum(scene.real)
    greedy = (jnp.argmax(logits, axis=-1) == scene.targets) | ~scene.real
    return loss, greedy


def _embed(model: Model, scene: Scene, attacks: jax.Array) -> jax.Array:
    """x_0 [N, S, D] with attacks [N, A] in their place."""
    query, _ = _positions(model.config, scene)
    rest = jnp.broadcast_to(scene.tokens, (len(attacks), scene.tokens.size))
    tokens = jnp.concatenate([attacks, rest[:, attacks.shape[1] :]], axis=1)
    return decoder.embed(model.config, model.params, tokens, query)


@functools.partial(jax.jit, static_argnames="mesh")
def candidate_losses(
    model: Model, scene: Scene, attacks: jax.Array, *, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Loss [N] of attacks [N, A] int, nats a token; whether each target token is greedy [N, C].

    mesh: where the model is spread; candidates then stay cut by rows.
    """
    return _losses(model, scene, _embed(model, scene, attacks), mesh)


@functools.partial(jax.jit, static_argnames="mesh")
def token_gradient(
    model: Model, scene: Scene, attack: jax.Array, *, mesh: Mesh | None = None
) -> jax.Array:
    """Gradient [A, V] of the loss by the one-hot rows of attack [A] int.

    A one-hot row enters through the table alone, so its gradient is the stream's times the table.
    """
    x = _embed(model, scene, attack[None])

    def loss(own: jax.Array) -> jax.Array:
        return _losses(model, scene, x.at[0, : attack.size].set(own), mesh)[0][0]

    by_stream = jax.grad(loss)(x[0, : attack.size])
    table = model.params["embed"]["table"].astype(jnp.float32)
    return model.config.embed_scale * jnp.matmul(by_stream, table.T, precision="highest")
