"""Alpha chosen by cross-validation: gains over alpha 1, with their significance tests.

Section 5.1 of arXiv 2506.23423: alpha is chosen on 4 of 5 folds. The gain is the accuracy on the
fifth at that alpha minus that at alpha 1, averaged over folds.

Legend: A alphas, N questions.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from common_jax.errors import InputError
from tuco_jax.datasets.multiple_choice import Task, select_tasks
from tuco_jax.evaluation.statistics import Estimate, bootstrap_mean
from tuco_jax.studies.options import AlphaOptions

__all__ = ["Gain", "check_alphas", "cross_validate", "over_tasks", "wanted_tasks"]


@dataclasses.dataclass(frozen=True)
class Gain:
    """The gain of a chosen alpha over alpha 1, on questions that it was not chosen on.

    at_one: accuracy at alpha 1. gain: mean over folds, with the bootstrap interval of the paired
    differences given the chosen alphas. chosen: the alpha of each fold. won, lost: questions that
    only the chosen alpha, or only alpha 1, answers right. p: exact McNemar test, two-sided.
    """

    questions: int
    at_one: float
    gain: Estimate
    chosen: tuple[float, ...]
    won: int
    lost: int
    p: float


def check_alphas(alphas: Sequence[float]) -> None:
    """Raises InputError for a grid without alpha 1, without another alpha, or with one twice."""
    if 1.0 not in alphas or len(set(alphas)) != len(alphas) or len(alphas) < 2:
        raise InputError(f"alphas {list(alphas)}: give two or more, each once, with 1 among them")
    if not np.isfinite(alphas).all():
        raise InputError(f"alphas {list(alphas)}: they must be finite")


def wanted_tasks(tasks: Iterable[Task], options: AlphaOptions) -> list[Task]:
    """Those of the tasks that are asked for, each cut to `limit` questions.

    Raises InputError for a name that no task has, and for a task of fewer questions than folds.
    """
    found = select_tasks(tasks, options.tasks)
    if options.limit:
        found = [dataclasses.replace(t, questions=t.questions[: options.limit]) for t in found]
    for task in found:
        if len(task.questions) < options.folds:
            raise InputError(
                f"task {task.name}: {len(task.questions)} questions are too few for "
                f"{options.folds} folds; lower --folds, or leave the task out by --tasks"
            )
    return found


def cross_validate(
    right: Shaped[np.ndarray, "A N"],
    alphas: Sequence[float],
    *,
    folds: int = 5,
    minimise: bool = False,
    seed: int = 0,
) -> Gain:
    """Choose alpha on all folds but one, and evaluate it on that one.

    right: True where the right option is the most probable. Of equally good alphas the one nearest
    to 1 is chosen, and of two such the lower.
    """
    right = np.asarray(right, bool)
    one = list(alphas).index(1.0)
    order = np.random.default_rng(seed).permutation(right.shape[1])
    # The order in which equally good alphas are preferred.
    prefer = sorted(range(len(alphas)), key=lambda i: (round(abs(alphas[i] - 1), 9), alphas[i]))
    differences = np.zeros(right.shape[1])
    chosen, gains = [], []
    for held in np.array_split(order, folds):
        counts = right.sum(axis=1) - right[:, held].sum(axis=1)
        best = max(prefer, key=lambda i: -counts[i] if minimise else counts[i])
        differences[held] = right[best, held].astype(float) - right[one, held]
        gains.append(differences[held].mean())
        chosen.append(float(alphas[best]))
    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    interval = bootstrap_mean(differences, seed=seed)
    return Gain(
        questions=right.shape[1],
        at_one=float(right[one].mean()),
        gain=Estimate(float(np.mean(gains)), interval.low, interval.high),
        chosen=tuple(chosen),
        won=won,
        lost=lost,
        p=mcnemar(won, lost),
    )


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p of the exact McNemar test; 1 where no question is discordant."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def over_tasks(gains: Mapping[str, Gain]) -> tuple[Estimate, float, float]:
    """(mean gain over tasks with its interval, share of tasks that gain, p of Wilcoxon's test)."""
    from scipy.stats import wilcoxon

    values = np.asarray([g.gain.value for g in gains.values()])
    test: Any = wilcoxon(values) if len(values) > 1 and values.any() else None
    p = float(test.pvalue) if test else 1.0
    return bootstrap_mean(values), float((values > 0).mean()), p
