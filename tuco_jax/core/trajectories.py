"""The tuned model's trajectory against the base's: the paper's beta, its bound, and OutputCo.

Legend: B batch, T tokens, D residual width, L layers, n x d a row's real tokens times D. All norms
are L1 over n x d unless said otherwise; padding does not count.

With d_l the distance of the two streams after l layers, started from one x_0 (Proposition 4.2 of
arXiv 2506.23423):

    |d_L| <= max_l |FTC_l| (1 + B)^L <= L M (1 + B)^L beta / (1 - beta)

M = max_l |PTC(x_l, l)|, beta = max_l beta_l, and B a Lipschitz constant of PTC. The paper's B is a
supremum over all inputs, which cannot be computed. The proof needs it only at the pairs of points
that the two streams visit, so the inequality holds for a prompt with the largest ratio observed
there.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from common_jax import struct
from common_jax.mesh import constrain
from tuco_jax.core.cache import Ahead, LayerCache
from tuco_jax.core.engine import Phase, run
from tuco_jax.core.layer import PairLayer
from tuco_jax.core.places import Places, last_column, pick
from tuco_jax.core.residual import begin, share
from tuco_jax.core.tokens import as_mask, as_tokens
from tuco_jax.core.walk import Source, as_source, walk
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair

__all__ = [
    "FinalStreams",
    "FinalStreamsStep",
    "Streams",
    "Trajectories",
    "TrajectoriesStep",
    "final_streams",
    "output_co",
    "trajectories",
]


@struct.dataclass
class Trajectories:
    """Result of `trajectories`, float32.

    beta: |FTC_l| / (|PTC_l| + |FTC_l|) for l = 1..L, sums over layers below l. max_ptc: M.
    max_ftc: max_l |FTC_l|. lipschitz: the largest observed |PTC(x) - PTC(y)| / |x - y|, x and y
    the two streams. distance: |x_L^FT - x_L^PT|. tight_bound: max_ftc (1 + lipschitz)^L. bound:
    the proposition's; infinite where beta is 1. distance <= tight_bound <= bound.
    """

    beta: Float[Array, "L B"]
    max_ptc: Float[Array, " B"]
    max_ftc: Float[Array, " B"]
    lipschitz: Float[Array, " B"]
    distance: Float[Array, " B"]
    tight_bound: Float[Array, " B"]
    bound: Float[Array, " B"]


@struct.dataclass
class TrajectoriesStep:
    """The step of one layer of both streams.

    carry: x of FT, y of PT, and the sums of PTC and FTC along x. Returns beta_l, |PTC(x)|, |FTC_l|
    and |PTC(x) - PTC(y)| / |x - y| of each row.
    """

    places: Places
    mask: Shaped[Array, "B T"]
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
    pair: Pair | Source,
    tokens: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    mesh: Mesh | None = None,
) -> Trajectories:
    """Run both models from the tuned model's x_0 and compare their residual streams.

    mask: True at real tokens. mesh: the one that the pair is sharded over. Costs three forward
    passes.
    """
    source = as_source(pair)
    tokens, mask = as_tokens(tokens, mask, source.ends.tuned_config.vocab_size)
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


def _norm(mask: Shaped[Array, "B T"], x: Float[Array, "B T D"]) -> Float[Array, " B"]:
    """L1 over a row's real tokens times D."""
    return jnp.sum(jnp.where(mask.astype(bool)[..., None], jnp.abs(x), 0), axis=(1, 2))


@functools.partial(jax.jit, static_argnames="mesh")
def _begin(
    ends: Pair, tokens: Int[Array, "B T"], mask: Shaped[Array, "B T"], *, mesh: Mesh | None
) -> tuple[Float[Array, "B T D"], Places]:
    places = Places.of(ends, mask)
    return begin(ends, tokens, None, places, mesh), places


Streams = tuple[Float[Array, "B T D"], Float[Array, "B T D"]]  # x of FT, y of PT


@struct.dataclass
class FinalStreamsStep:
    """The step of one layer of each model on a stream of its own.

    ahead: of the prefixes that rows follow.
    """

    places: Places
    mesh: Mesh | None = struct.field(pytree_node=False)
    ahead: Ahead | None = None

    def lead(
        self, streams: Streams, layer: PairLayer, _: None, at: Places
    ) -> tuple[Streams, LayerCache]:
        """Prefixes through the layer, as rows."""
        x, y = streams
        seen = layer.tuned.keys_values(x, at.tuned), layer.base.keys_values(y, at.base)
        x = x + layer.tuned.whole(x, at.tuned).total
        y = y + layer.base.whole(y, at.base).total
        return constrain((x, y), self.mesh), seen

    def __call__(self, streams: Streams, layer: PairLayer, _: None) -> tuple[Streams, None]:
        """An ordinary layer of both models."""
        x, y = streams
        tuned, base = (self.ahead and self.ahead.join(model) for model in (0, 1))
        x = x + layer.tuned.added(x, self.places.tuned, join=tuned).total
        y = y + layer.base.added(y, self.places.base, join=base).total
        return constrain((x, y), self.mesh), None


@struct.dataclass
class FinalStreams:
    """The engine of `final_streams`; columns are not used."""

    tokens: Int[Array, "B T"] | None
    mask: Shaped[Array, "B T"]
    columns: Int[Array, "B C"] | None = None
    segments: Int[Array, "B T"] | None = None
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)
    axis = 0  # of rows in the carry

    def state(self, ends: Pair) -> Places:
        """The tokens' places."""
        return Places.of(ends, self.mask, segments=self.segments)

    def enter(self, ends: Pair, tokens: Int[Array, "B T"], places: Places) -> Streams:
        """Each model's own embedding of some tokens."""
        known = jnp.minimum(tokens, ends.base_config.vocab_size - 1)
        at = places.base.query
        y = decoder.embed(ends.base_config, ends.base, known, at, mesh=self.mesh)
        return begin(ends, tokens, None, places, self.mesh), constrain(y, self.mesh)

    def begin(self, ends: Pair, state: Places) -> Streams:
        """Both embeddings."""
        assert self.tokens is not None
        return self.enter(ends, self.tokens, state)

    def phases(self, state: Places, depth: int) -> list[Phase]:
        """All layers alike."""
        return [Phase(FinalStreamsStep(state, self.mesh), 0, depth)]

    def finish(self, ends: Pair, carry: Streams, outs: Sequence[None]) -> Streams:
        """The streams."""
        return carry


def final_streams(
    pair: Pair | Source,
    tokens: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """FT's and PT's residual streams after all layers, before the final norm.

    Two ordinary forward passes, each model from its own embedding. Where the tuned vocabulary is
    larger, tokens that the base does not know take its last row. segments: as in `decompose`.
    """
    source = as_source(pair)
    tokens, mask = as_tokens(tokens, mask, source.ends.tuned_config.vocab_size)
    return run(FinalStreams(tokens, mask, segments=segments, mesh=mesh), source)


def output_co(
    pair: Pair | Source,
    tokens: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> Float[Array, " B"]:
    """OutputCo: |x^FT - x^PT| / (|x^PT| + |x^FT - x^PT|) of the last token's `final_streams`."""
    tuned, base = final_streams(pair, tokens, mask, mesh=mesh)
    mask = as_mask(mask, tuned)
    return _share_at_last(tuned, base, mask, norm=norm)


@functools.partial(jax.jit, static_argnames="norm")
def _share_at_last(
    tuned: Float[Array, "B T D"],
    base: Float[Array, "B T D"],
    mask: Shaped[Array, "B T"],
    *,
    norm: int,
) -> Float[Array, " B"]:
    column = last_column(mask)[:, None]
    tuned, base = (pick(x, column)[:, 0] for x in (tuned, base))
    return share(base, tuned - base, norm)
