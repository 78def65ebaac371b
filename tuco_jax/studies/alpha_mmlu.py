"""`tuco-jax study alpha-mmlu`: few-shot multiple choice under FTC_alpha (section 5.1)."""

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int

from common_jax.cli.ranges import NonNegativeInt
from common_jax.errors import InputError
from common_jax.journal import Sections
from common_jax.report.findings import Claim, Findings
from tuco_jax.datasets.multiple_choice import Task, read_social_iqa, read_tasks
from tuco_jax.evaluation import contrasts
from tuco_jax.evaluation.option_scores import picks, quiz_prompts, tokenize
from tuco_jax.evaluation.statistics import Estimate, wilson_interval
from tuco_jax.models.pair import Pair
from tuco_jax.studies.alpha_choice import (
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

# By MMLU's authors (arXiv 2009.03300; categories.py of their repository hendrycks/test).
CATEGORIES = {
    "STEM": (
        "abstract_algebra astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics "
        "electrical_engineering elementary_mathematics high_school_biology high_school_chemistry "
        "high_school_computer_science high_school_mathematics high_school_physics "
        "high_school_statistics machine_learning"
    ).split(),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history "
        "high_school_world_history international_law jurisprudence logical_fallacies "
        "moral_disputes moral_scenarios philosophy prehistory professional_law world_religions"
    ).split(),
    "social sciences": (
        "econometrics high_school_geography high_school_government_and_politics "
        "high_school_macroeconomics high_school_microeconomics high_school_psychology "
        "human_sexuality professional_psychology public_relations security_studies sociology "
        "us_foreign_policy"
    ).split(),
    "other": (
        "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging "
        "management marketing medical_genetics miscellaneous nutrition professional_accounting "
        "professional_medicine virology"
    ).split(),
}


@dataclasses.dataclass(frozen=True)
class Config(AlphaOptions):
    """Accuracy on multiple-choice tasks under FTC_alpha, alpha chosen by cross-validation.

    Args:
        data: MMLU's folder (csv or parquet), or a .jsonl of question, choices, answer.
        source: mmlu, or socialiqa for the fetched set of `evals`, without `data`.
        split: whose questions are asked, test or val.
        shots: examples before each question.
        share_prefix: read what questions begin with in common, such as examples, once an alpha.
    """

    data: pathlib.Path | None = None
    source: Literal["mmlu", "socialiqa"] = "mmlu"
    split: Literal["test", "val"] = "test"
    shots: NonNegativeInt = 5
    share_prefix: bool = True


def category(task: str) -> str:
    """MMLU's category of a task; "other tasks" for a task that is not in MMLU."""
    return next((c for c, names in CATEGORIES.items() if task in names), "other tasks")


def prepare(config: Config) -> list[Task]:
    """Read the chosen tasks; each has questions and examples enough."""
    check_alphas(config.alphas)
    if config.source == "socialiqa":
        from tuco_jax.datasets.assets import fetch

        if config.data is not None:
            raise InputError("data and source socialiqa: give one of the two")
        if config.split != "test":
            raise InputError(f"split is {config.split}: Social IQA has test alone here")
        path = fetch("evals") / "theory_of_mind/socialiqa/test.jsonl"
        tasks = [read_social_iqa(path, config.shots)]
    elif config.data is None:
        raise InputError("give --data, MMLU's folder or a .jsonl, or --source socialiqa")
    else:
        tasks = read_tasks(config.data, config.split)
    tasks = wanted_tasks(tasks, config)
    for task in tasks:
        if len(task.examples) < config.shots:
            raise InputError(
                f"task {task.name}: {len(task.examples)} examples in dev, but {config.shots} "
                "shots asked for; lower --shots, or add examples"
            )
    return tasks


def measure(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    tasks: list[Task],
    journal: Sections,
) -> dict[str, Int[np.ndarray, "A N"]]:
    """The most probable option of each of N questions at each of A alphas, by task."""
    ready = {
        t.name: tokenize(
            tokenizer, t, *quiz_prompts(t, config.shots), chat=config.chat, context=pair.context
        )
        for t in tasks
    }
    return picks(pair, ready, config.alphas, share=config.share_prefix, journal=journal)


def findings(
    config: Config, tasks: list[Task], picked: dict[str, Int[np.ndarray, "A N"]]
) -> Findings:
    """What an alpha chosen on other questions gains. picked: as `measure`."""
    right = {t.name: picked[t.name] == [q.answer for q in t.questions] for t in tasks}
    gains = {
        name: cross_validate(r, config.alphas, folds=config.folds, seed=config.seed)
        for name, r in right.items()
    }
    categories = {task.name: category(task.name) for task in tasks}
    groups = {
        c: np.concatenate([right[n] for n in right if categories[n] == c], axis=1)
        for c in dict.fromkeys(categories.values())
    }
    mean, share, p = over_tasks(gains)
    if len(gains) == 1:  # the spread is that of questions
        (only,) = gains.values()
        mean, p = only.gain, only.p
    gained = Estimate(share, *wilson_interval(round(share * len(gains)), len(gains)))
    answers_differ = tells_apart(picked)
    text = "An alpha chosen on other questions raises accuracy over alpha 1 (section 5.1)"
    majority = "Most tasks gain by a chosen alpha (section 5.1)"
    return Findings(
        title="Multiple choice under FTC_alpha",
        summary=[
            f"Over {len(gains)} tasks and {sum(g.questions for g in gains.values())} questions a "
            f"chosen alpha gains {points(mean)} points over alpha 1 (p {p:.3g}); "
            f"{100 * share:.0f}% of tasks gain."
        ],
        claims=[
            Claim(
                text,
                "+1.03 to +2.69%",
                f"{points(mean)} points, p {p:.3g}" if answers_differ else ALL_ALIKE,
                verdict(gains) if answers_differ else "not testable here",
            ),
            Claim(
                majority,
                "71% of 57 tasks",
                f"{100 * share:.0f}% [{100 * gained.low:.0f}, {100 * gained.high:.0f}] of "
                f"{len(gains)}",
                contrasts.verdict(gained if answers_differ else None, of=len(gains)),
            ),
        ],
        tables=[
            category_table("Gains by category", gains, categories),
            gain_table("Gains by task", gains, categories),
            curve_table("Accuracy at each alpha", config.alphas, groups),
            picks_table(tasks, picked, config.alphas),
        ],
        figures=[curve("accuracy", "accuracy", config.alphas, groups, "Accuracy against alpha.")],
        method=[
            f"{config.shots} examples before each question; an answer is right when its option's "
            "token is the most probable of the options'. Alpha is chosen on all folds but one of "
            f"{config.folds} and judged there, against alpha 1 on the same questions.",
        ],
        caveats=[
            "Intervals of a task hold for the alphas that were chosen; the choice itself varies.",
        ],
        facts={
            "data": str(config.data or config.source),
            "prompts": "chat template" if config.chat else "plain text",
        },
        data={
            "alphas": list(config.alphas),
            "accuracy": {n: r.mean(axis=1).tolist() for n, r in right.items()},
            "gains": {n: dataclasses.asdict(g) for n, g in gains.items()},
        },
    )


STUDY = Study(Config, prepare, measure, findings, free={"share_prefix"})
