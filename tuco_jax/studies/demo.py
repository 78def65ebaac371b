"""The demo: what tuning contributed to five kinds of prompt, on a real pair, in a minute or so.

The pair is SmolLM2-135M-Instruct and an adapter that teaches it to refuse harmful requests
(configs/tuco/finetune_refusal.yaml).
"""

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from tuco_jax.datasets.prompt_groups import CONTRASTS, PromptGroup
from tuco_jax.evaluation.contrasts import Contrast
from tuco_jax.evaluation.statistics import bootstrap_auc, bootstrap_mean
from tuco_jax.models.pair import Pair
from tuco_jax.scoring.score import Scores, score
from tuco_jax.studies.demo_report import Group, Report
from tuco_jax.studies.token_maps import token_maps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["measure"]


def measure(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    groups: Sequence[PromptGroup],
    *,
    maps: int = 2,
    seed: int = 0,
    facts: dict[str, str] | None = None,
    progress: bool = False,
) -> Report:
    """Score the groups, and gather everything that the report shows.

    maps: prompts of each group that are shown token by token. facts: shown beside those measured.
    """
    prompts = [p for group in groups for p in group.prompts()]
    scores = score(pair, tokenizer, prompts, progress=progress)
    measured = _by_group(groups, scores, seed)
    contrasts = _contrasts(groups, measured, seed)
    chosen = [
        (group.name, float(found.tuco[i]), group.prompts()[i])
        for group, found in zip(groups, measured, strict=True)
        for i in _to_show(found, maps)
    ]
    facts = dict(facts or {}) | _facts(scores)
    return Report(
        title="What did tuning change? TuCo, prompt by prompt",
        summary=_summary(measured),
        groups=measured,
        contrasts=contrasts,
        maps=token_maps(pair, tokenizer, chosen) if maps else [],
        method=METHOD,
        caveats=CAVEATS,
        facts=facts,
    )


def _by_group(groups: Sequence[PromptGroup], scores: Scores, seed: int) -> list[Group]:
    measured, start = [], 0
    for group in groups:
        rows = slice(start, start + len(group.texts))
        start = rows.stop
        clusters = None if group.clusters is None else np.asarray(group.clusters)
        measured.append(
            Group(
                group.name,
                group.about,
                group.texts,
                scores.tuco[rows],
                scores.layers[rows],
                scores.tokens[rows],
                bootstrap_mean(scores.tuco[rows], clusters, seed=seed),
            )
        )
    return measured


def _contrasts(
    groups: Sequence[PromptGroup], measured: Sequence[Group], seed: int
) -> list[Contrast]:
    tuco = {group.name: group.tuco for group in measured}
    clusters = {g.name: None if g.clusters is None else np.asarray(g.clusters) for g in groups}
    found = []
    for higher, lower, claim in CONTRASTS:
        if higher in tuco and lower in tuco:
            auc = bootstrap_auc(
                tuco[higher], tuco[lower], (clusters[higher], clusters[lower]), seed=seed
            )
            found.append(Contrast(higher, lower, auc, claim))
    return found


def _to_show(group: Group, count: int, longest: int = 100) -> list[int]:
    """The `count` prompts nearest to the group's median of those short enough to read."""
    near = np.argsort(np.abs(group.tuco - np.median(group.tuco)), kind="stable")
    return [int(i) for i in near if group.tokens[i] <= longest][:count]


def _summary(groups: Sequence[Group]) -> list[str]:
    total = sum(len(g.texts) for g in groups)
    ordered = sorted(groups, key=lambda g: -g.mean.value)
    return [
        "TuCo is the share of all that a model's layers add, at a prompt's last token, which is "
        "there because of its tuning: 0 where tuning changed nothing, 1 where it made everything.",
        f"It was measured for {total} prompts of {len(groups)} kinds on a language model and the "
        "same model after tuning.",
        f"It is highest for {ordered[0].name} ({ordered[0].mean.value:.3f} on average) and lowest "
        f"for {ordered[-1].name} ({ordered[-1].mean.value:.3f}).",
    ]


METHOD = (
    "Each layer of the tuned model is run beside the same layer of the base model on the tuned "
    "model's residual stream. What the base's layer adds is the pre-training component, PTC; what "
    "the tuned layer adds beyond that is the fine-tuning component, FTC. TuCo is |FTC| / "
    "(|PTC| + |FTC|), with both summed over all layers at the last token, in the L1 norm "
    "(Definition 4.3 of Nuti, Franzmeyer and Henriques, ICML 2025, arXiv 2506.23423).",
    "The layer profile takes the sums up to each layer; the token maps take the sums over all "
    "layers at each token.",
)
CAVEATS = (
    "No prompt shown here was among those that the adapter in the package was trained on; of "
    "another pair that cannot be said.",
    "TuCo says how much tuning moves the residual stream, not whether the answer is a refusal.",
    "Chat prompts go through the model's chat template, up to where its answer begins; plain text "
    "does not. That contrast is one of format, too: even a random change of the weights shows it.",
    "A template moves TuCo by itself, whatever it holds: compare jailbreaks with the harmless "
    "requests in the same templates before reading anything into their mean.",
    "Intervals are 95% percentile intervals of 2000 bootstrap draws. Groups made with templates "
    "are resampled by whole templates, since their prompts are not independent. They say nothing "
    "of another pair, or of an adapter trained with another seed.",
)


def _facts(scores: Scores) -> dict[str, str]:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "transformers")
    )
    return {
        "telescoping error": f"{scores.telescoping.max():.1e} at most, of |x_L - x_0 - PTC - FTC| "
        "in the largest |x_L|",
        "tokens scored": f"{int(scores.tokens.sum()):,}",
        "scoring": f"{scores.seconds['run']:.1f} s, and {scores.seconds['compile']:.1f} s to "
        "compile",
        "device": f"{jax.devices()[0].device_kind}, sums in float32",
        "versions": versions,
    }
