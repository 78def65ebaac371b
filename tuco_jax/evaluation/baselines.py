"""Simpler scores of a prompt to compare TuCo with: length, perplexity under PT and FT, OutputCo.

Legend: N prompts, B rows of a batch, T tokens, C prompts of a row, D residual width, V
vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from common_jax.errors import InputError
from common_jax.mesh import fetch
from tuco_jax.core.budget import default_budget
from tuco_jax.core.places import pick
from tuco_jax.core.residual import share
from tuco_jax.core.trajectories import final_streams
from tuco_jax.core.walk import source_of
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import batch_width, mesh_of, put_rows
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.packing import pack
from tuco_jax.prompts.read import Message, Prompt, as_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Baselines", "baselines", "baselines_of_tokens"]


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Scores of N prompts.

    length: in tokens. base_perplexity, tuned_perplexity: exp of the mean negative log-probability
    of every token after the first. output_co: |x_L^FT - x_L^PT| / (|x_L^PT| + |x_L^FT - x_L^PT|)
    of the last token's final streams, L1 (section 5.5 of arXiv 2506.23423).
    """

    length: Int[np.ndarray, " N"]
    base_perplexity: Float[np.ndarray, " N"]
    tuned_perplexity: Float[np.ndarray, " N"]
    output_co: Float[np.ndarray, " N"]

    def columns(self) -> dict[str, Shaped[np.ndarray, " N"]]:
        """Each score under its name in reports."""
        return {
            "prompt length": self.length,
            "perplexity, PT": self.base_perplexity,
            "perplexity, FT": self.tuned_perplexity,
            "OutputCo": self.output_co,
        }


def baselines(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str | Sequence[Message] | Prompt],
    *,
    perplexity: bool = True,
) -> Baselines:
    """Scores of prompts in any form that `score` takes.

    perplexity: False saves its cost and leaves NaN. Raises InputError for a prompt beyond the
    context, or of a single token where perplexity is wanted.
    """
    wanted = as_prompts(prompts)
    tokens = encode(
        tokenizer, wanted, max_tokens=pair.context, vocab_size=pair.tuned_config.vocab_size
    )
    return baselines_of_tokens(pair, tokens, wanted, perplexity=perplexity)


def baselines_of_tokens(
    pair: Pair,
    tokens: Sequence[Int[np.ndarray, " T"]],
    prompts: Sequence[Prompt],
    *,
    perplexity: bool = True,
) -> Baselines:
    """`baselines` of prompts that are token ids already; prompts: their names, for errors."""
    lengths = [len(row) for row in tokens]
    for prompt, length in zip(prompts, lengths, strict=True):
        if perplexity and length < 2:
            raise InputError(f"{prompt}: one token has no perplexity; give two or more")
    found = np.empty((3, len(tokens)), np.float32)
    mesh = mesh_of(pair)
    source = source_of(pair, mesh)
    for batch in pack(lengths, default_budget(), batch_width(mesh)):
        rows = put_rows(batch.arrays(tokens), mesh)
        streams = final_streams(source, rows["tokens"], rows["mask"], rows["segments"], mesh=mesh)
        values = fetch(_measured(source.ends, *streams, rows, perplexity=perplexity))
        found[:, batch.prompts] = batch.unpack(values.transpose(1, 2, 0)).T
    base, tuned, output_co = found
    return Baselines(np.asarray(lengths), base, tuned, output_co)


@jax.jit(static_argnames="perplexity")
def _measured(
    ends: Pair,
    tuned: Float[Array, "B T D"],
    base: Float[Array, "B T D"],
    rows: dict[str, jax.Array],
    *,
    perplexity: bool,
) -> Float[Array, "3 B C"]:
    """Perplexity under PT and under FT, and OutputCo, of each prompt, from final streams."""
    pt, by_base = _one(ends.base_config, ends.base, {}, base, rows, perplexity)
    ft, by_tuned = _one(ends.tuned_config, ends.tuned_params, ends.lora, tuned, rows, perplexity)
    return jnp.stack([by_base, by_tuned, share(pt, ft - pt)])


def _one(
    config: ModelConfig,
    params: Params,
    lora: Params,
    x: Float[Array, "B T D"],
    rows: dict[str, jax.Array],
    perplexity: bool,
) -> tuple[jax.Array, jax.Array]:
    """One model's final stream x at last tokens [B, C, D], and each prompt's perplexity [B, C]."""
    segments, columns = rows["segments"], rows["columns"]
    # A token that only the tuned vocabulary has takes the base's last row, as in the stream.
    known = jnp.minimum(rows["tokens"], config.vocab_size - 1)
    last = pick(x, columns)
    if not perplexity:
        return last, jnp.full(columns.shape, math.nan)

    def row(xs: tuple[jax.Array, ...]) -> jax.Array:
        stream, targets, segments = xs  # a row at a time: logits are [T, V]
        logits = decoder.logits(config, params, stream[:-1], lora)
        chosen = jnp.take_along_axis(logits, targets[1:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(logits, axis=1) - chosen
        counts = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        own = (segments[None, 1:] == 1 + jnp.arange(columns.shape[1])[:, None]) & counts[None]
        tokens = jnp.maximum(own.sum(axis=1), 1).astype(nll.dtype)
        return jnp.sum(jnp.where(own, nll[None], 0), axis=1) / tokens

    return last, jnp.exp(jax.lax.map(row, (x, known, segments)))
