"""Losses of a target text after many attack strings, and their gradient by the strings' tokens.

    loss = -mean_c log p(target_c | before, attack, after, target_<c)

The text before the attack is run once: its keys and values serve every candidate and the gradient.
All prompts are padded to one shape, so that each function is compiled once.

Legend: L layers, K key/value heads, h head width, P tokens before the attack (padded), A tokens of
the attack, S tokens of attack, rest and target (padded), C tokens of the target (padded), N
candidates, V vocabulary, D residual width; n tokens of a text without padding.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from common_jax import struct
from common_jax.mesh import constrain
from tuco_jax.core.cache import Cache, LayerCache
from tuco_jax.core.layer import PairLayer
from tuco_jax.core.places import Places
from tuco_jax.core.residual import begin
from tuco_jax.core.walk import Source, Stacked, as_source, walk
from tuco_jax.models import decoder
from tuco_jax.models.layers import KeysValues
from tuco_jax.models.numerics import product
from tuco_jax.models.pair import Pair

__all__ = [
    "Pieces",
    "CachedPrompt",
    "TunedStep",
    "candidate_losses",
    "cached_prompts",
    "token_gradient",
]


class Pieces(NamedTuple):
    """Token ids of one prompt, int32: before the attack, the attack, after it, the target."""

    before: Int[np.ndarray, " n"]
    attack: Int[np.ndarray, " A"]
    after: Int[np.ndarray, " n"]
    target: Int[np.ndarray, " n"]

    @property
    def whole(self) -> Int[np.ndarray, " n"]:
        """All four, in order."""
        return np.concatenate(self)


@struct.dataclass
class CachedPrompt:
    """One prompt, ready for attack strings of one length.

    cache: of the tokens before the attack, keys and values [L, K, P, h]. before: how many of them
    are real. tokens: attack, rest, target. length: how many of them are real. columns: those of
    `tokens` that predict the target. targets: its tokens. real: False at its padding.
    """

    cache: Cache
    before: Int[Array, ""]
    tokens: Int[Array, " S"]
    length: Int[Array, ""]
    columns: Int[Array, " C"]
    targets: Int[Array, " C"]
    real: Bool[Array, " C"]


@struct.dataclass
class TunedStep:
    """The step of one layer of the tuned model alone; returns its keys and values.

    own: the `LayerCache` of the prefix that all rows follow, one pair; or None.
    """

    places: Places
    cache: Cache | None
    keep: bool = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False)

    def __call__(
        self, x: Float[Array, "N S D"], layer: PairLayer, own: LayerCache | None
    ) -> tuple[Float[Array, "N S D"], KeysValues | None]:
        """Move the stream to x + f_FT."""
        join = None
        if self.cache is not None and own is not None:
            join = functools.partial(self.cache.join, own[0])
        delta, new = layer.tuned.following(x, self.places.tuned, join)
        return constrain(x + delta.total, self.mesh), new if self.keep else None


def cached_prompts(pair: Pair | Source, prompts: Sequence[Pieces]) -> list[CachedPrompt]:
    """Every prompt with the tuned model's keys and values, all padded to one shape."""
    source = as_source(pair)
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
            CachedPrompt(
                _read(source, _padded(p.before, ahead), before, jnp.int32(p.whole.size)),
                before,
                _padded(rest, behind),
                jnp.int32(rest.size),
                jnp.asarray(columns, jnp.int32),
                _padded(p.target, longest),
                jnp.arange(longest) < p.target.size,
            )
        )
    return found


def _padded(ids: Int[np.ndarray, " n"], size: int) -> Int[Array, " size"]:
    return jnp.asarray(np.pad(ids, (0, size - ids.size)), jnp.int32)


def _read(
    source: Source, tokens: Int[Array, " P"], before: Int[Array, ""], total: Int[Array, ""]
) -> Cache:
    """The cache of the first `before` of these tokens, in a row of `total` tokens."""
    x, places, mask = _read_begin(source.ends, tokens, before, total)
    step = TunedStep(places, None, keep=True, mesh=None)
    _, held = walk(step, x, source)
    return Cache.prefix((jax.tree.map(lambda a: a[:, 0], held),), mask)


@jax.jit
def _read_begin(
    ends: Pair, tokens: Int[Array, " P"], before: Int[Array, ""], total: Int[Array, ""]
) -> tuple[Float[Array, "1 P D"], Places, Bool[Array, " P"]]:
    mask = jnp.arange(tokens.size) < before
    places = Places.of(ends, mask[None], lengths=total[None])
    return begin(ends, tokens[None], None, places), places, mask


def _places(ends: Pair, cached: CachedPrompt, rows: int) -> Places:
    """Places of the tokens after `before`, in each of so many rows."""
    behind = jnp.arange(cached.tokens.size)
    index = jnp.broadcast_to((cached.before + behind)[None], (rows, behind.size))
    mask = jnp.broadcast_to((behind < cached.length)[None], (rows, behind.size))
    total = jnp.broadcast_to(cached.before + cached.length, (rows,))
    return Places.after(ends, cached.cache, index, mask, lengths=total)


@functools.partial(jax.jit, static_argnames="mesh")
def _enter(
    ends: Pair, cached: CachedPrompt, attacks: Int[Array, "N A"], *, mesh: Mesh | None
) -> tuple[Float[Array, "N S D"], Places]:
    """x_0 with each of the attacks in its place, and where its tokens stand."""
    places = _places(ends, cached, len(attacks))
    rest = jnp.broadcast_to(cached.tokens, (len(attacks), cached.tokens.size))
    tokens = jnp.concatenate([attacks, rest[:, attacks.shape[1] :]], axis=1)
    return begin(ends, tokens, None, places, mesh), places


def _through(
    source: Source,
    cached: CachedPrompt,
    x: Float[Array, "N S D"],
    places: Places,
    mesh: Mesh | None,
) -> Float[Array, "N S D"]:
    """The residual stream after all layers."""
    step = TunedStep(places, cached.cache.bare(), keep=False, mesh=mesh)
    return walk(step, x, source, cached.cache.keys_values)[0]


@jax.jit
def _losses(
    ends: Pair, cached: CachedPrompt, x: Float[Array, "N S D"]
) -> tuple[Float[Array, " N"], Bool[Array, "N C"]]:
    """Mean negative log likelihood of the target, and which of its tokens are greedy."""
    stream = x[:, cached.columns]
    logits = decoder.logits(ends.tuned_config, ends.tuned_params, stream, ends.lora)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(log_probs, cached.targets[None, :, None], axis=2)[..., 0]
    real = cached.real[None]
    loss = -jnp.sum(jnp.where(real, own, 0), axis=1) / jnp.sum(real).astype(own.dtype)
    greedy = (jnp.argmax(logits, axis=-1) == cached.targets[None]) | ~real
    return loss, greedy


def candidate_losses(
    pair: Pair | Source,
    cached: CachedPrompt,
    attacks: Int[Array, "N A"],
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, " N"], Bool[Array, "N C"]]:
    """Loss of each attack, nats a token; and which target tokens are greedy (the most likely).

    pair: its tuned model is attacked. mesh: the one that it is sharded over; candidates are then
    sharded by rows.
    """
    source = as_source(pair)
    x, places = _enter(source.ends, cached, attacks, mesh=mesh)
    return _losses(source.ends, cached, _through(source, cached, x, places, mesh))


@functools.partial(jax.jit, static_argnames="mesh")
def token_gradient(
    pair: Pair | Stacked,
    cached: CachedPrompt,
    attack: Int[Array, " A"],
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "A V"]:
    """Gradient of the loss by the one-hot rows of the attack's tokens.

    A one-hot row is used in the embedding alone, so its gradient is that of x_0 times the table.
    """
    source = as_source(pair)
    ends = source.ends
    x, places = _enter(ends, cached, attack[None], mesh=mesh)

    def loss(own: Float[Array, "A D"]) -> Float[Array, ""]:
        x_0 = x.at[0, : attack.size].set(own)
        return _losses(ends, cached, _through(source, cached, x_0, places, mesh))[0][0]

    by_stream = jax.grad(loss)(x[0, : attack.size])
    table, config = ends.tuned_params["embed"]["table"], ends.tuned_config
    return config.embed_scale * product(by_stream, table.T, config.precision)
