"""Simpler scores of a prompt, to hold TuCo against: length, perplexity under PT and FT, OutputCo.

Legend: N prompts, B rows of a batch, T tokens, D residual width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common_jax.errors import InputError
from tuco_jax.core.decompose import last_column, share
from tuco_jax.models import decoder
from tuco_jax.models.layers import Positions
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import batch_width, mesh_of, put_rows
from tuco_jax.prompts import batching
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    Prompt,
    as_prompts,
)
from tuco_jax.scoring.score import default_budget

__all__ = ["Baselines", "baselines", "baselines_of_tokens"]


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Of N prompts, [N] each.

    length: in tokens. base_perplexity, tuned_perplexity: exp of the mean negative log probability
    of every token after the first. output_co: |x_L^FT - x_L^PT| / (|x_L^PT| + |x_L^FT - x_L^PT|)
    of the last token's final streams, L1 (section 5.5 of arXiv 2506.23423).
    """

    length: np.ndarray
    base_perplexity: np.ndarray
    tuned_perplexity: np.ndarray
    output_co: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """Each score under the name that reports show."""
        return {
            "prompt length": self.length,
            "perplexity, PT": self.base_perplexity,
            "perplexity, FT": self.tuned_perplexity,
            "OutputCo": self.output_co,
        }


def baselines(
    pair: Pair, tokenizer: Any, prompts: Sequence[Any], *, perplexity: bool = True
) -> Baselines:
    """Scores of prompts in the forms that `score` takes; perplexity False leaves NaN for it.

    Raises InputError for a prompt beyond the context, or of one token where perplexity is wanted.
    """
    prompts = as_prompts(prompts)
    tokens = encode(
        tokenizer, prompts, max_tokens=pair.context, vocab_size=pair.tuned_config.vocab_size
    )
    return baselines_of_tokens(pair, tokens, prompts, perplexity=perplexity)


def baselines_of_tokens(
    pair: Pair,
    tokens: Sequence[np.ndarray],
    prompts: Sequence[Prompt],
    *,
    perplexity: bool = True,
) -> Baselines:
    """`baselines` of prompts that are tokens already, int32 [n_i]; prompts: names, for errors."""
    lengths = [len(row) for row in tokens]
    for prompt, length in zip(prompts, lengths, strict=True):
        if perplexity and length < 2:
            raise InputError(f"{prompt}: one token has no perplexity; give two or more")
    found = np.empty((3, len(tokens)), np.float32)
    mesh = mesh_of(pair)
    for batch in batching.plan(lengths, default_budget(), batch_width(mesh)):
        values = _run(pair, *put_rows(batching.pad(tokens, batch), mesh), perplexity, mesh)
        found[:, list(batch.rows)] = np.asarray(values)[:, : len(batch.rows)]
    base, tuned, output_co = found
    return Baselines(np.asarray(lengths), base, tuned, output_co)


@jax.jit(static_argnums=(3, 4))
def _run(
    pair: Pair, tokens: jax.Array, mask: jax.Array, perplexity: bool, mesh: Mesh | None
) -> jax.Array:
    """Perplexity under PT and under FT, and OutputCo, [3, B]."""
    rest = tokens, mask, perplexity, mesh
    pt, base = _one(pair.base_config, pair.base, {}, *rest)
    ft, tuned = _one(pair.tuned_config, pair.tuned_params, pair.lora, *rest)
    return jnp.stack([base, tuned, share(pt, ft - pt)])


def _one(
    config: Any,
    params: Any,
    lora: Any,
    tokens: Any,
    mask: Any,
    perplexity: bool,
    mesh: Mesh | None,
) -> Any:
    """One model's final stream at the last token [B, D], and the row's perplexity [B]."""
    positions = Positions.of(config, mask)
    # A token that only the tuned vocabulary has takes the base's last row, as in `output_co`.
    known = jnp.minimum(tokens, config.vocab_size - 1)
    x = decoder.embed(config, params, known, positions)
    x, _ = decoder.forward(config, params, x, positions, lora, mesh=mesh)
    last = jnp.take_along_axis(x, last_column(mask)[:, None, None], axis=1)[:, 0]
    if not perplexity:
        return last, jnp.full(len(tokens), math.nan)

    def row(xs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        stream, targets, real = xs  # a row at a time: logits are [T, V]
        logits = decoder.logits(config, params, stream[:-1], lora)
        chosen = jnp.take_along_axis(logits, targets[1:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=1) - chosen
        counts = real[1:] & real[:-1]
        return jnp.sum(jnp.where(counts, nll, 0)) / jnp.maximum(counts.sum(), 1)

    return last, jnp.exp(jax.lax.map(row, (x, known, mask.astype(bool))))
