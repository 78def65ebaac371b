"""The same contrast by TuCo and by simpler scores of the same prompts (see `baselines.py`)."""

import dataclasses
from collections.abc import Mapping, Sequence

from common_jax.report.findings import Table
from tuco_jax.evaluation.contrasts import (
    MIN_PROMPTS,
    Compared,
    Sample,
    compare,
    orientation,
    shown,
)
from tuco_jax.evaluation.statistics import Estimate, bootstrap_strength_gap

__all__ = ["ScoreRow", "simpler_table", "under_each_score"]


@dataclasses.dataclass(frozen=True)
class ScoreRow:
    """One contrast under one score; gap: how much stronger TuCo is, None for TuCo itself."""

    score: str
    compared: Compared
    gap: Estimate | None


def under_each_score(
    samples: Mapping[str, tuple[Sample, Sample]], *, seed: int = 0
) -> list[ScoreRow]:
    """A row for each score; none where a group is empty.

    samples: the two groups under each score's name, "TuCo" among them.
    """
    tuco = samples["TuCo"]
    if not all(len(sample.values) for sample in tuco):
        return []
    rows = []
    for name, (first, second) in samples.items():
        gap = None
        if name != "TuCo":
            values = (tuco[0].values, tuco[1].values), (first.values, second.values)
            gap = bootstrap_strength_gap(*values, (first.clusters, second.clusters), seed=seed)
        rows.append(ScoreRow(name, compare(first, second, seed=seed), gap))
    return rows


def simpler_table(contrasts: Sequence[Sequence[ScoreRow]]) -> Table:
    """Every contrast under every score."""
    cells = []
    for row in (row for contrast in contrasts for row in contrast):
        c = row.compared
        which = f"fewer than {MIN_PROMPTS} of a kind: too few to say"
        if c.enough:
            which = orientation(c.first, c.second, c.auc)
        cells.append([f"{c.first} > {c.second}", row.score, shown(c.auc), which, shown(row.gap)])
    return Table(
        "The same contrasts by simpler scores",
        ("first > second", "score", "AUC", "in words", "TuCo stronger by"),
        cells,
        "Stronger by: |AUC - 1/2| of TuCo less that of the score, with the 95% interval over "
        "draws of the same prompts; above 0, TuCo tells the two apart better.",
    )
