"""Which tokens of a prompt raise or lower its TuCo, by gradients with respect to x_0.

    gradient x input     a_t = <x_0[t] - b[t], dTuCo/dx_0[t]>
    integrated           a_t = <x_0[t] - b[t], int_0^1 dTuCo/dx_0[t] at b + s (x_0 - b) ds>

(Sundararajan et al. 2017, arXiv 1703.01365). x_0 is the stream before the first layer and b a
baseline: by default every token's embedding is replaced by the mean of the tuned model's embedding
table, and positions stay. Integrated gradients are complete: they sum to TuCo(x_0) - TuCo(b). What
the quadrature misses of that is reported as the completeness error.

Legend: B prompts, T tokens, D residual width, S points of the quadrature.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from common_jax import struct
from common_jax.cli.ranges import PositiveInt, check_range
from common_jax.errors import InputError
from common_jax.io.files import check_writable, write_text
from common_jax.mesh import constrain, fetch
from common_jax.report import page
from tuco_jax.core.budget import default_budget
from tuco_jax.core.last_token import tuco
from tuco_jax.core.tokens import as_tokens
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import Positions
from tuco_jax.models.sharding import batch_width, looked_up, mesh_of, put_rows
from tuco_jax.prompts import batching
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.messages import Message
from tuco_jax.prompts.read import Prompt, as_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Attribution",
    "PromptAttribution",
    "attribute",
    "attribute_prompts",
    "write_attribution",
]


@struct.dataclass
class Attribution:
    """Result of `attribute`, float32.

    tuco, baseline: TuCo of the prompts and of their baselines. gradient, integrated: each token's
    attribution, 0 at padding; a negative one means that the token lowers TuCo.
    completeness_error: tuco - baseline - the sum of integrated.
    """

    tuco: Float[Array, " B"]
    baseline: Float[Array, " B"]
    gradient: Float[Array, "B T"]
    integrated: Float[Array, "B T"]
    completeness_error: Float[Array, " B"]


def _streams(
    pair: Pair, tokens: jax.Array, mask: jax.Array, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """x_0 [B, T, D] and the baseline's."""
    at = Positions.of(pair.tuned_config, mask)
    params = pair.tuned_params
    x = decoder.embed(pair.tuned_config, params, tokens, at, mesh=mesh)
    table = params["embed"]["table"]
    own = looked_up("embed/table", table, tokens, mesh)
    mean = jnp.mean(table, axis=0, dtype=jnp.float32)
    return x, x + pair.tuned_config.embed_scale * (mean[None, None] - own)


def attribute(
    pair: Pair,
    tokens: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    *,
    baseline: Float[Array, "B T D"] | None = None,
    points: PositiveInt = 32,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> Attribution:
    """Each token's attribution of TuCo.

    Args:
        pair: the two models.
        tokens: token ids.
        mask: true at real tokens; padding on either side.
        baseline: the stream to compare with; by default the embedding table's mean at all tokens.
        points: of the Gauss-Legendre quadrature; each costs a forward and a backward pass.
        norm: TuCo's, 1 or 2.
        mesh: where the pair is sharded; streams then stay sharded by rows, as in `decompose`.

    Pure and jitted. Raises InputError for points below 1, and for tokens outside the vocabulary.
    """
    check_range(PositiveInt, points, "points")
    tokens, mask = as_tokens(tokens, mask, pair.tuned_config.vocab_size)
    return _attribute(pair, tokens, mask, baseline, points, norm, mesh)


@functools.partial(jax.jit, static_argnames=("points", "norm", "mesh"))
def _attribute(
    pair: Pair,
    tokens: Int[Array, "B T"],
    mask: Shaped[Array, "B T"],
    baseline: Float[Array, "B T D"] | None,
    points: int,
    norm: int,
    mesh: Mesh | None,
) -> Attribution:
    mask = mask.astype(bool)
    x, mean = _streams(pair, tokens, mask, mesh)
    start = mean if baseline is None else baseline
    step = x - start

    def total(stream: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = tuco(pair, None, mask, embeddings=stream, norm=norm, mesh=mesh)
        return jnp.sum(values), values  # rows do not see each other: one pass for all

    gradient_of = jax.grad(total, has_aux=True)
    at_x, values = gradient_of(x)
    nodes, weights = np.polynomial.legendre.leggauss(points)
    path = jnp.asarray((nodes + 1) / 2, jnp.float32), jnp.asarray(weights / 2, jnp.float32)

    def body(mean: jax.Array, point: tuple[jax.Array, jax.Array]):
        position, weight = point
        return constrain(mean + weight * gradient_of(start + position * step)[0], mesh), None

    along, _ = jax.lax.scan(body, jnp.zeros_like(x), path)
    gradient, integrated = (jnp.where(mask, jnp.sum(step * g, axis=-1), 0) for g in (at_x, along))
    below = tuco(pair, None, mask, embeddings=start, norm=norm, mesh=mesh)
    return Attribution(
        values, below, gradient, integrated, values - below - jnp.sum(integrated, axis=1)
    )


@dataclasses.dataclass(frozen=True)
class PromptAttribution:
    """The `Attribution` of one prompt of n tokens; texts: each token's."""

    id: str | int
    texts: list[str]
    tuco: float
    baseline: float
    gradient: Float[np.ndarray, " n"]
    integrated: Float[np.ndarray, " n"]
    completeness_error: float


def attribute_prompts(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[Message] | Prompt],
    *,
    points: int = 32,
    token_budget: int | None = None,
) -> list[PromptAttribution]:
    """`attribute` of texts, conversations or Prompts, a batch of `token_budget` tokens at most.

    By default what suits the backend (`core/budget.py`).

    Raises InputError naming the prompt.
    """
    wanted = as_prompts(prompts)
    ids = encode(
        tokenizer, wanted, max_tokens=pair.context, vocab_size=pair.tuned_config.vocab_size
    )
    found: dict[int, PromptAttribution] = {}
    mesh = mesh_of(pair)
    most = token_budget or default_budget(gradient=True)
    for batch in batching.by_length([row.size for row in ids], most, batch_width(mesh)):
        tokens, mask = batching.pad(ids, batch)
        inputs = put_rows((jnp.asarray(tokens), jnp.asarray(mask)), mesh)
        got = fetch(attribute(pair, *inputs, points=points, mesh=mesh))
        for place, row in enumerate(batch.rows):
            real = mask[place].astype(bool)
            found[row] = PromptAttribution(
                wanted[row].id,
                [str(tokenizer.decode([i])) for i in ids[row].tolist()],
                float(got.tuco[place]),
                float(got.baseline[place]),
                got.gradient[place][real],
                got.integrated[place][real],
                float(got.completeness_error[place]),
            )
    return [found[row] for row in range(len(wanted))]


def write_attribution(
    path: str | pathlib.Path,
    found: Sequence[PromptAttribution],
    facts: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Write an HTML page that shades every token by its attribution, on one scale for all prompts.

    One colour means that a token raises TuCo, another that it lowers it. Raises InputError where
    there are no prompts, or the page cannot be written.
    """
    path = check_writable(path, (".html",))
    if not found:
        raise InputError("no prompts to report: attribute one or more")
    top = max(float(np.abs(a.integrated).max()) for a in found) or 1.0
    error = max(abs(a.completeness_error) for a in found)
    html = page.render(
        pathlib.Path(__file__).with_name("attribution.html"),
        title="Which tokens raise TuCo, and which lower it",
        summary=[_summary(found)],
        method=[
            "Integrated gradients of TuCo by the tuned model's token embeddings, from a baseline "
            "in which every token has the table's mean. Parts of a prompt sum to its TuCo less "
            f"its baseline's, up to {error:.1e} of quadrature in these prompts.",
            "A part says what the score answers to, in this model and against this baseline; it "
            "does not say that taking the token out would change TuCo by so much.",
        ],
        facts={"prompts": str(len(found)), **(facts or {})},
        prompts=[(a, _shaded(a, top)) for a in found],
        top=top,
    )
    write_text(path, html)
    return path


def _shaded(found: PromptAttribution, top: float) -> list[tuple[str, float, float, float]]:
    """(text, integrated gradient, gradient x input, shade in -1..1) of each token."""
    rows = zip(found.texts, found.integrated, found.gradient, strict=True)
    return [(t, float(a), float(g), float(a) / top) for t, a, g in rows]


def _summary(found: Sequence[PromptAttribution]) -> str:
    parts: Any = np.concatenate([a.integrated for a in found])
    down, up = float(-parts[parts < 0].sum()), float(parts[parts > 0].sum())
    return (
        f"Over {len(found)} prompts and {parts.size} tokens, {np.mean(parts < 0):.0%} of the "
        f"tokens lower TuCo, by {down:.3f} in sum; the others raise it by {up:.3f}."
    )
