"""Logits at selected tokens under FTC_alpha, for a whole grid of alphas at once.

    x_{l+1} = x_l + f_FT + (alpha - 1) FTC        (Definition 5.1 of arXiv 2506.23423)

What does not depend on alpha is computed once: x_0 is the same for all, hence all of layer 0, f_PT
and f_FT included. At the last layer, all but keys and values is computed at the selected tokens
only. For A alphas and L layers that is about 2 A (L - 2) + 2 blocks, where A whole runs take
2 A L. Layers are the outer loop and alphas the inner one, so that a layer's weights are read once
for all alphas; `chunk` alphas run together, which bounds the memory.

Rows may follow prefixes (`shared_prefix.py`), each of which is then run once an alpha.

Legend: A alphas, B rows, T tokens of a row (of a suffix, where there is a prefix), C selected
tokens of a row, V vocabulary, D residual width, L layers, G prefixes, P tokens of a prefix.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from common_jax import struct
from common_jax.errors import InputError
from common_jax.mesh import constrain
from tuco_jax.core.budget import default_budget
from tuco_jax.core.cache import Ahead, LayerCache
from tuco_jax.core.engine import Phase, run
from tuco_jax.core.layer import PairLayer
from tuco_jax.core.places import Places, last_column, pick
from tuco_jax.core.residual import begin
from tuco_jax.core.tokens import as_tokens
from tuco_jax.core.walk import Source, as_source
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair

__all__ = ["PAPER_GRID", "AlphaGrid", "GridStep", "each_alpha", "grid_logits", "layer_alphas"]

PAPER_GRID = (0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25)  # the paper's alphas, section 5.1

Tree = TypeVar("Tree")


@struct.dataclass
class GridStep:
    """The step of one layer for all alphas, `chunk` of them at once; own: their values here.

    once: all alphas share one residual stream, as in the first layer. select: move it at the
    selected tokens alone, after which others do not matter. ahead: of the prefixes that rows
    follow, whose keys and values have the alphas' axis first, unless `once`.
    """

    places: Places
    chunk: int = struct.field(pytree_node=False)
    once: bool = struct.field(pytree_node=False, default=False)
    select: bool = struct.field(pytree_node=False, default=False)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)
    ahead: Ahead | None = None

    def __call__(
        self,
        x: Float[Array, "B T D"] | Float[Array, "A B T D"],
        layer: PairLayer,
        own: Float[Array, " A"],
    ) -> tuple[Float[Array, "A B T D"] | Float[Array, "A B C D"], None]:
        """Move the stream of each alpha to x + f_FT + (alpha - 1) FTC."""

        def moved(x: Any, ahead: Ahead | None) -> Any:
            places, joins = self.places, [ahead and ahead.join(model) for model in (0, 1)]
            last = None
            if self.select:
                assert places.columns is not None
                last = pick(x, places.columns)
            ft = layer.tuned.added(x, places.tuned, last=last, join=joins[0]).total
            pt = layer.base.added(x, places.base, last=last, join=joins[1]).total
            return (x if last is None else last) + ft, ft - pt

        def one(xs: Any) -> Any:
            x, alpha, seen = xs
            stream, ftc = moved(x, self.ahead and self.ahead.replace(seen=seen))  # pyright: ignore
            return constrain(stream + (alpha - 1) * ftc, self.mesh)

        if not self.once:
            return each_alpha(one, (x, own, self.ahead and self.ahead.seen), self.chunk), None
        stream, ftc = moved(x, self.ahead)
        return _spread(stream, ftc, own), None

    def lead(
        self,
        x: Float[Array, "G P D"] | Float[Array, "A G P D"],
        layer: PairLayer,
        own: Float[Array, " A"],
        at: Places,
    ) -> tuple[Float[Array, "G P D"] | Float[Array, "A G P D"], LayerCache]:
        """Prefixes through the layer, moved as rows are, with an alpha each."""

        def seen(x: Any) -> LayerCache:
            return layer.tuned.keys_values(x, at.tuned), layer.base.keys_values(x, at.base)

        def moved(x: Any) -> Any:
            ft = layer.tuned.whole(x, at.tuned).total
            return x + ft, ft - layer.base.whole(x, at.base).total

        def one(xs: Any) -> Any:
            x, alpha = xs
            stream, ftc = moved(x)
            return constrain(stream + (alpha - 1) * ftc, self.mesh), seen(x)

        if self.select:
            return x, seen(x) if self.once else each_alpha(seen, x, self.chunk)
        if self.once:
            stream, ftc = moved(x)
            return _spread(stream, ftc, own), seen(x)
        return each_alpha(one, (x, own), self.chunk)


def _spread(
    stream: Float[Array, "B T D"], ftc: Float[Array, "B T D"], alphas: Float[Array, " A"]
) -> Float[Array, "A B T D"]:
    return jax.vmap(lambda alpha: stream + (alpha - 1) * ftc)(alphas)


@struct.dataclass
class AlphaGrid:
    """The engine: the residual streams after all layers at the selected tokens, [A, B, C, D].

    alphas: of each layer. chunk: of them, to run at once. Other fields as of `LastTokens`.
    """

    tokens: Int[Array, "B T"] | None
    mask: Shaped[Array, "B T"]
    columns: Int[Array, "B C"]
    alphas: Float[Array, "L A"]
    segments: Int[Array, "B T"] | None = None
    chunk: int = struct.field(pytree_node=False, default=1)
    mesh: Mesh | None = struct.field(pytree_node=False, default=None)
    axis = 1  # of rows in the carry

    def state(self, ends: Pair) -> Places:
        """The tokens' places."""
        return Places.of(ends, self.mask, self.columns, self.segments)

    def enter(
        self, ends: Pair, tokens: Int[Array, "B T"] | None, places: Places
    ) -> Float[Array, "B T D"]:
        """x_0 of some tokens."""
        return begin(ends, tokens, None, places, self.mesh)

    def begin(self, ends: Pair, state: Places) -> Float[Array, "B T D"]:
        """x_0, which all alphas share."""
        return self.enter(ends, self.tokens, state)

    def phases(self, state: Places, depth: int) -> list[Phase]:
        """The first layer, once for all alphas; those between; the last at selected tokens."""
        step, middle = GridStep(state, self.chunk, mesh=self.mesh), depth - 1
        last = dataclasses.replace(step, select=True, once=depth == 1)
        phases = [
            Phase(dataclasses.replace(step, once=True), 0, min(1, middle), self.alphas),
            Phase(step, 1, middle, self.alphas),
            Phase(last, middle, depth, self.alphas),
        ]
        return [phase for phase in phases if phase.start < phase.stop]

    def finish(
        self, ends: Pair, carry: Float[Array, "A B C D"], outs: Sequence[None]
    ) -> Float[Array, "A B C D"]:
        """The streams."""
        return carry


def layer_alphas(
    alphas: Float[Array, " A"] | Float[Array, "A L"] | Sequence[float], depth: int
) -> Float[Array, "L A"]:
    """Alphas [A] or [A, L] by layer, float32. Raises InputError for another shape."""
    alphas = jnp.asarray(alphas, jnp.float32)
    if alphas.ndim not in (1, 2) or not alphas.shape[0] or alphas.shape[1:] not in ((), (depth,)):
        raise InputError(
            f"alphas have shape {list(alphas.shape)}: give [A], one number each, or "
            f"[A, {depth}], one a layer"
        )
    alphas = alphas if alphas.ndim == 2 else alphas[:, None]
    return jnp.broadcast_to(alphas, (alphas.shape[0], depth)).T


def each_alpha(function: Callable[[Any], Tree], xs: Any, chunk: int) -> Tree:
    """Map `function` over the alphas, the first axis of xs, `chunk` of them at once."""
    count = len(jax.tree.leaves(xs)[0])
    if chunk >= count:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=chunk if chunk > 1 else None)


def grid_logits(
    pair: Pair | Source,
    tokens: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    alphas: Float[Array, " A"] | Float[Array, "A L"],
    columns: Int[Array, "B C"] | None = None,
    *,
    chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "A B V"] | Float[Array, "A B C V"]:
    """Logits at selected tokens under every alpha of a grid, as `decompose` gives for each.

    Args:
        pair: the two models, or a source of their layers (`core/walk.py`).
        tokens: token ids.
        mask: True at real tokens; padding on either side.
        alphas: one number each, or one for each layer.
        columns: of the selected tokens. None: each row's last real token.
        chunk: alphas that are run at once, which bounds memory; None: by the backend.
        mesh: the one that the pair is sharded over (`models/sharding.py`); rows are sharded, too.

    Returns float32, with an axis C where columns are given. Compiled once for each shape; alphas
    are data. Raises InputError for alphas of the wrong shape.
    """
    source = as_source(pair)
    ends = source.ends
    tokens, mask = as_tokens(tokens, mask, ends.tuned_config.vocab_size)
    selected = last_column(mask)[:, None] if columns is None else columns
    chunk = chunk or max(1, default_budget() // mask.size)
    by_layer = layer_alphas(alphas, ends.tuned_config.depth)
    x = run(AlphaGrid(tokens, mask, selected, by_layer, chunk=chunk, mesh=mesh), source)
    logits = _logits(ends, x, chunk)
    return logits[:, :, 0] if columns is None else logits


@functools.partial(jax.jit, static_argnames="chunk")
def _logits(ends: Pair, x: Float[Array, "A B C D"], chunk: int) -> Float[Array, "A B C V"]:
    return each_alpha(
        lambda x: decoder.logits(ends.tuned_config, ends.tuned_params, x, ends.lora), x, chunk
    )
