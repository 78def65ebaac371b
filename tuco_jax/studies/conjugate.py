"""`tuco-jax study conjugate`: TuCo of the same harmful requests by language (section 5.3).

The paper's languages are English, Japanese, Hungarian, Swahili and Malayalam; its AUCs compare
each of the first three with the last two together.

Legend: N requests of a language.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from common_jax.errors import InputError
from common_jax.journal import Sections
from common_jax.report.findings import Claim, Findings
from tuco_jax.attacks.conjugate import Language, as_turns, read_languages
from tuco_jax.evaluation.baselines import baselines
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
from tuco_jax.evaluation.simpler_scores import ScoreRow, simpler_table, under_each_score
from tuco_jax.models.pair import Pair
from tuco_jax.scoring.score import score
from tuco_jax.studies.base import Study, StudyOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STUDY", "Config"]

LOW = ("Malayalam", "Swahili")
CODES = {"en": "English", "ja": "Japanese", "hu": "Hungarian", "sw": "Swahili", "ml": "Malayalam"}
# The paper's AUCs against Malayalam and Swahili together, over seven models.
PAPER = {"English": ".76 to 1.0", "Japanese": ".12 to 1.0", "Hungarian": ".19 to .98"}


@dataclasses.dataclass(frozen=True)
class Config(StudyOptions):
    """TuCo by language.

    Args:
        data: folder with a prompts file for each language, the same requests row by row, named
            after the language or its code (English.jsonl, sw.txt). If empty, nothing is measured
            and the report says so.
        chat: a `prompt` is a user's turn; false for plain text.
    """

    data: str = ""
    chat: bool = True


class Measured(NamedTuple):
    """scores: each score's samples by language; lengths: in tokens, by language."""

    scores: dict[str, dict[str, Sample]]
    lengths: list[Int[np.ndarray, " N"]]


def prepare(config: Config) -> list[Language]:
    """The languages under their English names; none where there are no data."""
    found: dict[str, Language] = {}
    for language in read_languages(config.data) if config.data else []:
        name = CODES.get(language.name.lower(), language.name)
        if name in found:
            raise InputError(
                f"{config.data}: {found[name].name} and {language.name} are both {name}; keep one"
            )
        found[name] = language
    return [dataclasses.replace(language, name=name) for name, language in found.items()]


def measure(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    languages: list[Language],
    journal: Sections,
) -> Measured:
    """Every score of every language's requests."""
    prompts = [p for language in languages for p in as_turns(language, config.chat)]
    tuco = score(pair, tokenizer, prompts, progress=True, journal=journal)
    simpler = baselines(pair, tokenizer, prompts, journal=journal)
    columns = {"TuCo": tuco.tuco, **simpler.columns()}

    def by_language(values: np.ndarray) -> dict[str, Sample]:
        parts = zip(languages, np.split(values, len(languages)), strict=True)
        return {language.name: Sample(language.name, part) for language, part in parts}

    scores = {name: by_language(values) for name, values in columns.items()}
    return Measured(scores, np.split(tuco.tokens, len(languages)))


def _low(samples: Mapping[str, Sample]) -> Sample | None:
    """The paper's two low-resource languages together; None where there is neither."""
    low = [samples[name].values for name in LOW if name in samples]
    if not low:
        return None
    # A request in both languages is resampled as one.
    return Sample(
        " + ".join(name for name in LOW if name in samples),
        np.concatenate(low),
        np.concatenate([np.arange(len(v)) for v in low]),
    )


def _against_low(samples: Mapping[str, Sample], seed: int) -> dict[str, Compared]:
    """Each of the paper's other languages against its low-resource ones."""
    low = _low(samples)
    return {n: compare(samples[n], low, seed=seed) for n in PAPER if low and n in samples}


def _by_each_score(
    scores: Mapping[str, Mapping[str, Sample]], names: Iterable[str], seed: int
) -> list[list[ScoreRow]]:
    """The same contrasts, each under every score."""
    found = []
    for name in names:
        pairs = {score: (s[name], low) for score, s in scores.items() if (low := _low(s))}
        found.append(under_each_score(pairs, seed=seed))
    return found


def findings(config: Config, languages: list[Language], measured: Measured | None) -> Findings:
    """The paper's contrasts, and every pair of languages."""
    del languages
    scores, lengths = measured or ({}, [])
    samples = scores.get("TuCo", {})
    against = _against_low(samples, config.seed)
    pairs = itertools.combinations(samples.values(), 2)
    found = [compare(a, b, seed=config.seed) for a, b in pairs]
    claims = []
    for name, figure in PAPER.items():
        compared = against.get(name)
        auc = compared.auc if compared else None
        claims.append(
            Claim(
                f"{name} requests have a higher TuCo than Malayalam and Swahili (section 5.3)",
                f"AUC {figure} over models",
                f"AUC {shown(auc)}" if auc else "no such files",
                verdict(auc if compared and compared.enough else None),
            )
        )
    if samples:
        highest = max(samples.values(), key=lambda s: s.values.mean())
        lowest = min(samples.values(), key=lambda s: s.values.mean())
        summary = (
            f"Of {len(samples)} languages, TuCo is highest on average for {highest.name} "
            f"({highest.values.mean():.3f}) and lowest for {lowest.name} "
            f"({lowest.values.mean():.3f})."
        )
    else:
        summary = "Nothing was measured: no translated requests were given (--data)."
    tables, figures = [], []
    if samples:
        means = means_table("TuCo by language", list(samples.values()), lengths, config.seed)
        rows = list(against.values())
        tables = [contrast_table("The paper's contrasts", rows)] if rows else []
        tables += [contrast_table("Every pair of languages", found), means]
        if against:
            by_score = _by_each_score(scores, against, config.seed)
            tables.append(simpler_table(by_score))
        caption = "TuCo of every request by language, with the mean."
        figures = [strip_plot("tuco", "TuCo", list(samples.values()), caption)]
    return Findings(
        title="Harmful requests by language",
        summary=[summary],
        claims=claims,
        tables=tables,
        figures=figures,
        method=[
            "The same requests in every language, "
            + ("as a user's turn" if config.chat else "as plain text")
            + ", scored at the last token before the answer.",
        ],
        caveats=[
            "A language of fewer training texts has more tokens a request: length and language "
            "are not told apart here.",
            "Neither garak 0.17.1 nor pyrit 1.1.0 carries translated AdvBench requests: the files "
            "are the user's own.",
        ],
        facts={"data": config.data or "none"},
        data={
            "tuco": {n: s.values.tolist() for n, s in samples.items()},
            "contrasts": [dataclasses.asdict(c) for c in found],
            "against": {n: dataclasses.asdict(c) for n, c in against.items()},
        },
    )


STUDY = Study(Config, prepare, measure, findings)
