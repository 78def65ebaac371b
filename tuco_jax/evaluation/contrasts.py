"""Comparing two groups of scores: AUCs with intervals, tables, figures and verdicts.

Legend: N scores of a group.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Figure, Table, Verdict
from tuco_jax.evaluation.statistics import (
    Estimate,
    bootstrap_auc,
    bootstrap_mean,
    bootstrap_tpr,
    centred_auc,
    in_shared_clusters,
    within_auc,
)

__all__ = [
    "MIN_PROMPTS",
    "Compared",
    "Contrast",
    "Sample",
    "compare",
    "contrast_table",
    "means_table",
    "orientation",
    "shown",
    "strip_plot",
    "verdict",
]

MIN_PROMPTS = 5  # of a group: a bootstrap of fewer observations means nothing


@dataclasses.dataclass(frozen=True)
class Sample:
    """Scores of one kind of prompt, under a short name.

    clusters: what each prompt shares with others (a template, an attack string), or None.
    """

    name: str
    values: Float[np.ndarray, " N"]
    clusters: Shaped[np.ndarray, " N"] | None = None


@dataclasses.dataclass(frozen=True)
class Contrast:
    """auc: P(score of `higher` > score of `lower`); claim: what an AUC above a half would mean."""

    higher: str
    lower: str
    auc: Estimate
    claim: str

    @property
    def verdict(self) -> str:
        """Whether the claim holds, by the interval."""
        if self.auc.low > 0.5:
            return "yes"
        return "the reverse" if self.auc.high < 0.5 else "not clear"


@dataclasses.dataclass(frozen=True)
class Compared:
    """The first group against the second. Every AUC is P(first > second), a tie counts half.

    contrast: the pooled AUC; None where a group is empty. within: the AUC over pairs within one
    cluster; centred: with each cluster's mean subtracted; both None where no cluster has members
    of both groups. inside: sizes of the groups in clusters with members of both. tpr: true
    positive rate at 5% false positives; the first group is called by high scores, or by low ones
    where `below`.
    """

    first: str
    second: str
    sizes: tuple[int, int]
    contrast: Contrast | None
    within: Estimate | None = None
    centred: Estimate | None = None
    tpr: Estimate | None = None
    below: bool = False
    inside: tuple[int, int] = (0, 0)

    @property
    def auc(self) -> Estimate | None:
        """The pooled AUC."""
        return self.contrast.auc if self.contrast else None

    @property
    def enough(self) -> bool:
        """Whether both groups are large enough for an interval to mean anything."""
        return min(self.sizes) >= MIN_PROMPTS

    @property
    def enough_inside(self) -> bool:
        """Whether both groups are large enough in clusters with members of both."""
        return min(self.inside) >= MIN_PROMPTS


def compare(first: Sample, second: Sample, *, below: bool = False, seed: int = 0) -> Compared:
    """Pooled, within-cluster and centred AUC, and TPR at 5% FPR, each with its interval.

    below: members of the first group are called by low scores, not by high ones.
    """
    sizes = len(first.values), len(second.values)
    if not all(sizes):
        return Compared(first.name, second.name, sizes, None, below=below)
    high, low = np.asarray(first.values, float), np.asarray(second.values, float)
    pooled = _mirrored(bootstrap_auc, high, low, (first.clusters, second.clusters), below, seed)
    claim = f"{first.name} has a higher score than {second.name}"
    sign = -1 if below else 1
    clusters = (first.clusters, second.clusters)
    tpr = bootstrap_tpr(sign * high, sign * low, clusters, seed=seed)
    within = centred = None
    shared = 0, 0
    if first.clusters is not None and second.clusters is not None:
        both = first.clusters, second.clusters
        within = _mirrored(within_auc, high, low, both, below, seed)
        centred = _mirrored(centred_auc, high, low, both, below, seed) if within else None
        one, other = in_shared_clusters(both)
        shared = int(one.sum()), int(other.sum())
    contrast = Contrast(first.name, second.name, pooled, claim)
    return Compared(first.name, second.name, sizes, contrast, within, centred, tpr, below, shared)


def _mirrored(
    estimate: Any, high: np.ndarray, low: np.ndarray, clusters: Any, below: bool, seed: int
) -> Any:
    """An AUC with its interval; where `below`, one minus that of the groups exchanged."""
    if not below:
        return estimate(high, low, clusters, seed=seed)
    found = estimate(low, high, clusters[::-1], seed=seed)
    return found and Estimate(1 - found.value, 1 - found.high, 1 - found.low)


def shown(e: Estimate | None) -> str:
    """An estimate with its interval; a dash where there is none."""
    return "-" if e is None else f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def orientation(first: str, second: str, e: Estimate | None) -> str:
    """Which of the two has the higher score, in words, as the interval allows."""
    if e is None:
        return "one group is empty: no AUC"
    if e.low > 0.5:
        return f"{first} higher"
    if e.high < 0.5:
        return f"{second} higher"
    return "neither is clearly higher"


def verdict(
    e: Estimate | None, *, middle: float = 0.5, above: bool = True, of: int = MIN_PROMPTS
) -> Verdict:
    """Whether an estimate lies above (or below) `middle`, by its interval; of: observations."""
    if e is None or of < MIN_PROMPTS:
        return "not testable here"
    low, high = (e.low, e.high) if above else (2 * middle - e.high, 2 * middle - e.low)
    if low > middle:
        return "reproduced"
    return "not reproduced" if high < middle else "not clear"


def contrast_table(
    title: str, found: Sequence[Compared], *, score: str = "TuCo", cluster: str = "template"
) -> Table:
    """A row for each contrast; columns within clusters where any contrast has them.

    score, cluster: what values and clusters are, for the headings.
    """
    clustered = any(c.within for c in found)
    rows = [
        [
            f"{c.first} > {c.second}",
            f"{c.sizes[0]} : {c.sizes[1]}",
            shown(c.auc),
            *([shown(c.within), shown(c.centred)] if clustered else []),
            f"{shown(c.tpr)}{' (by low scores)' if c.below and c.tpr else ''}",
            orientation(c.first, c.second, c.auc)
            if c.enough or not c.auc
            else f"fewer than {MIN_PROMPTS} of a kind: too few to say",
        ]
        for c in found
    ]
    inside = [f"AUC within {cluster}", f"AUC, {cluster}'s mean removed"] if clustered else []
    columns = ("first > second", "prompts", "AUC", *inside, "TPR at 5% FPR", "in words")
    return Table(
        title,
        columns,
        rows,
        f"AUC: the probability that a prompt of the first kind has the higher {score} (a half is "
        "chance); in brackets the 95% bootstrap interval. TPR: share of the first kind that a "
        "threshold calls which at most 5% of the second kind pass.",
    )


def means_table(
    title: str,
    samples: Sequence[Sample],
    tokens: Sequence[Sequence[int] | Int[np.ndarray, " N"]],
    seed: int,
) -> Table:
    """A row for each group: mean score with its interval, and mean of its lengths in `tokens`."""
    rows = []
    for sample, lengths in zip(samples, tokens, strict=True):
        values = np.asarray(sample.values, float)
        mean = bootstrap_mean(values, sample.clusters, seed=seed) if len(values) else None
        length = f"{np.mean(lengths):.0f}" if len(values) else "-"
        rows.append([sample.name, len(values), length, shown(mean)])
    return Table(title, ("group", "prompts", "mean tokens", "mean [95% interval]"), rows)


def strip_plot(name: str, label: str, samples: Sequence[Sample], caption: str) -> Figure:
    """Every score as a point, a row for each group, with the group's mean."""
    rng = np.random.default_rng(0)

    def paint(axes: Any) -> None:
        for row, sample in enumerate(samples):
            color = PALETTE[row % len(PALETTE)]
            height = row + rng.uniform(-0.25, 0.25, len(sample.values))
            axes.plot(sample.values, height, ".", color=color, alpha=0.6)
            if len(sample.values):
                axes.plot([sample.values.mean()] * 2, [row - 0.35, row + 0.35], color=color)
        axes.set_yticks(range(len(samples)), [s.name for s in samples])
        axes.invert_yaxis()
        axes.set_xlabel(label)

    return Figure(name, draw(paint, height=1.2 + 0.5 * len(samples)), caption)
