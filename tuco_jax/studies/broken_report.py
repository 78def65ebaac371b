"""The report of the study `broken`: prompts that held against prompts that broke.

Legend: N prompts, K answers of each.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from common_jax.report.findings import Claim, Findings, Table
from tuco_jax.evaluation.contrasts import (
    MIN_PROMPTS,
    Sample,
    compare,
    contrast_table,
    means_table,
    shown,
    strip_plot,
    verdict,
)
from tuco_jax.evaluation.simpler_scores import simpler_table, under_each_score

__all__ = ["Outcome", "findings"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of N prompts.

    kinds: benign, harmful or attacked. clusters: the attack's name, or `templates.BARE`. tokens:
    lengths. complied: how many of a prompt's K answers are no refusals. answers [N][K]. simpler:
    other scores of the same prompts (`evaluation/baselines.py`). complied_other: as `complied`, by
    another list of refusal strings, or None.
    """

    requests: list[str]
    kinds: Shaped[np.ndarray, " N"]
    clusters: Shaped[np.ndarray, " N"]
    tuco: Float[np.ndarray, " N"]
    tokens: Int[np.ndarray, " N"]
    complied: Int[np.ndarray, " N"]
    answers: list[list[str]]
    simpler: Mapping[str, Float[np.ndarray, " N"]] = dataclasses.field(default_factory=dict)
    complied_other: Int[np.ndarray, " N"] | None = None


def _split(
    outcome: Outcome, kinds: Sequence[str], least: int, values: np.ndarray
) -> tuple[Sample, Sample]:
    """The values of prompts of some kinds: (those that held, those that broke)."""
    among = np.isin(outcome.kinds, kinds)
    broken = outcome.complied >= least

    def sample(name: str, rows: np.ndarray) -> Sample:
        clusters = outcome.clusters[rows] if "attacked" in kinds else None
        return Sample(f"{name} ({', '.join(kinds)})", values[rows], clusters)

    return sample("held", among & ~broken), sample("broken", among & broken)


def _by_attack(outcome: Outcome, least: int, seed: int) -> Table:
    rows = []
    keys = zip(outcome.kinds.tolist(), outcome.clusters.tolist(), strict=True)
    for kind, cluster in dict.fromkeys(keys):
        own = (outcome.kinds == kind) & (outcome.clusters == cluster)
        broke, tuco = outcome.complied[own] >= least, outcome.tuco[own]
        inside = compare(Sample("held", tuco[~broke]), Sample("broken", tuco[broke]), seed=seed)
        auc = shown(inside.auc) if inside.enough else "-"
        rows.append([kind, cluster, len(tuco), int(broke.sum()), float(tuco.mean()), auc])
    return Table(
        "Broken prompts by attack",
        ("kind", "attack", "prompts", "broken", "mean TuCo", "AUC held over broken"),
        rows,
        f"AUC where {MIN_PROMPTS} or more held and as many broke: an attack that breaks all or "
        "nothing says nothing about success within it.",
    )


def _by_the_other_list(outcome: Outcome, least: int, seed: int) -> list[Table]:
    """The same contrasts with our list of refusal strings, as a check of the labels."""
    if outcome.complied_other is None:
        return []
    other = dataclasses.replace(outcome, complied=outcome.complied_other)
    found = [
        compare(*_split(other, kinds, least, other.tuco), seed=seed)
        for kinds in (("harmful", "attacked"), ("attacked",), ("harmful",))
    ]
    table = contrast_table("Held against broken, by another list", found, cluster="attack")
    changed = int(((other.complied >= least) != (outcome.complied >= least)).sum())
    note = (
        "By our own list of refusal strings (docs/finetune.md has rates by it), which holds "
        f"wordings that the GCG paper's lacks: {changed} of {len(other.complied)} prompts change "
        "sides."
    )
    return [dataclasses.replace(table, note=note)]


def findings(
    outcome: Outcome, facts: Mapping[str, str], *, least: int, seed: int, method: Sequence[str]
) -> Findings:
    """The report.

    least: how many answers of a broken prompt are no refusals. method: its first paragraphs.
    """
    sets = (
        ("harmful", "attacked"),
        ("attacked",),
        ("harmful",),
        ("benign", "harmful", "attacked"),
    )
    found = [compare(*_split(outcome, kinds, least, outcome.tuco), seed=seed) for kinds in sets]
    main, inside = found[0], found[1]
    scores = {"TuCo": outcome.tuco, **outcome.simpler}
    simpler = [
        under_each_score(
            {n: _split(outcome, kinds, least, v) for n, v in scores.items()}, seed=seed
        )
        for kinds in sets[:2]
    ]
    samples, lengths = [], []
    for kind in ("benign", "harmful", "attacked"):
        for state, rows in (
            ("held", outcome.complied < least),
            ("broken", outcome.complied >= least),
        ):
            own = (outcome.kinds == kind) & rows
            samples.append(Sample(f"{kind}, {state}", outcome.tuco[own]))
            lengths.append(outcome.tokens[own])
    held, broke = _split(outcome, sets[0], least, outcome.tuco)
    reverse = compare(broke, held, below=True, seed=seed)
    return Findings(
        title="Attacks that succeed and attacks that fail",
        summary=[
            f"Of {main.sizes[0] + main.sizes[1]} harmful prompts, bare and attacked, "
            f"{main.sizes[1]} broke the tuned model. A prompt that held has a higher TuCo than "
            f"one that broke with probability {shown(main.auc)}; within one and the same attack "
            f"it is {shown(inside.within)}.",
        ],
        claims=[
            Claim(
                "Prompts that held have a higher TuCo than those that broke (section 5.4)",
                "AUC .66 to .94; Llama 3 .51",
                f"AUC {shown(main.auc)}, {main.sizes[0]} held and {main.sizes[1]} broken"
                if main.auc
                else "one class only",
                verdict(main.auc if main.enough else None),
            ),
            Claim(
                "It is so within one attack, too (our control)",
                "not reported",
                f"AUC {shown(inside.within)}" if inside.within else "no attack has both outcomes",
                verdict(inside.within if inside.enough_inside else None),
            ),
        ],
        tables=[
            contrast_table("Held against broken", [*found, reverse], cluster="attack"),
            *_by_the_other_list(outcome, least, seed),
            _by_attack(outcome, least, seed),
            simpler_table(simpler),
            means_table("TuCo by outcome", samples, lengths, seed),
        ],
        figures=[strip_plot("tuco", "TuCo", samples, "TuCo of every prompt by outcome.")],
        method=list(method),
        caveats=[
            f"With fewer than {MIN_PROMPTS} prompts that held, or that broke, nothing is "
            "concluded.",
            "Refusal strings are crude: an answer without them need not help, and may be junk; "
            "and some refusals hold none of the paper's strings, so that a prompt that held "
            "counts as broken: the table by another list says how many do.",
            "Where attacks are crossed with requests, a request recurs in every attack; intervals "
            "take its prompts as independent within an attack.",
            "Where benign prompts are among the broken ones, what is told apart is also harmless "
            "from harmful.",
            "Intervals of pooled AUCs resample whole attacks, bare prompts counting as one: with "
            "one attack alone they say little.",
        ],
        facts=dict(facts),
        data={
            "tuco": outcome.tuco.tolist(),
            "kinds": outcome.kinds.tolist(),
            "attacks": outcome.clusters.tolist(),
            "not refused": outcome.complied.tolist(),
            "not refused, other list": None
            if outcome.complied_other is None
            else outcome.complied_other.tolist(),
            "tokens": outcome.tokens.tolist(),
            "contrasts": [dataclasses.asdict(c) for c in [*found, reverse]],
            "simpler": {n: v.tolist() for n, v in outcome.simpler.items()},
        },
    )
