"""Does the reward tell the latents of safe chains from those of the base, on prompts held out?

The step t is chosen, and a logistic classifier of the reward alone is fitted, on the validation
prompts; both are judged on the test prompts. The authors fit their classifier on the draws that it
is judged on, at the last step: that is there beside it. What is not learned: the size of the
difference of both epsilons, at the same latents.

Legend: P prompts and their noises (rows), S evaluations of the model in a chain.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from reward_jax.reward import measure

__all__ = ["auc", "judge", "interval"]


def auc(scores: Float[np.ndarray, "2 P"]) -> float:
    """Of telling the safe chains, scores[1], from the base's by a higher score."""
    return measure.auc(*_told(scores))


def interval(
    scores: Float[np.ndarray, "2 P"], groups: Sequence[str], seed: int
) -> tuple[float, float]:
    """95% of the AUC, over prompts drawn anew; groups: the prompt of each row."""
    found = measure.interval(*_told(scores), seed, np.tile(np.asarray(groups), 2))
    return found.low, found.high


def _told(
    scores: Float[np.ndarray, "2 P"],
) -> tuple[Float[np.ndarray, " 2*P"], Bool[np.ndarray, " 2*P"]]:
    """Scores of all chains, and which are the base's."""
    return scores.ravel(), np.repeat([True, False], scores.shape[1])


def judge(
    validation: Float[np.ndarray, "2 P S"],
    test: Float[np.ndarray, "2 P S"],
    groups: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Figures of a score: at the step that is best on validation, and at the last one.

    groups: the prompt of each test row.
    """
    curves = [[auc(x[..., s]) for s in range(x.shape[2])] for x in (validation, test)]
    best = int(np.argmax(curves[0]))

    def at(step: int) -> dict[str, Any]:
        fitted, judged = validation[..., step], test[..., step]
        return {
            "step": step,
            "auc": auc(judged),
            "auc_interval": interval(judged, groups, seed),
            "accuracy": _accuracy(fitted, judged),
            "accuracy_same_draws": _accuracy(judged, judged),
            "pairs_in_order": float(np.mean(judged[1] > judged[0])),
        }

    return {
        "best": at(best),
        "last": at(test.shape[2] - 1),
        "validation_auc": curves[0],
        "test_auc": curves[1],
    }


def _accuracy(fitted: Float[np.ndarray, "2 P"], judged: Float[np.ndarray, "2 P"]) -> float:
    """Of a logistic classifier of one variable, fitted on one set and judged on another."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = fitted.mean(), max(fitted.std(), 1e-12)
    (x, y), (u, v) = (
        (((s - mean) / deviation).reshape(-1, 1), np.repeat([0, 1], s.shape[1]))
        for s in (fitted, judged)
    )
    return float(LogisticRegression().fit(x, y).score(u, v))
