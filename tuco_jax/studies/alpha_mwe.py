"""`tuco-jax study alpha-mwe`: agreement with behaviours under FTC_alpha (section 5.1)."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from common_jax.journal import Sections
from common_jax.report.findings import Claim, Findings
from tuco_jax.datasets.multiple_choice import Task, read_behaviours
from tuco_jax.evaluation.option_scores import behaviour_prompts, picks, tokenize
from tuco_jax.evaluation.statistics import Estimate
from tuco_jax.models.pair import Pair
from tuco_jax.studies.alpha_choice import (
    Gain,
    check_alphas,
    cross_validate,
    over_tasks,
    wanted_tasks,
)
from tuco_jax.studies.alpha_tables import (
    ALL_ALIKE,
    category_table,
    curve,
    curve_table,
    gain_table,
    picks_table,
    points,
    tells_apart,
    verdict,
)
from tuco_jax.studies.base import Study
from tuco_jax.studies.options import AlphaOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CATEGORIES", "STUDY", "Config", "category"]

# The paper's 23 behaviours, by the names of the published files.
CATEGORIES = {
    "politics": (
        "anti-immigration believes-abortion-should-be-illegal believes-in-gun-rights "
        "politically-liberal"
    ).split(),
    "personality": ("agreeableness conscientiousness narcissism neuroticism psychopathy").split(),
    "morals": (
        "ends-justify-means subscribes-to-cultural-relativism subscribes-to-rule-utilitarianism "
        "subscribes-to-total-utilitarianism subscribes-to-utilitarianism "
        "subscribes-to-virtue-ethics"
    ).split(),
    "religion": (
        "subscribes-to-Buddhism subscribes-to-Christianity subscribes-to-Confucianism "
        "subscribes-to-Judaism subscribes-to-Taoism"
    ).split(),
    "desires": (
        "desire-to-be-more-creative desire-to-be-more-intelligent "
        "willingness-to-defer-to-authorities"
    ).split(),
}


@dataclasses.dataclass(frozen=True)
class Config(AlphaOptions):
    """Agreement with model-written behaviours under FTC_alpha, maximised and minimised.

    Args:
        data: a .jsonl of Model-Written-Evals, or a folder of them.
    """

    data: pathlib.Path


def category(task: str) -> str:
    """The paper's category of a behaviour; "other tasks" for one that is not in the paper."""
    return next((c for c, names in CATEGORIES.items() if task in names), "other tasks")


def prepare(config: Config) -> list[Task]:
    """Read the chosen behaviours; each has statements enough for the folds."""
    check_alphas(config.alphas)
    return wanted_tasks(read_behaviours(config.data), config)


def measure(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    tasks: list[Task],
    journal: Sections,
) -> dict[str, Int[np.ndarray, "A N"]]:
    """The more probable answer to each of N statements at each of A alphas, by behaviour."""
    ready = {
        t.name: tokenize(
            tokenizer, t, *behaviour_prompts(t), chat=config.chat, context=pair.context
        )
        for t in tasks
    }
    return picks(pair, ready, config.alphas, journal=journal)


def _choices(tasks: Sequence[Task]) -> tuple[str, ...]:
    """The two answers' texts, where all behaviours have the same."""
    found = {t.questions[0].choices for t in tasks}
    return found.pop() if len(found) == 1 else ()


def _mean(gains: Mapping[str, Gain]) -> Estimate:
    """Over tasks; of one task over its questions."""
    if len(gains) == 1:
        (only,) = gains.values()
        return only.gain
    return over_tasks(gains)[0]


def findings(
    config: Config, tasks: list[Task], picked: dict[str, Int[np.ndarray, "A N"]]
) -> Findings:
    """How chosen alphas raise and lower agreement. picked: as `measure`."""
    agrees = {t.name: picked[t.name] == [q.answer for q in t.questions] for t in tasks}
    most, least = (
        {
            name: cross_validate(
                r, config.alphas, folds=config.folds, minimise=minimise, seed=config.seed
            )
            for name, r in agrees.items()
        }
        for minimise in (False, True)
    )
    categories = {name: category(name) for name in agrees}
    groups = {
        c: np.concatenate([agrees[n] for n in agrees if categories[n] == c], axis=1)
        for c in dict.fromkeys(categories.values())
    }
    up, down = _mean(most), _mean(least)
    answers_differ = tells_apart(picked)
    return Findings(
        title="Agreement with model-written behaviours under FTC_alpha",
        summary=[
            f"Over {len(agrees)} behaviours a chosen alpha changes agreement by {points(up)} "
            f"points where it is to rise, and by {points(down)} where it is to fall.",
        ],
        claims=[
            Claim(
                "An alpha chosen on other statements raises agreement (section 5.1)",
                "+1.55 to +5.18%",
                f"{points(up)} points" if answers_differ else ALL_ALIKE,
                verdict(most) if answers_differ else "not testable here",
            ),
            Claim(
                "An alpha chosen on other statements lowers agreement (section 5.1)",
                "-2.80 to -25.24%",
                f"{points(down)} points" if answers_differ else ALL_ALIKE,
                verdict(least, -1) if answers_differ else "not testable here",
            ),
        ],
        tables=[
            category_table("Maximised, by category", most, categories),
            category_table("Minimised, by category", least, categories),
            gain_table("Maximised, by behaviour", most, categories),
            gain_table("Minimised, by behaviour", least, categories),
            curve_table("Agreement at each alpha", config.alphas, groups),
            picks_table(tasks, picked, config.alphas, _choices(tasks)),
        ],
        figures=[
            curve("agreement", "agreement", config.alphas, groups, "Agreement against alpha.")
        ],
        method=[
            "A model agrees when the answer that matches the behaviour, Yes or No, has the more "
            "probable token. Alpha is chosen on all folds but one of "
            f"{config.folds} and judged there, against alpha 1 on the same statements.",
        ],
        caveats=[
            "Intervals of a task hold for the alphas that were chosen; the choice itself varies.",
            "Where files are unbalanced between Yes and No, a bias to one answer looks like "
            "agreement.",
        ],
        facts={
            "data": str(config.data),
            "prompts": "chat template" if config.chat else "plain text",
        },
        data={
            "alphas": list(config.alphas),
            "agreement": {n: r.mean(axis=1).tolist() for n, r in agrees.items()},
            "maximised": {n: dataclasses.asdict(g) for n, g in most.items()},
            "minimised": {n: dataclasses.asdict(g) for n, g in least.items()},
        },
    )


STUDY = Study(Config, prepare, measure, findings)
