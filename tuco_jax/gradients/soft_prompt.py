"""A soft prompt: vectors inserted into every prompt that push its TuCo down, or up.

    min over v of +-mean_b TuCo([x_0 up to `position`, v, the rest])

by Adam, through TuCo's gradient with respect to the stream. It shows how far a context that need
not be any text can move the score: a bound on what an attack with text could do.

Legend: B prompts, T tokens, k vectors, D residual width, S steps.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped

from common_jax.cli.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Seed, check_ranges
from common_jax.errors import InputError
from common_jax.mesh import fetch
from tuco_jax.core.last_token import tuco
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import Positions
from tuco_jax.models.sharding import mesh_of, put_rows

__all__ = ["SoftPrompt", "SoftPromptOptions", "Tokens", "fit_soft_prompt", "soft_prompt_tuco"]


class Tokens(NamedTuple):
    """Prompts as token ids, right-padded; mask: true at real tokens."""

    tokens: Int[Array, "B T"]
    mask: Shaped[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class SoftPromptOptions:
    """How to fit.

    vectors: k. position: how many tokens of a prompt come before them, such as 1 for a BOS.
    maximise: push TuCo up. learning_rate: Adam's, in units of the mean norm of an embedding.
    max_norm: the largest norm of a vector, in the same unit; None for no limit. norm: TuCo's, 1 or
    2. seed: of the tokens whose embeddings the vectors start from.
    """

    vectors: PositiveInt = 4
    position: NonNegativeInt = 1
    maximise: bool = False
    steps: PositiveInt = 100
    learning_rate: PositiveFloat = 0.02
    max_norm: PositiveFloat | None = None
    norm: Literal[1, 2] = 1
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class SoftPrompt:
    """A fitted soft prompt.

    vectors: in the units of the stream. history: mean TuCo before each step. plain, start, fitted:
    TuCo of each prompt without vectors, with the initial ones and with the fitted ones. held_out:
    the same three for prompts that were not fitted to, or None.
    """

    vectors: Float[Array, "k D"]
    history: Float[np.ndarray, " S"]
    plain: Float[np.ndarray, " B"]
    start: Float[np.ndarray, " B"]
    fitted: Float[np.ndarray, " B"]
    held_out: (
        tuple[
            Float[np.ndarray, " held_out"],
            Float[np.ndarray, " held_out"],
            Float[np.ndarray, " held_out"],
        ]
        | None
    )


def _insert(x: jax.Array, count: int, position: int) -> jax.Array:
    """[B, T, ...] with `count` columns of ones or zeros after `position`."""
    gap = jnp.ones((x.shape[0], count), x.dtype)
    return jnp.concatenate([x[:, :position], gap, x[:, position:]], axis=1)


@functools.partial(jax.jit, static_argnames=("position", "norm", "mesh"))
def soft_prompt_tuco(
    pair: Pair,
    vectors: Float[Array, "k D"],
    prompts: Tokens,
    *,
    position: int = 1,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> Float[Array, " B"]:
    """TuCo of right-padded prompts with `vectors` after their first `position` tokens.

    Pure, and differentiable in the vectors. Each vector takes a position, as a token does.
    mesh: as in `decompose`.
    """
    count = len(vectors)
    tokens = _insert(prompts.tokens, count, position)
    mask = _insert(prompts.mask.astype(bool), count, position)
    config, params = pair.tuned_config, pair.tuned_params
    x = decoder.embed(config, params, tokens, Positions.of(config, mask), mesh=mesh)
    # A dummy token was embedded in each vector's place: replace its embedding, keep the learned
    # position's, if there is one.
    held = tokens[0, position : position + count]
    own = config.embed_scale * params["embed"]["table"][held].astype(jnp.float32)
    x = x.at[:, position : position + count].add(vectors - own)
    return tuco(pair, None, mask, embeddings=x, norm=norm, mesh=mesh)


def _embedding_norm(pair: Pair) -> jax.Array:
    table = pair.tuned_params["embed"]["table"].astype(jnp.float32)
    return pair.tuned_config.embed_scale * jnp.mean(jnp.linalg.norm(table, axis=1))


@functools.partial(jax.jit, static_argnames=("steps", "position", "norm", "mesh"))
def _fit(
    pair: Pair,
    start: jax.Array,
    prompts: Tokens,
    sign: float,
    learning_rate: float,
    max_norm: float,
    *,
    steps: int,
    position: int,
    norm: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Fitted vectors [k, D] and mean TuCo before each step; sign 1 minimises, -1 maximises.

    The options stand here one by one: those that are traced compile once for all their values.
    """
    size = _embedding_norm(pair)
    optimizer = optax.adam(learning_rate)

    def project(v: jax.Array) -> jax.Array:
        length = jnp.linalg.norm(v, axis=1, keepdims=True)
        return v * jnp.minimum(1, max_norm / jnp.where(length == 0, 1, length))

    def loss(v: jax.Array) -> jax.Array:
        values = soft_prompt_tuco(pair, v * size, prompts, position=position, norm=norm, mesh=mesh)
        return sign * jnp.mean(values)

    def step(carry: Any, _: None) -> Any:
        v, moments = carry
        value, gradient = jax.value_and_grad(loss)(v)
        updates, moments = optimizer.update(gradient, moments)
        return (project(v + updates), moments), sign * value

    # In units of an embedding's norm, so that one rate suits every model.
    v = project(start / size)
    (v, _), history = jax.lax.scan(step, (v, optimizer.init(v)), length=steps)
    return v * size, history


def _check(prompts: Tokens, options: SoftPromptOptions, pair: Pair, name: str) -> None:
    mask = np.asarray(prompts.mask).astype(bool)
    if mask.ndim != 2 or mask.shape != prompts.tokens.shape or not mask.size:
        raise InputError(f"{name}: give tokens and mask [B, T] of one shape, a prompt or more")
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise InputError(f"{name}: prompts must be padded on the right")
    shortest = int(mask.sum(axis=1).min())
    if shortest <= options.position:
        raise InputError(
            f"{name}: a prompt of {shortest} tokens has none after position {options.position}; "
            "lower position or leave the prompt out"
        )
    longest = int(mask.sum(axis=1).max()) + options.vectors
    if longest > pair.context:
        raise InputError(
            f"{name}: {longest} tokens with the vectors, but the model's context holds "
            f"{pair.context}; shorten the prompts"
        )


def fit_soft_prompt(
    pair: Pair,
    prompts: Tokens,
    options: SoftPromptOptions | None = None,
    *,
    held_out: Tokens | None = None,
) -> SoftPrompt:
    """Fit vectors that minimise, or maximise, mean TuCo over a batch of prompts.

    One compiled scan over all steps, on the pair's mesh if it has one. held_out: prompts that the
    result is evaluated on, too. Raises InputError for prompts that are not right-padded, too short
    for `position` or too long for the context.
    """
    options = options or SoftPromptOptions()
    _check(prompts, options, pair, "prompts")
    if held_out is not None:
        _check(held_out, options, pair, "held_out")
    config = pair.tuned_config
    table = pair.tuned_params["embed"]["table"]
    chosen = jax.random.randint(
        jax.random.key(options.seed), (options.vectors,), 0, config.vocab_size
    )
    start = config.embed_scale * table[chosen].astype(jnp.float32)
    mesh = mesh_of(pair)
    prompts, held_out = put_rows((prompts, held_out), mesh)
    how: Any = {"position": options.position, "norm": options.norm, "mesh": mesh}
    vectors, history = _fit(
        pair,
        start,
        prompts,
        -1.0 if options.maximise else 1.0,
        options.learning_rate,
        float("inf") if options.max_norm is None else options.max_norm,
        steps=options.steps,
        **how,
    )
    whole = functools.partial(soft_prompt_tuco, pair, **how)
    plain = jax.jit(tuco, static_argnames=("norm", "mesh"))

    def evaluate(rows: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        without = plain(pair, *rows, norm=options.norm, mesh=mesh)
        found = without, whole(start, rows), whole(vectors, rows)
        return fetch(found)

    others = evaluate(held_out) if held_out is not None else None
    return SoftPrompt(vectors, fetch(history), *evaluate(prompts), others)
