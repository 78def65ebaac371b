"""How well images are told apart: by a reward, and by what needs no training.

Images are looked at noised, at some diffusion steps, each with one draw of noise that all share.
A judgement is a number an image, higher for those that the expert knows.

Legend: N images, H harmful and O other ones among them, L looks (diffusion steps).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped
from scipy.special import stdtrit
from scipy.stats import rankdata

from common_jax.mesh import fetch
from common_jax.precision import jit
from reward_jax import sharding
from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.diffusion.process import q_sample
from reward_jax.diffusion.schedule import Schedule
from reward_jax.reward.relative import RelativeReward

__all__ = [
    "Auc",
    "Looks",
    "auc",
    "best_look",
    "estimates",
    "interval",
    "loss_differences",
    "mean_auc",
    "mean_difference",
    "over_pairs",
    "score_norms",
    "scores",
]

_RESAMPLED = 1000  # times, for an interval
_AT_ONCE = 250  # images of a compiled call


class Looks(NamedTuple):
    """At which diffusion steps images are looked at, with the noise that this key draws."""

    schedule: Schedule
    t: Int[np.ndarray, " L"]
    key: Key[Array, ""]


class Auc(NamedTuple):
    """The share of pairs in which a harmful image is judged lower; with its 95% interval.

    Or a difference of two such shares.
    """

    value: float
    low: float
    high: float


def estimates(
    denoiser: Denoiser, x_0: Float[np.ndarray, "N H W C"], looks: Looks
) -> Float[np.ndarray, "L N H W C"]:
    """A denoiser's estimates of the images, at each look: a network run each."""
    return _in_parts(_estimate, denoiser, x_0, looks)


def scores(
    reward: RelativeReward, x_0: Float[np.ndarray, "N H W C"], looks: Looks
) -> Float[np.ndarray, "L N"]:
    """A reward's own output at each look: a network run each."""
    return _in_parts(_score, reward, x_0, looks)


def _in_parts(
    program: Any, model: Any, x_0: Float[np.ndarray, "N H W C"], looks: Looks
) -> Float[np.ndarray, "L N ..."]:
    found = []
    t = jnp.asarray(looks.t)
    for first in range(0, len(x_0), _AT_ONCE):
        part = x_0[first : first + _AT_ONCE]
        whole = np.zeros((_AT_ONCE, *x_0.shape[1:]), np.float32)  # one program for all
        whole[: len(part)] = part
        key = jax.random.fold_in(looks.key, first)
        made = fetch(program(model, looks.schedule, whole, t, key))
        found.append(np.asarray(made)[:, : len(part)])
    return np.concatenate(found, axis=1)


@jit
def _estimate(model: Any, schedule: Schedule, x_0: Any, t: Any, key: Any) -> Any:
    return _at_looks(sharding.in_use(model).x0, schedule, x_0, t, key)


@jit
def _score(model: Any, schedule: Schedule, x_0: Any, t: Any, key: Any) -> Any:
    return _at_looks(sharding.in_use(model).learned, schedule, x_0, t, key)


def _at_looks(apply: Any, schedule: Schedule, x_0: Any, t: Any, key: Any) -> Any:
    def one(given: Any) -> Any:
        level, own = given
        rows = jnp.full(x_0.shape[:1], level)
        noise = jax.random.normal(own, x_0.shape)
        return apply(q_sample(schedule, x_0, rows, noise), rows)

    return jax.lax.map(one, (t, jax.random.split(key, t.shape[0])))


def loss_differences(
    base: Float[np.ndarray, "L N H W C"],
    expert: Float[np.ndarray, "L N H W C"],
    x_0: Float[np.ndarray, "N H W C"],
    looks: Looks,
) -> Float[np.ndarray, "L N"]:
    """The base's denoising loss less the expert's, in units of v; base, expert: `estimates`.

    Their mean over all looks is a judgement of 2 L network runs.
    """
    s = np.asarray(looks.schedule.sqrt_one_minus_alphas_cumprod)[looks.t][:, None]

    def loss(estimate: Float[np.ndarray, "L N H W C"]) -> Float[np.ndarray, "L N"]:
        return np.square(estimate - x_0[None]).mean(axis=(2, 3, 4)) / s**2

    return loss(base) - loss(expert)


def score_norms(
    base: Float[np.ndarray, "L N H W C"], expert: Float[np.ndarray, "L N H W C"], looks: Looks
) -> Float[np.ndarray, "L N"]:
    """Minus the norm of the difference of scores, in units of epsilon: two network runs a look."""
    a = np.asarray(looks.schedule.sqrt_alphas_cumprod)[looks.t][:, None]
    s = np.asarray(looks.schedule.sqrt_one_minus_alphas_cumprod)[looks.t][:, None]
    return -a / s * np.sqrt(np.square(expert - base).sum(axis=(2, 3, 4)))


def auc(judged: Float[np.ndarray, " N"], harmful: Bool[np.ndarray, " N"]) -> float:
    """The share of pairs of a harmful and another image in which the harmful is judged lower."""
    other = ~harmful
    pairs = harmful.sum() * other.sum()
    ranks = rankdata(judged)[other].sum() - other.sum() * (other.sum() + 1) / 2
    return float(ranks / pairs)


def interval(
    judged: Float[np.ndarray, " N"],
    harmful: Bool[np.ndarray, " N"],
    seed: int,
    groups: Shaped[np.ndarray, " N"] | None = None,
) -> Auc:
    """The AUC and its bootstrap interval: harmful and other images are drawn anew, each.

    groups: names; where they are given groups are drawn, each with all its images, such as those
    of one prompt.
    """
    generator = np.random.default_rng(seed)
    if groups is None:
        draws = _resampled(judged, harmful, generator)
    else:
        draws = _of_groups(judged, harmful, groups, generator)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Auc(auc(judged, harmful), float(low), float(high))


def mean_auc(
    of_choices: list[tuple[Float[np.ndarray, " N"], Bool[np.ndarray, " N"]]], seed: int
) -> Auc:
    """The mean AUC over choices, of each a judgement and what is harmful.

    The interval is of choices drawn anew, and of images within each: which classes are called
    harmful is chance, as the images are.
    """
    generator = np.random.default_rng(seed)
    values = [auc(*one) for one in of_choices]
    draws = np.stack([_resampled(*one, generator) for one in of_choices])
    picked = generator.integers(0, len(draws), draws.shape[::-1])
    means = np.take_along_axis(draws.T, picked, axis=1).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Auc(float(np.mean(values)), float(low), float(high))


def mean_difference(
    one: Sequence[Float[np.ndarray, " N"]],
    other: Sequence[Float[np.ndarray, " N"]],
    harmful: Sequence[Bool[np.ndarray, " N"]],
    seed: int,
) -> Auc:
    """The mean AUC over choices by one judge, less that by another, of the same N images.

    one, other, harmful: of each choice. The interval is of images drawn anew, the same for all
    choices and both judges; those that are harmful in the same choices are drawn among themselves.
    """
    kinds = np.unique(np.stack(harmful), axis=1, return_inverse=True)[1].ravel()
    members = [np.flatnonzero(kinds == kind) for kind in range(kinds.max() + 1)]
    generator = np.random.default_rng(seed)

    def difference(rows: Int[np.ndarray, " N"]) -> float:
        of_choices = zip(one, other, harmful, strict=True)
        return float(
            np.mean(
                [auc(x[rows], bad[rows]) - auc(y[rows], bad[rows]) for x, y, bad in of_choices]
            )
        )

    def draw() -> float:
        drawn = [own[generator.integers(len(own), size=len(own))] for own in members]
        return difference(np.concatenate(drawn))

    draws = [draw() for _ in range(_RESAMPLED)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return Auc(difference(np.arange(len(kinds))), float(low), float(high))


def over_pairs(aucs: Sequence[float] | Float[np.ndarray, " pairs"]) -> Auc:
    """The mean of an AUC over pairs of models, with Student's interval over these.

    aucs: of two pairs or more.
    """
    values = np.asarray(aucs)
    far = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    return Auc(mean, float(mean - far), float(mean + far))


def _resampled(
    judged: Float[np.ndarray, " N"],
    harmful: Bool[np.ndarray, " N"],
    generator: np.random.Generator,
) -> Float[np.ndarray, " draws"]:
    """AUCs of images drawn anew."""
    kinds = judged[harmful], judged[~harmful]
    both = np.repeat([True, False], [len(kinds[0]), len(kinds[1])])

    def draw() -> float:
        drawn = [generator.choice(kind, len(kind)) for kind in kinds]
        return auc(np.concatenate(drawn), both)

    return np.array([draw() for _ in range(_RESAMPLED)])


def _of_groups(
    judged: Float[np.ndarray, " N"],
    harmful: Bool[np.ndarray, " N"],
    groups: Shaped[np.ndarray, " N"],
    generator: np.random.Generator,
) -> Float[np.ndarray, " draws"]:
    """AUCs of groups drawn anew."""
    numbers = np.unique(groups, return_inverse=True)[1]
    members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])

    def draw() -> float:
        picked = generator.integers(len(members), size=len(members))
        rows = np.concatenate([members[i] for i in picked])
        return auc(judged[rows], harmful[rows])

    return np.array([draw() for _ in range(_RESAMPLED)])


def best_look(judged: Float[np.ndarray, "L N"], harmful: Bool[np.ndarray, " N"]) -> int:
    """The number of the look by which images are told apart best; for validation images."""
    return int(np.argmax([auc(one, harmful) for one in judged]))
