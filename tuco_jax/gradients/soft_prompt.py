"""A soft prompt: vectors in front of every prompt that push TuCo down, or up.

    min over v of +-mean_b TuCo([x_0 up to `place`, v, the rest])

by Adam, through TuCo's gradient by the stream. It says how far the score can be moved by a context
that no text need give: a bound for what an attack on it could do, held out prompts apart.

Legend: B prompts, T tokens, k vectors, D residual width, S steps.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from common_jax.errors import InputError
from tuco_jax.core.last_token import tuco
from tuco_jax.models import decoder
from tuco_jax.models.layers import Positions
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import mesh_of, put_rows

__all__ = ["SoftPrompt", "SoftPromptOptions", "Tokens", "fit_soft_prompt", "soft_prompt_tuco"]


class Tokens(NamedTuple):
    """Prompts: tokens [B, T] int, mask [B, T], right-padded."""

    tokens: jax.Array
    mask: jax.Array


@dataclasses.dataclass(frozen=True)
class SoftPromptOptions:
    """How to fit.

    vectors: k. place: tokens of a prompt that stay before them, such as 1 for a BOS. maximise:
    push TuCo up. steps and rate: of Adam, rate as a share of the mean norm of an embedding. bound:
    the largest norm of a vector, likewise; None: free. seed: of the tokens whose embeddings the
    vectors begin as.
    """

    vectors: int = 4
    place: int = 1
    maximise: bool = False
    steps: int = 100
    rate: float = 0.02
    bound: float | None = None
    norm: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("vectors", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.place < 0:
            raise InputError(f"place is {self.place}: give 0 or more tokens that stay in front")
        if not self.rate > 0:
            raise InputError(f"rate is {self.rate}: give a number above 0")
        if self.bound is not None and not self.bound > 0:
            raise InputError(f"bound is {self.bound}: give a number above 0, or none")


@dataclasses.dataclass(frozen=True)
class SoftPrompt:
    """What came out. vectors [k, D] of the stream; history [S], mean TuCo before each step.

    plain, start, fitted [B]: TuCo of the prompts without vectors, with those that they began as,
    and with the fitted ones; held_out: the same three of prompts that were not fitted, or None.
    """

    vectors: jax.Array
    history: np.ndarray
    plain: np.ndarray
    start: np.ndarray
    fitted: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray, np.ndarray] | None


def _insert(x: jax.Array, count: int, place: int) -> jax.Array:
    """[B, T, ...] with `count` columns of ones or zeros after `place`."""
    gap = jnp.ones((x.shape[0], count), x.dtype)
    return jnp.concatenate([x[:, :place], gap, x[:, place:]], axis=1)


@functools.partial(jax.jit, static_argnames=("place", "norm", "mesh"))
def soft_prompt_tuco(
    pair: Pair,
    vectors: jax.Array,
    prompts: Tokens,
    *,
    place: int = 1,
    norm: int = 1,
    mesh: Mesh | None = None,
) -> jax.Array:
    """TuCo [B] of right-padded prompts with vectors [k, D] after their first `place` tokens.

    Pure and differentiable in the vectors. Vectors take positions like any token. mesh: as in
    `decompose`.
    """
    count = len(vectors)
    tokens = _insert(prompts.tokens, count, place)
    mask = _insert(prompts.mask.astype(bool), count, place)
    config, params = pair.tuned_config, pair.tuned_params
    x = decoder.embed(config, params, tokens, Positions.of(config, mask))
    # A token stood in their place: its own part goes, its position's (learned ones) stays.
    held = tokens[0, place : place + count]
    own = config.embed_scale * params["embed"]["table"][held].astype(jnp.float32)
    x = x.at[:, place : place + count].add(vectors - own)
    return tuco(pair, None, mask, embeddings=x, norm=norm, mesh=mesh)


def _embedding_norm(pair: Pair) -> jax.Array:
    table = pair.tuned_params["embed"]["table"].astype(jnp.float32)
    return pair.tuned_config.embed_scale * jnp.mean(jnp.linalg.norm(table, axis=1))


@functools.partial(jax.jit, static_argnames=("steps", "place", "norm", "mesh"))
def _fit(
    pair: Pair,
    start: jax.Array,
    prompts: Tokens,
    sign: float,
    rate: float,
    bound: float,
    *,
    steps: int,
    place: int,
    norm: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Fitted vectors [k, D] and mean TuCo before each step; sign 1 minimises, -1 maximises."""
    size = _embedding_norm(pair)
    optimizer = optax.adam(rate)

    def project(v: jax.Array) -> jax.Array:
        length = jnp.linalg.norm(v, axis=1, keepdims=True)
        return v * jnp.minimum(1, bound / jnp.where(length == 0, 1, length))

    def loss(v: jax.Array) -> jax.Array:
        values = soft_prompt_tuco(pair, v * size, prompts, place=place, norm=norm, mesh=mesh)
        return sign * jnp.mean(values)

    def step(carry: Any, _: None) -> Any:
        v, moments = carry
        value, slope = jax.value_and_grad(loss)(v)
        updates, moments = optimizer.update(slope, moments)
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
    if shortest <= options.place:
        raise InputError(
            f"{name}: a prompt of {shortest} tokens has none after place {options.place}; lower "
            "place or leave the prompt out"
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
    """Vectors that minimise, or maximise, mean TuCo over a batch of prompts.

    One compiled scan over all steps, on the mesh that the pair is spread over, if any. Raises
    InputError for prompts that are not right-padded, are too short for `place` or too long for
    the context.
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
    how: Any = {"place": options.place, "norm": options.norm, "mesh": mesh}
    vectors, history = _fit(
        pair,
        start,
        prompts,
        -1.0 if options.maximise else 1.0,
        options.rate,
        float("inf") if options.bound is None else options.bound,
        steps=options.steps,
        **how,
    )
    whole = functools.partial(soft_prompt_tuco, pair, **how)
    plain = jax.jit(tuco, static_argnames=("norm", "mesh"))

    def judged(rows: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        without = plain(pair, *rows, norm=options.norm, mesh=mesh)
        found = without, whole(start, rows), whole(vectors, rows)
        a, b, c = (np.asarray(x) for x in found)
        return a, b, c

    own = judged(prompts)
    apart = judged(held_out) if held_out is not None else None
    return SoftPrompt(vectors, np.asarray(history), *own, apart)
