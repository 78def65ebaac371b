"""The decomposition of a tuned model into what the base does and what tuning adds.

"TuCo: Measuring the Contribution of Fine-Tuning to Individual Responses of LLMs", arXiv
2506.23423. On the tuned model's residual stream x_l, with f what a block adds to it:

    PTC(x, l) = f_PT(x, l)        FTC(x, l) = f_FT(x, l) - f_PT(x, l)
    x_L = x_0 + sum_l PTC(x_l, l) + sum_l FTC(x_l, l)      (exact)

This is the full form, at every token and under any alpha. `last_token.py` computes what a score
needs, at last tokens alone, for the cost of about one forward pass.

Legend: B batch, T tokens, D residual width, L layers, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from common_jax import struct
from common_jax.mesh import constrain
from tuco_jax.core.layer import PairLayer
from tuco_jax.core.places import Places
from tuco_jax.core.residual import begin
from tuco_jax.core.tokens import as_mask, as_tokens
from tuco_jax.core.walk import Source, as_source, walk
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair

__all__ = ["Decomposition", "DecomposeStep", "decompose"]


@struct.dataclass
class Decomposition:
    """Result of `decompose`. Everything is float32.

    ptc, ftc: sums over layers; with `layers=True` each layer's own, on axis 0. ftc_attention,
    ftc_mlp: with `parts=True`, FTC's two parts, else None; a variant that is not in the paper: the
    MLP's part includes the effect of the changed attention on the MLP. hidden: the residual stream
    before the final norm. embeddings: x_0.
    """

    ptc: Float[Array, "B T D"] | Float[Array, "L B T D"]
    ftc: Float[Array, "B T D"] | Float[Array, "L B T D"]
    ftc_attention: Float[Array, "B T D"] | Float[Array, "L B T D"] | None
    ftc_mlp: Float[Array, "B T D"] | Float[Array, "L B T D"] | None
    hidden: Float[Array, "B T D"]
    logits: Float[Array, "B T V"] | None
    embeddings: Float[Array, "B T D"]


@struct.dataclass
class DecomposeStep:
    """The step of one layer at every token. carry: the residual stream, and the sums so far.

    layers: return the layer's own components, and keep no sums. parts: FTC's two parts, too.
    """

    places: Places
    layers: bool = struct.field(pytree_node=False)
    parts: bool = struct.field(pytree_node=False)
    mesh: Mesh | None = struct.field(pytree_node=False)

    def __call__(
        self, carry: Any, layer: PairLayer, alpha: Float[Array, " B"] | Float[Array, "B T"]
    ) -> tuple[Any, Any]:
        """Move the stream to x + f_FT + (alpha - 1) FTC."""
        x, sums = carry
        pt = layer.base.whole(x, self.places.base)
        ft = layer.tuned.whole(x, self.places.tuned)
        ftc = ft.total - pt.total
        own = (pt.total, ftc)
        if self.parts:
            own += (ft.attention - pt.attention, ft.mlp - pt.mlp)
        alpha = alpha.reshape(*alpha.shape, *(1,) * (3 - alpha.ndim))
        x = x + ft.total + (alpha - 1) * ftc
        x, own = constrain((x, own), self.mesh)
        if self.layers:
            return (x, sums), own
        return (x, tuple(s + o for s, o in zip(sums, own, strict=True))), None


def decompose(
    pair: Pair | Source,
    tokens: Int[Array, "B T"] | None = None,
    mask: Shaped[Array, "B T"] | None = None,
    alpha: float | Float[Array, "..."] = 1.0,
    *,
    embeddings: Float[Array, "B T D"] | None = None,
    layers: bool = False,
    logits: bool = False,
    parts: bool = False,
    remat: bool = False,
    segments: Int[Array, "B T"] | None = None,
    mesh: Mesh | None = None,
) -> Decomposition:
    """Split every block of the tuned model into PTC and FTC along the (alpha-scaled) stream.

    x_{l+1} = x_l + PTC(x_l, l) + alpha FTC(x_l, l) (Definition 5.1), computed as
    x_l + f_FT + (alpha - 1) FTC, which is exact at alpha = 1.

    Args:
        pair: the two models, or a source of their layers (`core/walk.py`).
        tokens: token ids; or give `embeddings`.
        mask: True at real tokens; padding on either side. None: all are real.
        alpha: broadcastable to [L, B]: a scalar, [L, 1] per layer, [B] per example; or to
            [L, B, T], where rows hold several prompts.
        embeddings: x_0 in place of tokens (for gradients and soft prompts).
        layers: keep each layer's own components instead of their sums.
        parts: also split FTC into attention's and the MLP's.
        logits: also apply the tuned model's final norm and head.
        remat: of a pair, recompute activations in the backward pass.
        segments: contiguous; for rows that hold several prompts, which do not see one another.
        mesh: the one that the pair is sharded over (`models/sharding.py`); the residual stream is
            then sharded by rows.

    Its keywords are a public interface, called by name, and are therefore not grouped.

    Pure, jittable, and differentiable in alpha, embeddings and weights. Raises ValueError unless
    one of tokens and embeddings is given, and, outside compiled functions, InputError for tokens
    outside the vocabulary.
    """
    source = as_source(pair, remat=remat)
    ends = source.ends
    if tokens is not None:
        tokens, mask = as_tokens(tokens, mask, ends.tuned_config.vocab_size)
    given = tokens if tokens is not None else embeddings
    if given is None:
        raise ValueError("give either tokens [B, T] or embeddings [B, T, D]")
    mask = as_mask(mask, given)
    x0, places, alphas = _begin(ends, tokens, embeddings, mask, segments, alpha, mesh=mesh)
    sums: Any = () if layers else (jnp.zeros_like(x0),) * (4 if parts else 2)
    step = DecomposeStep(places, layers=layers, parts=parts, mesh=mesh)
    (x, sums), own = walk(step, (x0, sums), source, alphas)
    ptc, ftc, *split = own if layers else sums
    attention, mlp = split if parts else (None, None)
    out = _logits(ends, x) if logits else None
    return Decomposition(ptc, ftc, attention, mlp, x, out, x0)


@functools.partial(jax.jit, static_argnames="mesh")
def _begin(
    ends: Pair,
    tokens: Int[Array, "B T"] | None,
    embeddings: Float[Array, "B T D"] | None,
    mask: Shaped[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    alpha: Any,
    *,
    mesh: Mesh | None,
) -> tuple[Float[Array, "B T D"], Places, Float[Array, "L B ..."]]:
    """x_0, places, and alphas [L, B] or [L, B, T]."""
    places = Places.of(ends, mask, segments=segments)
    x = begin(ends, tokens, embeddings, places, mesh)
    alphas = jnp.asarray(alpha, jnp.float32)
    shape = ends.base_config.depth, *mask.shape[: 2 if alphas.ndim == 3 else 1]
    return x, places, jnp.broadcast_to(alphas, shape)


@jax.jit
def _logits(ends: Pair, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return decoder.logits(ends.tuned_config, ends.tuned_params, x, ends.lora)
