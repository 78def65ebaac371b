"""The tuned model's trajectory against the base's: the paper's beta, its bound, and OutputCo.

Legend: B batch, T tokens, D residual width, L layers, n x d a row's real tokens times D. All norms
are L1 over n x d unless said otherwise; padding does not count.

With d_l the distance of the two streams after l layers, started from one x_0 (Proposition 4.2 of
arXiv 2506.23423):

    |d_L| <= max_l |FTC_l| (1 + B)^L <= L M (1 + B)^L beta / (1 - beta)

M = max_l |PTC(x_l, l)|, beta = max_l beta_l, and B a Lipschitz constant of PTC. The paper's B is a
supremum over all inputs, which nobody can compute. The proof needs it only at the pairs of points
that the two streams visit, so the largest ratio observed there makes the inequality a true one
for the prompt at hand.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from tuco_jax.core.layer import PairLayer
from tuco_jax.core.places import Places, last_column, pick
from tuco_jax.core.stream import begin, share
from tuco_jax.core.walk import Source, as_source, walk
from tuco_jax.models import decoder
from tuco_jax.models.layers import Positions
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = ["Trajectories", "TrajectoriesStep", "output_co", "trajectories"]


@struct.dataclass
class Trajectories:
    """Result of `trajectories`, float32.

    beta [L, B]: |FTC_l| / (|PTC_l| + |FTC_l|) for l = 1..L, sums over layers below l.
    max_ptc [B]: M. max_ftc [B]: max_l |FTC_l|. lipschitz [B]: the largest observed
    |PTC(x) - PTC(y)| / |x - y|, x and y the two streams. distance [B]: |x_L^FT - x_L^PT|.
    tight_bound [B]: max_ftc (1 + lipschitz)^L. bound [B]: the proposition's own; infinite where
    beta is 1. distance <= tight_bound <= bound.
    """

    beta: jax.Array
    max_ptc: jax.Array
    max_ftc: jax.Array
    lipschitz: jax.Array
    distance: jax.Array
    tight_bound: jax.Array
    bound: jax.Array


@struct.dataclass
class TrajectoriesStep:
    """One layer of both streams. carry: x of FT, y of PT, and the sums of PTC and FTC along x.

    Returns beta_l, |PTC(x)|, |FTC_l| and |PTC(x) - PTC(y)| / |x - y|, [B] each; mask [B, T].
    """

    places: Places
    mask: jax.Array
    mesh: Mesh | None = struct.field(pytree_node=False)

    def __call__(self, carry: Any, layer: PairLayer, _: None) -> tuple[Any, Any]:
        """Three blocks: the base's on each stream, the tuned one's on its own."""
        x, y, ptc, ftc = carry
        on_x = layer.base.whole(x, self.places.base).total
        on_y = layer.base.whole(y, self.places.base).total
        step = layer.tuned.whole(x, self.places.tuned).total
        norm = functools.partial(_norm, self.mask)
        gap = norm(x - y)
        ratio = jnp.where(gap == 0, 0, norm(on_x - on_y) / jnp.where(gap == 0, 1, gap))
        ptc, ftc = ptc + on_x, ftc + step - on_x
        p, f = norm(ptc), norm(ftc)
        beta = jnp.where(p + f == 0, 0, f / jnp.where(p + f == 0, 1, p + f))
        carry = constrain((x + step, y + on_y, ptc, ftc), self.mesh)
        return carry, (beta, norm(on_x), f, ratio)


def trajectories(
    pair: Pair | Source, tokens: jax.Array, mask: jax.Array, *, mesh: Mesh | None = None
) -> Trajectories:
    """Run both models from the tuned model's x_0 and compare their streams.

    tokens [B, T] int, mask [B, T] True at real tokens; mesh: where the pair is spread. Costs three
    forward passes.
    """
    source = as_source(pair)
    x, places = _begin(source.ends, tokens, mask, mesh=mesh)
    zeros = jnp.zeros_like(x)
    step = TrajectoriesStep(places, mask, mesh)
    (x, y, _, _), (beta, ptc, ftc, ratios) = walk(step, (x, x, zeros, zeros), source)
    depth = source.ends.base_config.depth
    max_ptc, max_ftc, lipschitz, worst = ptc.max(0), ftc.max(0), ratios.max(0), beta.max(0)
    growth = (1 + lipschitz) ** depth
    below_one = jnp.where(worst < 1, 1 - worst, 1)
    bound = jnp.where(worst < 1, depth * max_ptc * growth * worst / below_one, jnp.inf)
    distance = _norm(mask, x - y)
    return Trajectories(beta, max_ptc, max_ftc, lipschitz, distance, max_ftc * growth, bound)


def _norm(mask: jax.Array, x: jax.Array) -> jax.Array:
    """L1 over a row's real tokens times D, [B]."""
    return jnp.sum(jnp.where(mask.astype(bool)[..., None], jnp.abs(x), 0), axis=(1, 2))


@functools.partial(jax.jit, static_argnames="mesh")
def _begin(
    ends: Pair, tokens: jax.Array, mask: jax.Array, *, mesh: Mesh | None
) -> tuple[jax.Array, Places]:
    places = Places.of(ends, mask)
    return begin(ends, tokens, None, places, mesh), places


def output_co(
    pair: Pair,
    tokens: jax.Array,
    mask: jax.Array,
    *,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> jax.Array:
    """OutputCo [B]: |x^FT - x^PT| / (|x^PT| + |x^FT - x^PT|) of the last token's final streams.

    Two ordinary forward passes, each model from its own embedding. Where the tuned vocabulary is
    larger, tokens that the base does not know take its last row.
    """
    column = last_column(mask)[:, None]

    def final(config, params, lora):
        positions = Positions.of(config, mask)
        known = jnp.minimum(tokens, config.vocab_size - 1)
        x = decoder.embed(config, params, known, positions)
        x, _ = decoder.forward(config, params, x, positions, lora, mesh=mesh)
        return pick(x, column)[:, 0]

    base = final(pair.base_config, pair.base, {})
    tuned = final(pair.tuned_config, pair.tuned_params, pair.lora)
    return share(base, tuned - base, norm)
