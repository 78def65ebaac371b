"""One alpha a layer, learned by gradient from questions with known answers.

    x_{l+1} = x_l + PTC(x_l, l) + alpha_l FTC(x_l, l)        (Definition 5.1, alpha by layer)
    min over alpha of  -mean_n log p(answer_n | question_n) + penalty mean_l (alpha_l - 1)^2

The paper chooses one alpha for all layers from a grid; this asks what a choice by layer would add.
L numbers can learn a small set by heart, so both are judged on folds that they have not seen.

Legend: N questions, T tokens, O options, L layers, V vocabulary, F folds, A alphas of the grid.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from common_jax.errors import InputError
from tuco_jax.core.decompose import decompose
from tuco_jax.core.places import last_column
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import mesh_of, put_rows

__all__ = [
    "GRID",
    "Choices",
    "Folds",
    "LayerAlphaOptions",
    "cross_validate_layer_alpha",
    "fit_layer_alpha",
    "option_chances",
]

GRID = (0.75, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25)  # the paper's, section 5.1


class Choices(NamedTuple):
    """Questions: tokens [N, T] int, mask [N, T], options [N, O] int tokens, answers [N] int.

    An option is the token that would follow the question; an answer is the place of the right one
    among them.
    """

    tokens: jax.Array
    mask: jax.Array
    options: jax.Array
    answers: jax.Array


@dataclasses.dataclass(frozen=True)
class LayerAlphaOptions:
    """steps and rate of Adam, from alpha 1 at every layer; penalty: pull towards 1."""

    steps: int = 30
    rate: float = 0.02
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}: give 1 or more")
        if not self.rate > 0:
            raise InputError(f"rate is {self.rate}: give a number above 0")
        if not self.penalty >= 0:
            raise InputError(f"penalty is {self.penalty}: give 0 or more")


@dataclasses.dataclass(frozen=True)
class Folds:
    """Judged on questions that were held out, each by the fold that it was in.

    alphas [F, L], learned; grid [F], the best of the grid on the same questions. Losses [N], nats,
    and hits [N] bool (the right option is the most probable of the options) at alpha 1, at the
    grid's alpha, and at the learned ones: keys "one", "grid", "learned". fold [N].
    """

    alphas: np.ndarray
    grid: np.ndarray
    losses: dict[str, np.ndarray]
    hits: dict[str, np.ndarray]
    fold: np.ndarray


def option_chances(
    pair: Pair, choices: Choices, alpha: Any, *, mesh: Mesh | None = None
) -> jax.Array:
    """Log probability [N, O] of each option's token after its question, over all of V.

    alpha: broadcastable to [L, N]; differentiable in it. Pure and jittable. The head is applied at
    the last token alone, else as `decompose(alpha=..., logits=True, mesh=mesh)`.
    """
    out = decompose(pair, choices.tokens, choices.mask, alpha, remat=True, mesh=mesh)
    column = last_column(choices.mask)
    last = jnp.take_along_axis(out.hidden, column[:, None, None], axis=1)[:, 0]
    logits = decoder.logits(pair.tuned_config, pair.tuned_params, last, pair.lora)
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), choices.options, axis=1)


def _right(chances: jax.Array, choices: Choices) -> jax.Array:
    """Loss [N]: minus the right option's log probability."""
    return -jnp.take_along_axis(chances, choices.answers[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("steps", "mesh"))
def _descend(
    pair: Pair,
    choices: Choices,
    weights: jax.Array,
    rate: float,
    penalty: float,
    *,
    steps: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    optimizer = optax.adam(rate)

    def loss(alpha: jax.Array) -> jax.Array:
        own = _right(option_chances(pair, choices, alpha[:, None], mesh=mesh), choices)
        mean = jnp.sum(weights * own) / jnp.sum(weights)
        return mean + penalty * jnp.mean(jnp.square(alpha - 1))

    def step(carry: Any, _: None) -> Any:
        alpha, moments = carry
        value, slope = jax.value_and_grad(loss)(alpha)
        updates, moments = optimizer.update(slope, moments)
        return (alpha + updates, moments), value

    alpha = jnp.ones(pair.tuned_config.depth)
    carry = alpha, optimizer.init(alpha)
    (alpha, _), history = jax.lax.scan(step, carry, length=steps)
    return alpha, history


def _fit(
    pair: Pair, choices: Choices, weights: jax.Array, options: LayerAlphaOptions
) -> tuple[jax.Array, jax.Array]:
    mesh = mesh_of(pair)
    choices, weights = put_rows((choices, weights), mesh)
    return _descend(
        pair, choices, weights, options.rate, options.penalty, steps=options.steps, mesh=mesh
    )


@functools.partial(jax.jit, static_argnames="mesh")
def _judge(
    pair: Pair, choices: Choices, alpha: jax.Array, *, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """Losses and hits [N] at alpha [L]."""
    chances = option_chances(pair, choices, alpha[:, None], mesh=mesh)
    return _right(chances, choices), jnp.argmax(chances, axis=1) == choices.answers


def fit_layer_alpha(
    pair: Pair,
    choices: Choices,
    options: LayerAlphaOptions | None = None,
    *,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, np.ndarray]:
    """Alphas [L], and the penalised loss before each step, nats a question.

    weights [N]: of the questions; None: all alike. One compiled scan over all steps. Raises
    InputError for questions that are not as `Choices` says.
    """
    check_choices(pair, choices)
    weights = jnp.ones(len(choices.answers)) if weights is None else jnp.asarray(weights)
    if weights.shape != choices.answers.shape or not float(weights.sum()) > 0:
        raise InputError("weights: give one a question, above 0 in sum")
    alpha, history = _fit(pair, choices, weights, options or LayerAlphaOptions())
    return alpha, np.asarray(history)


def check_choices(pair: Pair, choices: Choices) -> None:
    """InputError, naming the question by its number from 1, for what cannot be learned from."""
    options, answers = np.asarray(choices.options), np.asarray(choices.answers)
    mask = np.asarray(choices.mask).astype(bool)
    if options.ndim != 2 or options.shape[1] < 2 or len(options) != len(answers):
        raise InputError("options: give [N, O] tokens, two or more for each of N answers")
    if mask.shape != choices.tokens.shape or len(mask) != len(answers) or not len(mask):
        raise InputError("tokens and mask: give [N, T] each, a row a question")
    for number in range(len(answers)):
        row, answer = options[number].tolist(), int(answers[number])
        where = f"question {number + 1}"
        if not mask[number].any():
            raise InputError(f"{where}: has no token; leave it out")
        if not 0 <= answer < len(row):
            raise InputError(f"{where}: answer {answer} is outside its {len(row)} options")
        if len(set(row)) < len(row):
            raise InputError(
                f"{where}: two options begin with one token, which cannot tell them apart; use "
                "other options"
            )
        if not 0 <= min(row) <= max(row) < pair.tuned_config.vocab_size:
            raise InputError(f"{where}: an option's token is beyond the model's vocabulary")


def cross_validate_layer_alpha(
    pair: Pair,
    choices: Choices,
    options: LayerAlphaOptions | None = None,
    *,
    grid: Sequence[float] = GRID,
    folds: int = 5,
    seed: int = 0,
) -> Folds:
    """Learned alphas against alpha 1 and against the best of a grid, on held-out folds.

    The grid's alpha is the one of the lowest loss on the questions that the learned ones are
    fitted to. Raises InputError for too few questions for the folds and as `fit_layer_alpha`.
    """
    check_choices(pair, choices)
    options = options or LayerAlphaOptions()
    count, depth = len(choices.answers), pair.tuned_config.depth
    if not 2 <= folds <= count:
        raise InputError(
            f"folds is {folds}: give 2 or more, {count} at most for {count} questions"
        )
    if not grid:
        raise InputError("grid holds no alpha: give one or more")
    fold = np.random.default_rng(seed).permutation(np.arange(count) % folds)

    mesh = mesh_of(pair)
    placed = put_rows(choices, mesh)

    def judged(alpha: Any) -> tuple[np.ndarray, np.ndarray]:
        alphas = jnp.broadcast_to(jnp.float32(alpha), (depth,))
        losses, hits = _judge(pair, placed, alphas, mesh=mesh)
        return np.asarray(losses), np.asarray(hits)

    by_grid = [judged(alpha) for alpha in grid]
    one = judged(1.0)
    losses = {name: np.empty(count, np.float32) for name in ("grid", "learned")}
    hits = {name: np.empty(count, bool) for name in ("grid", "learned")}
    alphas, chosen = np.empty((folds, depth), np.float32), np.empty(folds, np.float32)
    for f in range(folds):
        seen, apart = fold != f, fold == f
        alphas[f], _ = _fit(pair, choices, jnp.asarray(seen, jnp.float32), options)
        best = int(np.argmin([found[seen].mean() for found, _ in by_grid]))
        chosen[f] = grid[best]
        for name, found in (("grid", by_grid[best]), ("learned", judged(alphas[f]))):
            losses[name][apart], hits[name][apart] = (x[apart] for x in found)
    return Folds(alphas, chosen, {"one": one[0], **losses}, {"one": one[1], **hits}, fold)
