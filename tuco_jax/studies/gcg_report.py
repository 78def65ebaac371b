"""The report of the study `gcg`: losses, TuCo and refusal rates by string.

It contains no string and no answer. Legend: N requests.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Claim, Figure, Findings, Table
from tuco_jax.attacks.gcg import Attack
from tuco_jax.evaluation.contrasts import (
    Compared,
    Sample,
    compare,
    contrast_table,
    means_table,
    shown,
    strip_plot,
    verdict,
)
from tuco_jax.evaluation.simpler_scores import simpler_table, under_each_score

__all__ = ["Form", "findings"]


@dataclasses.dataclass(frozen=True)
class Form:
    """The N requests in one form: plain, or with one string.

    tokens: lengths. refused: None where no answer was generated. simpler: other scores of the same
    prompts (`evaluation/baselines.py`).
    """

    name: str
    tuco: Float[np.ndarray, " N"]
    tokens: Int[np.ndarray, " N"]
    refused: Bool[np.ndarray, " N"] | None
    simpler: Mapping[str, Float[np.ndarray, " N"]] = dataclasses.field(default_factory=dict)


def _joined(name: str, groups: Sequence[Form], score: str = "TuCo") -> Sample:
    """All prompts of several strings, clustered by the string's number, for either kind alike."""
    count = len(groups[0].tuco)
    return Sample(
        name,
        np.concatenate([g.tuco if score == "TuCo" else g.simpler[score] for g in groups]),
        np.repeat([str(i) for i in range(len(groups))], count),
    )


def _against_plain(plain: Form, name: str, groups: Sequence[Form], seed: int) -> Compared:
    """Plain requests against the same ones with a string, pooled and string by string.

    Pooled intervals resample the plain requests one by one, and the others by whole strings.
    """
    others = _joined(name, groups)
    pooled = compare(Sample("plain", plain.tuco), others, seed=seed)
    beside = compare(_joined("plain", [plain] * len(groups)), others, seed=seed)
    return dataclasses.replace(pooled, within=beside.within, centred=beside.centred)


def _by_refusal(groups: Sequence[Form], seed: int) -> Compared | None:
    """Attacked prompts that are refused against those that are not; None without answers."""
    if any(g.refused is None for g in groups):
        return None
    whole = _joined("", groups)
    refused = np.concatenate([g.refused for g in groups if g.refused is not None])
    assert whole.clusters is not None
    kinds = (
        Sample(name, whole.values[kind], whole.clusters[kind])
        for name, kind in (("refused", refused), ("not refused", ~refused))
    )
    return compare(*kinds, seed=seed)


def findings(
    forms: Sequence[Form],
    searches: Sequence[Attack],
    *,
    method: Sequence[str],
    facts: Mapping[str, str],
    answer_tokens: int = 0,
    seed: int = 0,
) -> Findings:
    """Everything that the study reports.

    forms: the plain requests, then "attack 1", ... and "random 1", ... searches: one a string,
    none where strings were given. answer_tokens: of the answers whose refusals were counted.
    """
    plain = forms[0]
    attacked = [m for m in forms if m.name.startswith("attack")]
    controls = [m for m in forms if m.name.startswith("random")]
    contrasts = [
        _against_plain(plain, f"{kind} string", groups, seed)
        for kind, groups in (("attack", attacked), ("random", controls))
    ]
    contrasts.append(
        compare(_joined("random string", controls), _joined("attack string", attacked), seed=seed)
    )
    broken = _by_refusal(attacked, seed)
    simpler = under_each_score(
        {
            name: (Sample("plain", values), _joined("attack string", attacked, name))
            for name, values in {"TuCo": plain.tuco, **plain.simpler}.items()
        },
        seed=seed,
    )
    single = [
        compare(Sample("plain", plain.tuco), Sample(m.name, m.tuco), seed=seed)
        for m in [*attacked, *controls]
    ]
    refusals = [
        [m.name, int(m.refused.sum()), len(m.refused), float(m.refused.mean())]
        for m in forms
        if m.refused is not None
    ]
    lower = float(np.mean([np.mean(m.tuco < plain.tuco) for m in attacked]))
    lower_random = float(np.mean([np.mean(m.tuco < plain.tuco) for m in controls]))
    tables = [
        means_table(
            "TuCo of the same requests, plain and with each string",
            [Sample(m.name, m.tuco) for m in forms],
            [m.tokens for m in forms],
            seed,
        ),
        contrast_table(
            "All strings", [*contrasts, *([broken] if broken else [])], cluster="string"
        ),
        simpler_table([simpler]),
        contrast_table("Each string by itself", single, cluster="string"),
    ]
    if refusals:
        tables.append(
            Table(
                "Refusals, by the GCG paper's refusal strings",
                ("form", "refused", "requests", "rate"),
                refusals,
                f"Greedy answers of {answer_tokens} tokens; none is kept.",
            )
        )
    figures = [
        strip_plot(
            "tuco",
            "TuCo",
            [Sample(m.name, m.tuco) for m in forms],
            "TuCo of every request, plain and with each string; the bar is the mean.",
        )
    ]
    if searches:
        tables.append(_search_table(searches))
        figures.append(_loss_figure(searches))
    return Findings(
        title="TuCo under greedy coordinate gradient attacks",
        summary=[
            f"A plain request has a higher TuCo than one with an attack string with probability "
            f"{shown(contrasts[0].auc)}; for random strings of as many tokens it is "
            f"{shown(contrasts[1].auc)}. An attack string lowers the TuCo of {lower:.0%} of "
            f"requests, a random one that of {lower_random:.0%}.",
        ],
        claims=[
            Claim(
                "Requests with an attack string before them have a lower TuCo than plain ones "
                "(section 5.3); AUC of plain over attacked",
                ".65 to 1.0 on five models",
                shown(contrasts[0].auc),
                verdict(contrasts[0].auc if contrasts[0].enough else None),
            ),
            Claim(
                "Control, not of the paper: attack strings lower TuCo more than random strings of "
                "as many tokens; AUC of random over attack",
                "-",
                shown(contrasts[2].auc),
                verdict(contrasts[2].auc if contrasts[2].enough else None),
            ),
            Claim(
                "Attacked requests that are not refused have a lower TuCo than those that are "
                "(section 5.4); AUC of refused over not refused",
                ".51 to .94",
                shown(broken.auc if broken else None),
                verdict(broken.auc if broken and broken.enough else None),
            ),
            Claim(
                "It is so with each string's mean removed, too (our control)",
                "not reported",
                shown(broken.centred if broken else None),
                verdict(broken.centred if broken and broken.enough else None),
            ),
        ],
        tables=tables,
        figures=figures,
        method=method,
        caveats=[
            "A string moves TuCo by its length and its oddity as well as by what it was searched "
            "for: compare with the random strings before reading the pooled figure.",
            f"{len(attacked)} strings are few to resample: intervals over strings are too narrow.",
            "Requests without a refusal string in the answer's first tokens count as not refused, "
            "whatever the answer is worth.",
        ],
        facts=facts,
        data={
            "tuco": {m.name: m.tuco.tolist() for m in forms},
            "tokens": {m.name: m.tokens.tolist() for m in forms},
            "refused": {m.name: m.refused.tolist() for m in forms if m.refused is not None},
            "searches": [
                {
                    "losses": found.losses,
                    "requests": found.prompts,
                    "best": found.loss,
                    "succeeded": found.succeeded,
                    "seconds": round(found.seconds, 1),
                }
                for found in searches
            ],
        },
    )


def _search_table(searches: Sequence[Attack]) -> Table:
    return Table(
        "Searches",
        ("string", "steps", "first loss", "best loss", "requests in", "succeeded", "seconds"),
        [
            [
                f"attack {i}",
                len(found.losses),
                found.losses[0],
                found.loss,
                found.prompts[-1],
                "yes" if found.succeeded else "no",
                round(found.seconds),
            ]
            for i, found in enumerate(searches, start=1)
        ],
        "Loss: nats a token of the target, mean over the requests that were in. Succeeded: the "
        "target is the greedy answer's beginning to every request searched on.",
    )


def _loss_figure(searches: Sequence[Attack]) -> Figure:
    def paint(axes: Any) -> None:
        for i, found in enumerate(searches):
            color = PALETTE[i % len(PALETTE)]
            axes.plot(found.losses, color=color, label=f"attack {i + 1}")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        axes.legend()

    caption = "The target's loss at each step; it rises where a request is added."
    return Figure("losses", draw(paint), caption)
