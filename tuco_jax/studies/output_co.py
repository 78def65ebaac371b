"""`tuco-jax study output-co`: TuCo and OutputCo as refusals pile up in a prompt (section 5.5).

A request follows copies of itself, each of them refused. The more copies there are, the more the
prompt calls for what tuning taught. In the paper TuCo rises with their number, while OutputCo,
which compares two whole runs, first falls, because the base begins to refuse, too.

Legend: N requests, S numbers of shots.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from common_jax.errors import InputError
from common_jax.journal import Sections
from common_jax.report.figures import PALETTE, draw
from common_jax.report.findings import Claim, Figure, Findings, Table
from tuco_jax.attacks.many_shot import Demonstration, prompt_of
from tuco_jax.datasets.requests import ORIGIN, read_texts
from tuco_jax.evaluation.baselines import baselines_of_tokens
from tuco_jax.evaluation.contrasts import shown, verdict
from tuco_jax.evaluation.statistics import bootstrap_mean
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.encode import encode
from tuco_jax.scoring.score import score_tokens
from tuco_jax.studies.base import Study
from tuco_jax.studies.options import ShotOptions, check_shots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STUDY", "Config", "Measured"]


@dataclasses.dataclass(frozen=True)
class Config(ShotOptions):
    """TuCo and OutputCo against the number of refused shots.

    Args:
        refusal: the answer of every shot.
    """

    refusal: str = "I'm sorry, but I can't help with that."


@dataclasses.dataclass(frozen=True)
class Measured:
    """TuCo, OutputCo and lengths in tokens."""

    tuco: Float[np.ndarray, "S N"]
    output_co: Float[np.ndarray, "S N"]
    tokens: Int[np.ndarray, "S N"]


def prepare(config: Config) -> list[str]:
    """`count` requests, drawn."""
    check_shots(config.shots, least=3, first=0)
    if not config.refusal.strip():
        raise InputError("refusal is empty; give the text that answers every shot")
    requests = read_texts(config.prompts)
    if len(requests) < config.count:
        raise InputError(
            f"count is {config.count}: there are {len(requests)} requests; give fewer"
        )
    order = np.random.default_rng(config.seed).permutation(len(requests))
    return [requests[int(i)] for i in order[: config.count]]


def measure(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    requests: list[str],
    journal: Sections,
) -> Measured:
    """Score every request after each number of refused copies of itself."""
    prompts = [
        prompt_of(f"{n} shots, request {i}", [Demonstration(request, config.refusal)] * n, request)
        for n in config.shots
        for i, request in enumerate(requests)
    ]
    tokens = encode(
        tokenizer, prompts, max_tokens=pair.context, vocab_size=pair.tuned_config.vocab_size
    )
    shape = len(config.shots), len(requests)
    scores = score_tokens(pair, tokens, prompts, progress=True, journal=journal)
    other = baselines_of_tokens(pair, tokens, prompts, perplexity=False, journal=journal)
    return Measured(
        scores.tuco.reshape(shape), other.output_co.reshape(shape), scores.tokens.reshape(shape)
    )


def findings(config: Config, requests: list[str], measured: Measured) -> Findings:
    """Both curves, and how each changes request by request."""
    del requests
    shots, seed = config.shots, config.seed
    curves = {"TuCo": measured.tuco, "OutputCo": measured.output_co}
    means = {n: [bootstrap_mean(row, seed=seed) for row in v] for n, v in curves.items()}
    rises = bootstrap_mean(measured.tuco[-1].astype(float) - measured.tuco[0], seed=seed)
    falls = bootstrap_mean(measured.output_co[1].astype(float) - measured.output_co[0], seed=seed)
    rows = [
        [few, f"{measured.tokens[i].mean():.0f}", *(shown(means[n][i]) for n in curves)]
        for i, few in enumerate(shots)
    ]

    def paint(axes: Any) -> None:
        for i, (name, estimates) in enumerate(means.items()):
            values = np.asarray(estimates)
            axes.plot(shots, values[:, 0], "o-", color=PALETTE[i], label=name)
            axes.fill_between(shots, values[:, 1], values[:, 2], color=PALETTE[i], alpha=0.2, lw=0)
        axes.set_xlabel("refused shots before the request")
        axes.set_ylabel("share of the tuning")
        axes.legend()

    return Findings(
        title="TuCo and OutputCo as refusals pile up",
        summary=[
            f"From no shot to {shots[-1]}, TuCo changes by {shown(rises)}; from no shot to "
            f"{shots[1]}, OutputCo changes by {shown(falls)}.",
        ],
        claims=[
            Claim(
                "TuCo rises with refused shots (section 5.5)",
                "rises",
                f"{shown(rises)} from 0 to {shots[-1]} shots",
                verdict(rises, middle=0, of=config.count),
            ),
            Claim(
                "OutputCo first falls with them (section 5.5)",
                "first falls",
                f"{shown(falls)} from 0 to {shots[1]} shots",
                verdict(falls, middle=0, above=False, of=config.count),
            ),
        ],
        tables=[
            Table(
                "By number of refused shots",
                ("shots", "tokens", *curves),
                rows,
                f"Means over {config.count} requests with 95% intervals.",
            )
        ],
        figures=[Figure("curves", draw(paint), "TuCo and OutputCo, with 95% intervals.")],
        method=[
            f'A shot is the request itself and the answer "{config.refusal}", as earlier turns. '
            "Changes are taken request by request.",
        ],
        caveats=[
            "More shots are a longer prompt, which alone moves TuCo: see the many-shot study, "
            "whose refusing demonstrations stand beside harmless ones of the same length.",
        ],
        facts={
            "requests": ORIGIN.get(config.prompts, config.prompts),
            "requests a point": str(config.count),
        },
        data={
            "shots": list(shots),
            "tuco": measured.tuco.tolist(),
            "output_co": measured.output_co.tolist(),
            "tokens": measured.tokens.tolist(),
        },
    )


STUDY = Study(Config, prepare, measure, findings)
