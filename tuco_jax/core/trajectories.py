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

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from tuco_jax.core.decompose import last_column, share
from tuco_jax.models import decoder
from tuco_jax.models.decoder import merge, variables
from tuco_jax.models.layers import Positions, layer_infos, whole_block
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import constrain

__all__ = ["Trajectories", "output_co", "trajectories"]


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


def trajectories(
    pair: Pair, tokens: jax.Array, mask: jax.Array, *, mesh: Mesh | None = None
) -> Trajectories:
    """Run both models from the tuned model's x_0 and compare their streams.

    tokens [B, T] int, mask [B, T] True at real tokens; mesh: where the pair is spread. Costs three
    forward passes.
    """
    at_base = Positions.of(pair.base_config, mask)
    at_tuned = Positions.of(pair.tuned_config, mask)
    x0 = decoder.embed(pair.tuned_config, pair.tuned_params, tokens, at_tuned)
    x0 = constrain(x0, mesh)
    real = mask.astype(bool)[..., None]

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(real, jnp.abs(x), 0), axis=(1, 2))

    def body(carry, xs):
        x, y, ptc, ftc = carry
        base, changed, lora, base_info, tuned_info = xs
        tuned = variables(merge(base, changed), lora)
        on_x = whole_block(pair.base_config, {"params": base}, x, at_base, base_info).total
        on_y = whole_block(pair.base_config, {"params": base}, y, at_base, base_info).total
        step = whole_block(pair.tuned_config, tuned, x, at_tuned, tuned_info).total
        gap = norm(x - y)
        ratio = jnp.where(gap == 0, 0, norm(on_x - on_y) / jnp.where(gap == 0, 1, gap))
        ptc, ftc = ptc + on_x, ftc + step - on_x
        p, f = norm(ptc), norm(ftc)
        beta = jnp.where(p + f == 0, 0, f / jnp.where(p + f == 0, 1, p + f))
        carry = constrain((x + step, y + on_y, ptc, ftc), mesh)
        return carry, (beta, norm(on_x), f, ratio)

    stacked = (
        pair.base["layers"],
        pair.tuned.get("layers", {}),
        pair.lora.get("layers", {}),
        layer_infos(pair.base_config),
        layer_infos(pair.tuned_config),
    )
    zeros = jnp.zeros_like(x0)
    (x, y, _, _), (beta, ptc, ftc, ratios) = jax.lax.scan(body, (x0, x0, zeros, zeros), stacked)
    depth = pair.base_config.depth
    max_ptc, max_ftc, lipschitz, worst = ptc.max(0), ftc.max(0), ratios.max(0), beta.max(0)
    growth = (1 + lipschitz) ** depth
    below_one = jnp.where(worst < 1, 1 - worst, 1)
    bound = jnp.where(worst < 1, depth * max_ptc * growth * worst / below_one, jnp.inf)
    return Trajectories(beta, max_ptc, max_ftc, lipschitz, norm(x - y), max_ftc * growth, bound)


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
    column = last_column(mask)[:, None, None]

    def final(config, params, lora):
        positions = Positions.of(config, mask)
        known = jnp.minimum(tokens, config.vocab_size - 1)
        x = decoder.embed(config, params, known, positions)
        x, _ = decoder.forward(config, params, x, positions, lora, mesh=mesh)
        return jnp.take_along_axis(x, column, axis=1)[:, 0]

    base = final(pair.base_config, pair.base, {})
    tuned = final(pair.tuned_config, pair.tuned_params, pair.lora)
    return share(base, tuned - base, norm)
