"""One alpha per layer, learned by gradient from questions with known answers.

    x_{l+1} = x_l + PTC(x_l, l) + alpha_l FTC(x_l, l)        (Definition 5.1, alpha by layer)
    min over alpha of  -mean_n log p(answer_n | question_n) + penalty mean_l (alpha_l - 1)^2

The paper chooses one alpha for all layers from a grid. Here each layer has its own. L free numbers
can overfit a small set, so both choices are evaluated by cross-validation.

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
from jaxtyping import Array, Bool, Float, Int, Shaped

from common_jax.cli.ranges import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TwoOrMore,
    check_range,
    check_ranges,
)
from common_jax.errors import InputError
from common_jax.mesh import fetch
from tuco_jax.core.alpha_grid import PAPER_GRID
from tuco_jax.core.decompose import decompose
from tuco_jax.core.places import last_column
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import mesh_of, put_rows

__all__ = [
    "Choices",
    "CrossValidation",
    "LayerAlphaOptions",
    "cross_validate_layer_alpha",
    "fit_layer_alpha",
    "option_log_probs",
]


class Choices(NamedTuple):
    """Multiple-choice questions.

    tokens, mask: the questions. options: the token of each option, as it would follow the
    question. answers: index of the right option.
    """

    tokens: Int[Array, "N T"]
    mask: Shaped[Array, "N T"]
    options: Int[Array, "N O"]
    answers: Int[Array, " N"]


@dataclasses.dataclass(frozen=True)
class LayerAlphaOptions:
    """Adam, from alpha 1 at every layer.

    penalty: weight of the mean squared distance of alpha from 1.
    """

    steps: PositiveInt = 30
    learning_rate: PositiveFloat = 0.02
    penalty: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class CrossValidation:
    """Results on held-out questions.

    alphas: those learned without each fold. grid: the best alpha of the grid without each fold.
    losses (nats) and hits (the right option is the most probable one) of each question at alpha 1,
    at the grid's alpha and at the learned alphas: keys "one", "grid" and "learned". fold: which
    fold each question was held out in.
    """

    alphas: Float[np.ndarray, "F L"]
    grid: Float[np.ndarray, " F"]
    losses: dict[str, Float[np.ndarray, " N"]]
    hits: dict[str, Bool[np.ndarray, " N"]]
    fold: Int[np.ndarray, " N"]


def option_log_probs(
    pair: Pair,
    choices: Choices,
    alpha: float | Float[Array, "..."],
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "N O"]:
    """Log probability of each option's token after its question, over the whole vocabulary.

    alpha: broadcastable to [L, N]; the result is differentiable in it. Pure and jittable. As
    `decompose(alpha=..., logits=True, mesh=mesh)`, with the head at the last token only.
    """
    out = decompose(pair, choices.tokens, choices.mask, alpha, remat=True, mesh=mesh)
    column = last_column(choices.mask)
    last = jnp.take_along_axis(out.hidden, column[:, None, None], axis=1)[:, 0]
    logits = decoder.logits(pair.tuned_config, pair.tuned_params, last, pair.lora)
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), choices.options, axis=1)


def _nll(log_probs: jax.Array, choices: Choices) -> jax.Array:
    """Negative log-likelihood [N] of the right options."""
    return -jnp.take_along_axis(log_probs, choices.answers[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("steps", "mesh"))
def _descend(
    pair: Pair,
    choices: Choices,
    weights: jax.Array,
    learning_rate: float,
    penalty: float,
    *,
    steps: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    optimizer = optax.adam(learning_rate)

    def loss(alpha: jax.Array) -> jax.Array:
        own = _nll(option_log_probs(pair, choices, alpha[:, None], mesh=mesh), choices)
        mean = jnp.sum(weights * own) / jnp.sum(weights)
        return mean + penalty * jnp.mean(jnp.square(alpha - 1))

    def step(carry: Any, _: None) -> Any:
        alpha, moments = carry
        value, gradient = jax.value_and_grad(loss)(alpha)
        updates, moments = optimizer.update(gradient, moments)
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
        pair,
        choices,
        weights,
        options.learning_rate,
        options.penalty,
        steps=options.steps,
        mesh=mesh,
    )


@functools.partial(jax.jit, static_argnames="mesh")
def _evaluate(
    pair: Pair, choices: Choices, alpha: jax.Array, *, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """Loss and hit [N] of each question at alpha [L]."""
    log_probs = option_log_probs(pair, choices, alpha[:, None], mesh=mesh)
    return _nll(log_probs, choices), jnp.argmax(log_probs, axis=1) == choices.answers


def fit_layer_alpha(
    pair: Pair,
    choices: Choices,
    options: LayerAlphaOptions | None = None,
    *,
    weights: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, " L"], Float[np.ndarray, " steps"]]:
    """The learned alphas, and the penalised loss before each step, in nats a question.

    weights: of the questions in the mean; by default equal. One compiled scan over all steps.
    Raises InputError for questions that are not as `Choices` says.
    """
    check_choices(pair, choices)
    weights = jnp.ones(len(choices.answers)) if weights is None else jnp.asarray(weights)
    if weights.shape != choices.answers.shape or not float(weights.sum()) > 0:
        raise InputError("weights: give one a question, above 0 in sum")
    alpha, history = _fit(pair, choices, weights, options or LayerAlphaOptions())
    return alpha, fetch(history)


def check_choices(pair: Pair, choices: Choices) -> None:
    """Raises InputError for questions of wrong shapes or values, naming the question from 1."""
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
    grid: Sequence[float] = PAPER_GRID,
    folds: TwoOrMore = 5,
    seed: int = 0,
) -> CrossValidation:
    """Compare learned alphas with alpha 1 and with the best alpha of a grid, on held-out folds.

    The grid's alpha is the one of the lowest loss on the questions that the learned ones are
    fitted to. Raises InputError as `fit_layer_alpha`, and for fewer questions than folds.
    """
    check_choices(pair, choices)
    options = options or LayerAlphaOptions()
    count, depth = len(choices.answers), pair.tuned_config.depth
    check_range(TwoOrMore, folds, "folds")
    if folds > count:
        raise InputError(f"folds is {folds}: give {count} at most for {count} questions")
    if not grid:
        raise InputError("grid holds no alpha: give one or more")
    fold = np.random.default_rng(seed).permutation(np.arange(count) % folds)

    mesh = mesh_of(pair)
    placed = put_rows(choices, mesh)

    def evaluate(alpha: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        alphas = jnp.broadcast_to(jnp.float32(alpha), (depth,))
        losses, hits = _evaluate(pair, placed, alphas, mesh=mesh)
        return fetch((losses, hits))

    by_grid = [evaluate(alpha) for alpha in grid]
    one = evaluate(1.0)
    losses = {name: np.empty(count, np.float32) for name in ("grid", "learned")}
    hits = {name: np.empty(count, bool) for name in ("grid", "learned")}
    alphas, chosen = np.empty((folds, depth), np.float32), np.empty(folds, np.float32)
    for f in range(folds):
        seen, held_out = fold != f, fold == f
        alphas[f], _ = _fit(pair, choices, jnp.asarray(seen, jnp.float32), options)
        best = int(np.argmin([found[seen].mean() for found, _ in by_grid]))
        chosen[f] = grid[best]
        for name, found in (("grid", by_grid[best]), ("learned", evaluate(alphas[f]))):
            losses[name][held_out], hits[name][held_out] = (x[held_out] for x in found)
    return CrossValidation(
        alphas, chosen, {"one": one[0], **losses}, {"one": one[1], **hits}, fold
    )
