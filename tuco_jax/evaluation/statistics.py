"""Means, AUCs, proportions, and their intervals.

Legend: N observations of one group, M of another, R bootstrap draws, V distinct values.

Observations that share something, such as a jailbreak template, are not independent. With
`clusters`, whole clusters are resampled (a cluster in both groups at once), then the observations
within each.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

__all__ = [
    "Estimate",
    "auc",
    "bootstrap_auc",
    "bootstrap_mean",
    "bootstrap_strength_gap",
    "bootstrap_tpr",
    "centred_auc",
    "in_shared_clusters",
    "roc",
    "wilson_interval",
    "within_auc",
]

DRAWS = 2000


class Estimate(NamedTuple):
    """A value and its 95% percentile interval."""

    value: float
    low: float
    high: float


Clusters = np.ndarray | None


def wilson_interval(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion. Raises ValueError where there is none."""
    from scipy.stats import binomtest, norm

    if not 0 <= hits <= total or not total:
        raise ValueError(f"{hits} of {total} is no proportion")
    level = float(2 * norm.cdf(1.96) - 1)
    low, high = binomtest(hits, total).proportion_ci(confidence_level=level, method="wilson")
    return float(low), float(high)


def _weights(
    sizes: tuple[int, int], clusters: tuple[Clusters, Clusters], draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each observation of two groups is in each draw, [R, N] and [R, M].

    Of a cluster that is drawn k times, k times as many observations are drawn, in each group.
    Draws that leave a group empty are dropped, so R may be less than `draws`.
    """
    rng = np.random.default_rng(seed)
    names = [c for c in clusters if c is not None]
    union = np.unique(np.concatenate(names)) if names else np.empty(0)
    counts = np.empty((draws, 0), int)
    if union.size:
        counts = rng.multinomial(union.size, np.full(union.size, 1 / union.size), size=draws)

    def one(size: int, own: Clusters) -> np.ndarray:
        if own is None:
            return rng.multinomial(size, np.full(size, 1 / size), size=draws).astype(float)
        found = np.zeros((draws, size))
        for place, name in enumerate(union):
            members = np.flatnonzero(own == name)
            if members.size:
                chance = np.full(members.size, 1 / members.size)
                found[:, members] = rng.multinomial(counts[:, place] * members.size, chance)
        return found

    first, second = one(sizes[0], clusters[0]), one(sizes[1], clusters[1])
    both = (first.sum(axis=1) > 0) & (second.sum(axis=1) > 0)
    return first[both], second[both]


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def bootstrap_mean(
    values: Float[np.ndarray, " N"],
    clusters: Shaped[np.ndarray, " N"] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The mean, resampled by observation or by cluster."""
    size = len(values)
    weights, _ = _weights((size, size), (clusters, None), draws, seed)
    return _estimate(values.mean(), weights @ values / weights.sum(axis=1))


def _wins(higher: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """1 where higher[i] > lower[j], a half where they are equal, [N, M]."""
    difference = higher[:, None] - lower[None]
    return (np.sign(difference) + 1) / 2


def auc(higher: Float[np.ndarray, " N"], lower: Float[np.ndarray, " M"]) -> float:
    """Probability that a value of the first group exceeds one of the second; a tie counts half.

    Above 0.5: the first group has the higher values.
    """
    return float(_wins(higher, lower).mean())


def bootstrap_auc(
    higher: Float[np.ndarray, " N"],
    lower: Float[np.ndarray, " M"],
    clusters: tuple[Clusters, Clusters] = (None, None),
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """`auc` with its interval."""
    wins = _wins(higher, lower)
    first, second = _weights(wins.shape, clusters, draws, seed)
    return _estimate(wins.mean(), _weighted(first, wins, second))


def _weighted(first: np.ndarray, wins: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The AUC of each draw [R]."""
    total = first.sum(axis=1) * second.sum(axis=1)
    return ((first @ wins) * second).sum(axis=1) / total


def roc(
    higher: Float[np.ndarray, " N"], lower: Float[np.ndarray, " M"]
) -> tuple[Float[np.ndarray, " thresholds"], Float[np.ndarray, " thresholds"]]:
    """False and true positive rates of calling the first group, as the threshold falls."""
    from sklearn.metrics import roc_curve

    values = np.concatenate([higher, lower])
    labels = np.repeat([1, 0], [len(higher), len(lower)])
    false, true, _ = roc_curve(labels, values, drop_intermediate=False)
    return false, true


def in_shared_clusters(
    clusters: tuple[Shaped[np.ndarray, " N"], Shaped[np.ndarray, " M"]],
) -> tuple[Bool[np.ndarray, " N"], Bool[np.ndarray, " M"]]:
    """Which observations are in a cluster that has observations of both groups."""
    return np.isin(clusters[0], clusters[1]), np.isin(clusters[1], clusters[0])


def within_auc(
    higher: Float[np.ndarray, " N"],
    lower: Float[np.ndarray, " M"],
    clusters: tuple[Shaped[np.ndarray, " N"], Shaped[np.ndarray, " M"]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate | None:
    """`auc` over pairs within one cluster only, which a shift of a whole cluster cannot change.

    clusters: the name of each observation's. None where no cluster has observations of both
    groups.
    """
    one, other = in_shared_clusters(clusters)
    if not one.any():
        return None
    names = clusters[0][one], clusters[1][other]
    same = (names[0][:, None] == names[1]).astype(float)
    wins = _wins(higher[one], lower[other]) * same
    first, second = _weights(wins.shape, names, draws, seed)
    won, pairs = np.zeros(len(first)), np.zeros(len(first))
    for name in np.unique(names[0]):
        a, b = names[0] == name, names[1] == name
        # A cluster drawn k times has k times the observations and k^2 times the pairs: weigh by k.
        times = np.maximum(first[:, a].sum(axis=1) / a.sum(), 1)
        won += ((first[:, a] @ wins[np.ix_(a, b)]) * second[:, b]).sum(axis=1) / times
        pairs += first[:, a].sum(axis=1) * second[:, b].sum(axis=1) / times
    return _estimate(wins.sum() / same.sum(), won / pairs)


def centred_auc(
    higher: Float[np.ndarray, " N"],
    lower: Float[np.ndarray, " M"],
    clusters: tuple[Shaped[np.ndarray, " N"], Shaped[np.ndarray, " M"]],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """`auc` after each cluster's mean, over both groups, is subtracted; arguments as `within_auc`.

    A cluster of one group only is centred at 0, so it says little and pulls towards a half.
    """
    values, names = np.concatenate([higher, lower]), np.concatenate(clusters)
    place = np.unique(names, return_inverse=True)[1]
    means = np.bincount(place, values) / np.bincount(place)
    # Equal float32 scores differ from their mean by rounding only.
    rest = np.round(values - means[place], 7)
    return bootstrap_auc(
        rest[: len(higher)], rest[len(higher) :], clusters, draws=draws, seed=seed
    )


def bootstrap_tpr(
    higher: Float[np.ndarray, " N"],
    lower: Float[np.ndarray, " M"],
    clusters: tuple[Clusters, Clusters] = (None, None),
    *,
    rate: float = 0.05,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """True positive rate at a false positive rate of at most `rate`, best threshold of each draw.

    The share of the first group above a threshold that at most `rate` of the second exceeds.
    """
    values, place = np.unique(np.concatenate([higher, lower]), return_inverse=True)

    def reached(weights: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Share at or above each value, the highest first, [R, V]."""
        counts = weights @ (places[:, None] == np.arange(len(values))[::-1])
        return np.cumsum(counts, axis=1) / weights.sum(axis=1, keepdims=True)

    def tpr(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        true = reached(first, place[: len(higher)])
        false = reached(second, place[len(higher) :])
        return np.where(false <= rate + 1e-9, true, 0).max(axis=1)

    value = tpr(np.ones((1, len(higher))), np.ones((1, len(lower))))[0]
    return _estimate(value, tpr(*_weights((len(higher), len(lower)), clusters, draws, seed)))


def bootstrap_strength_gap(
    one: tuple[Float[np.ndarray, " N"], Float[np.ndarray, " M"]],
    other: tuple[Float[np.ndarray, " N"], Float[np.ndarray, " M"]],
    clusters: tuple[Clusters, Clusters] = (None, None),
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """How much better one score separates two groups than another: a difference of |AUC - 1/2|.

    one, other: two scores of the same observations, of both groups. Every draw takes the same
    observations for both. Direction does not matter: an AUC of .1 is as strong as one of .9.
    """
    first, second = _weights((len(one[0]), len(one[1])), clusters, draws, seed)

    def strengths(scores: tuple[np.ndarray, np.ndarray]) -> tuple[float, np.ndarray]:
        wins = _wins(*scores)
        return abs(wins.mean() - 0.5), np.abs(_weighted(first, wins, second) - 0.5)

    (a, drawn_a), (b, drawn_b) = strengths(one), strengths(other)
    return _estimate(a - b, drawn_a - drawn_b)
