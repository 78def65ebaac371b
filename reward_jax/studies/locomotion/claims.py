"""What the locomotion study claims, beside the paper's figures and what is asked of us.

Gains and shares are of robots whose expert's plans beat their base's.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from common_jax.report.findings import Claim, Verdict
from reward_jax.studies.locomotion.arms import error_of, exceeds
from reward_jax.studies.locomotion.work import PLAIN
from reward_jax.tasks.locomotion.robots import ROBOTS

__all__ = [
    "PAPER",
    "PAPER_UNSEEN",
    "claims_of",
    "learnable",
    "more",
    "share_of",
]

# arXiv 2306.01804, locomotion, as remembered: normalized returns and their standard errors.
PAPER = {
    "HalfCheetah-v5": {
        "unsteered": (30.38, 0.38), "discriminator": (30.41, 0.38), "reward": (31.65, 0.32),
    },
    "Hopper-v5": {
        "unsteered": (24.67, 0.92), "discriminator": (25.12, 0.95), "reward": (27.04, 0.90),
    },
    "Walker2d-v5": {
        "unsteered": (28.20, 0.99), "discriminator": (27.98, 0.99), "reward": (38.40, 1.02),
    },
}  # fmt: skip
PAPER_UNSEEN = {  # medium, on which no reward was trained
    "HalfCheetah-v5": {"unsteered": (59.41, None), "reward": (69.32, None)},
    "Hopper-v5": {"unsteered": (58.80, None), "reward": (64.97, None)},
    "Walker2d-v5": {"unsteered": (96.12, None), "reward": (102.05, None)},
}
PAPER_GAIN = 0.166  # 27.75 to 32.36, means of the three

REMEMBERED = "as remembered"
OURS = "not in the paper"  # what a claim says that is asked of us, not by the paper


def claims_of(found: Mapping[str, Any], *, whole: bool) -> list[Claim]:
    """Of the robots whose expert's plans beat their base's: others have no reward to learn."""
    taught = {ROBOTS[name].environment for name, one in found["robots"].items() if learnable(one)}
    environments = {i: a for i, a in found["environments"].items() if i in taught}
    unseen = {i: a for i, a in found["unseen"].items() if i in taught}
    left = ", ".join(i for i in found["environments"] if i not in taught)
    without = f"; no reward to learn in {left}" if left else ""
    of_paper = [PAPER[i] for i in found["environments"] if i in PAPER]
    claims: list[Claim] = []

    def claim(text: str, paper: str, measured: str, holds: bool) -> None:
        verdict: Verdict = "reproduced" if holds else "not reproduced"
        if paper.startswith(OURS):
            verdict = "reached" if holds else "not reached"
        if not environments:
            verdict = "not testable here"
        claims.append(Claim(text, paper, measured + without, verdict))

    def beats(text: str, paper: str, other: str, measured: Mapping[str, Any]) -> None:
        gaps = {i: arms["reward"]["over"][other] for i, arms in measured.items()}
        shown = ", ".join(f"{more(gap)} ({i})" for i, gap in gaps.items())
        claim(text, paper, shown, all(exceeds(gap) for gap in gaps.values()))

    def mean(arm: str) -> str:
        return f"{np.mean([one[arm][0] for one in of_paper]):.2f}"

    steered = f"normalized {mean('unsteered')} to {mean('reward')} ({REMEMBERED})"
    beats("Steering by the reward raises returns", steered, "unsteered", environments)
    measure = "normalized" if whole else "mean"
    gains = {i: _gain(arms, "reward", measure) for i, arms in environments.items()}
    known = [gain for gain in gains.values() if gain is not None]
    shown = ", ".join(
        f"{'no return to gain on' if g is None else f'{100 * g:+.0f}%'} ({i})"
        for i, g in gains.items()
    )
    claim(
        "Its mean relative gain is the paper's or more",
        f"{100 * PAPER_GAIN:.1f}% on the mean of the three ({REMEMBERED})",
        f"{100 * np.mean(known):+.0f}% on the mean: {shown}" if known else shown,
        len(known) == len(gains) > 0 and bool(np.mean(known) >= PAPER_GAIN),
    )
    over = {i: arms["reward"]["over"]["discriminator"] for i, arms in environments.items()}
    together = _mean_of(over, whole=whole)
    claim(
        "The reward steers better than a discriminator, on the mean of the robots",
        f"normalized {mean('reward')} against {mean('discriminator')} ({REMEMBERED})",
        f"{together['mean']:+.2f} +- {together['standard_error']:.2f} on the mean: "
        + ", ".join(f"{more(gap)} ({i})" for i, gap in over.items()),
        bool(over) and exceeds(together),
    )
    for arms in list(environments.values())[:1]:
        for name in (n for n in arms["reward"]["over"] if n not in PLAIN):
            beats(f"The reward does more than {name}", OURS, name, environments)
    if unseen:
        beats(
            "The same reward raises the returns of a base that it has not seen",
            f"normalized 71.44 to 78.78, mean of three ({REMEMBERED})",
            "unsteered",
            unseen,
        )
    for text, arm, of, least in (
        ("The reward gains as much as the raw difference of the scores", "reward",
         "raw_difference", 0.8),
        ("A cheap network distilled from the reward's mean over seeds gains as much", "distilled",
         "ensemble", 0.9),
    ):  # fmt: skip
        shares = {i: _share(a, arm, of) for i, a in environments.items() if arm in a}
        if shares:
            shown = ", ".join(f"{share_of(environments[i], arm, of)} ({i})" for i in shares)
            fine = all(share is not None and share[0] >= least for share in shares.values())
            claim(text, f"{OURS}; asked at least {least:g} of it", shown, fine)
    return claims


def _mean_of(gaps: Mapping[str, Mapping[str, Any]], *, whole: bool) -> dict[str, Any]:
    """The mean of gaps of several robots, in normalized scores where episodes are whole."""
    robots = {robot.environment: robot for robot in ROBOTS.values()}

    def unit(identifier: str, value: float) -> float:
        return (robots[identifier].normalized_error(value) if whole else value) or 0.0

    count = max(len(gaps), 1)
    errors = {
        kind: math.hypot(*(unit(i, gap[kind] or 0.0) for i, gap in gaps.items())) / count
        for kind in ("standard_error", "seed_standard_error")
    }
    return {"mean": sum(unit(i, gap["mean"]) for i, gap in gaps.items()) / count} | errors


def more(gap: Mapping[str, Any]) -> str:
    return f"{gap['mean']:+.0f} +- {gap['standard_error']:.0f}"


def learnable(robot: Mapping[str, Any]) -> bool:
    return bool(robot["gap"]["expert_beats_base"])


def _share(arms: Mapping[str, Any], arm: str, of: str) -> tuple[float, float] | None:
    """An arm's gain over the unsteered base as a share of another's, and its standard error.

    None of no gain. The error is that of a ratio of means, over environments and reward seeds.
    """
    if not exceeds(arms[of]["over"]["unsteered"]):
        return None
    plain = np.asarray(arms["unsteered"]["returns"])
    part, whole = (np.asarray(arms[name]["returns"]) - plain for name in (arm, of))
    share = part.mean() / whole.mean()
    seeds = math.hypot(*(arms[name]["seed_standard_error"] or 0.0 for name in (arm, of)))
    error = math.hypot(error_of(part - share * whole), seeds) / whole.mean()
    return float(share), float(error)


def share_of(arms: Mapping[str, Any], arm: str, of: str) -> str:
    share = _share(arms, arm, of)
    return "no gain to share" if share is None else f"{share[0]:.2f} +- {share[1]:.2f}"


def _gain(arms: Mapping[str, Any], arm: str, measure: str) -> float | None:
    """Relative gain over the unsteered base; None where that is not above 0."""
    base = arms["unsteered"][measure]
    return arms[arm][measure] / base - 1 if base > 0 else None
