"""Tables, the curve and the verdict that both alpha studies report.

Legend: A alphas, N questions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Figure, Table, Verdict
from tuco_jax.datasets.multiple_choice import Task
from tuco_jax.evaluation.contrasts import MIN_PROMPTS
from tuco_jax.evaluation.statistics import Estimate
from tuco_jax.studies.alpha_choice import Gain, over_tasks

__all__ = [
    "ALL_ALIKE",
    "category_table",
    "curve",
    "curve_table",
    "gain_table",
    "picks_table",
    "points",
    "tells_apart",
    "verdict",
]

ALL_ALIKE = "one and the same option is picked for every question, at every alpha"


def points(e: Estimate) -> str:
    """An estimate in percentage points, with its interval."""
    return f"{100 * e.value:+.2f} [{100 * e.low:+.2f}, {100 * e.high:+.2f}]"


def gain_table(title: str, gains: Mapping[str, Gain], categories: Mapping[str, str]) -> Table:
    """A row for each task."""
    rows = [
        [
            name,
            categories[name],
            g.questions,
            g.at_one,
            points(g.gain),
            ", ".join(f"{a:g}" for a in g.chosen),
            f"{g.won} : {g.lost}",
            f"{g.p:.3g}",
        ]
        for name, g in gains.items()
    ]
    columns = (
        "task",
        "category",
        "questions",
        "at alpha 1",
        "gain, points",
        "chosen alphas",
        "won : lost",
        "p (McNemar)",
    )
    return Table(
        title,
        columns,
        rows,
        "Gain: mean of the held-out folds, with the 95% bootstrap interval over questions, given "
        "the chosen alphas. Won, lost: those that only the chosen alpha, or only alpha 1, has.",
    )


def category_table(title: str, gains: Mapping[str, Gain], categories: Mapping[str, str]) -> Table:
    """A row for each category, and one for all tasks."""
    rows = []
    for category in [*dict.fromkeys(categories[name] for name in gains), "all"]:
        members = {n: g for n, g in gains.items() if category in ("all", categories[n])}
        mean, share, p = over_tasks(members)
        if len(members) == 1:
            (only,) = members.values()
            mean, p = only.gain, only.p
        rows.append([category, len(members), points(mean), f"{100 * share:.0f}%", f"{p:.3g}"])
    return Table(
        title,
        ("category", "tasks", "mean gain, points", "tasks that gain", "p"),
        rows,
        "Intervals resample tasks; p is of Wilcoxon's signed rank test over tasks. Of one task "
        "they are its own: over questions, by McNemar's test.",
    )


def picks_table(
    tasks: Sequence[Task],
    picked: Mapping[str, Int[np.ndarray, "A N"]],
    alphas: Sequence[float],
    names: Sequence[str] = (),
) -> Table:
    """How often each option is picked, which reveals a model that goes by position only.

    picked: the option picked at each alpha, by task. names: of the options; by default
    their letters.
    """
    picks = np.concatenate([picked[t.name] for t in tasks], axis=1)
    answers = np.asarray([q.answer for t in tasks for q in t.questions])
    options = range(len(names) or 1 + max(int(picks.max()), int(answers.max())))

    def row(name: str, chosen: Int[np.ndarray, "..."]) -> list[Any]:
        return [name, *(float((chosen == option).mean()) for option in options)]

    rows = [row(f"picked at alpha {a:g}", p) for a, p in zip(alphas, picks, strict=True)]
    names = names or [chr(65 + option) for option in options]
    return Table("Options picked", ["share", *names], [*rows, row("right answers", answers)])


def tells_apart(picked: Mapping[str, Int[np.ndarray, "A N"]]) -> bool:
    """Whether more than one option is ever picked in a task; picked: by task."""
    return any(len(np.unique(p)) > 1 for p in picked.values())


def curve_table(
    title: str, alphas: Sequence[float], right: Mapping[str, Bool[np.ndarray, "A N"]]
) -> Table:
    """Share of right answers at every alpha, by group."""
    rows = [[name, *map(float, r.mean(axis=1))] for name, r in right.items()]
    return Table(title, ("", *(f"{a:g}" for a in alphas)), rows)


def curve(
    name: str,
    label: str,
    alphas: Sequence[float],
    right: Mapping[str, Bool[np.ndarray, "A N"]],
    caption: str,
) -> Figure:
    """Share of right answers against alpha, a line for each group."""
    order = np.argsort(alphas)

    def paint(axes: Any) -> None:
        for i, (group, r) in enumerate(right.items()):
            color = PALETTE[i % len(PALETTE)]
            axes.plot(
                np.asarray(alphas)[order], r.mean(axis=1)[order], "o-", color=color, label=group
            )
        axes.axvline(1, color=PALETTE[1], linestyle=":", linewidth=1)
        axes.set_xlabel("alpha")
        axes.set_ylabel(label)
        axes.legend()

    return Figure(name, draw(paint), caption)


def verdict(gains: Mapping[str, Gain], sign: int = 1) -> Verdict:
    """Whether the mean gain has this sign, by its interval over tasks, or over one's questions."""
    if 1 < len(gains) < MIN_PROMPTS:
        return "not testable here"
    if len(gains) > 1:
        estimate = over_tasks(gains)[0]
    else:
        (only,) = gains.values()
        estimate = only.gain
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    if low > 0:
        return "reproduced"
    return "not reproduced" if high < 0 else "not clear"
