"""Means, AUCs and their bootstrap intervals.

Legend: N observations, M of a second group, R bootstrap draws, C clusters.

Observations that share something (a jailbreak template, a source) are no independent draws:
given `clusters`, whole clusters are resampled.
"""

from typing import NamedTuple

import numpy as np

__all__ = ["Estimate", "auc", "bootstrap_auc", "bootstrap_mean", "roc"]

DRAWS = 2000


class Estimate(NamedTuple):
    """A value and its 95% percentile interval."""

    value: float
    low: float
    high: float


def _weights(
    size: int, clusters: np.ndarray | None, draws: int, rng: np.random.Generator
) -> np.ndarray:
    """How often each observation is in each draw, [R, N]."""
    names = np.arange(size) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    count = int(names.max()) + 1
    return rng.multinomial(count, np.full(count, 1 / count), size=draws)[:, names].astype(float)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def bootstrap_mean(
    values: np.ndarray, clusters: np.ndarray | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """The mean of values [N], resampled by observation or by clusters [N]."""
    weights = _weights(len(values), clusters, draws, np.random.default_rng(seed))
    return _estimate(values.mean(), weights @ values / weights.sum(axis=1))


def _wins(higher: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """1 where higher[i] > lower[j], a half where they are equal, [N, M]."""
    difference = higher[:, None] - lower[None]
    return (np.sign(difference) + 1) / 2


def auc(higher: np.ndarray, lower: np.ndarray) -> float:
    """Probability that a value of the first group exceeds one of the second (ties count half).

    Above 0.5: the first group has the higher values.
    """
    return float(_wins(higher, lower).mean())


def bootstrap_auc(
    higher: np.ndarray,
    lower: np.ndarray,
    clusters: tuple[np.ndarray | None, np.ndarray | None] = (None, None),
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """`auc` of groups [N] and [M], each resampled on its own."""
    rng = np.random.default_rng(seed)
    wins = _wins(higher, lower)
    first = _weights(len(higher), clusters[0], draws, rng)
    second = _weights(len(lower), clusters[1], draws, rng)
    total = first.sum(axis=1) * second.sum(axis=1)
    return _estimate(wins.mean(), np.einsum("rn,nm,rm->r", first, wins, second) / total)


def roc(higher: np.ndarray, lower: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates of "is of the first group" as the threshold falls."""
    from sklearn.metrics import roc_curve

    values = np.concatenate([higher, lower])
    labels = np.repeat([1, 0], [len(higher), len(lower)])
    false, true, _ = roc_curve(labels, values, drop_intermediate=False)
    return false, true
