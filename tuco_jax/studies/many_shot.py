"""`tuco-jax study many-shot`: TuCo against the number of demonstrations (section 5.3).

The paper's TuCo falls as demonstrations of the behaviour are added. But more demonstrations also
make a longer prompt. As controls, the same requests therefore follow equally many tokens of
refused demonstrations, and of harmless ones; what the fall exceeds theirs by is due to the
demonstrations' content. By default no text of these controls was trained on, since memorised text
might have a TuCo of its own.

Legend: N requests, S numbers of demonstrations.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common_jax.errors import InputError
from common_jax.journal import Sections
from common_jax.report.findings import Findings
from tuco_jax.attacks.many_shot import Demonstration, matched, prompt_of, read_demonstrations
from tuco_jax.datasets import prompt_sources as sources
from tuco_jax.datasets.refusal_data import SplitOptions, harmful_split
from tuco_jax.datasets.requests import ORIGIN, read_file, read_texts
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.score import score_tokens
from tuco_jax.studies import many_shot_report as report
from tuco_jax.studies.base import Study
from tuco_jax.studies.many_shot_report import KINDS, OPENINGS, SLACK, TOLERANCE, Curve
from tuco_jax.studies.options import ShotOptions, Shots, check_shots

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STUDY", "Config", "Inputs", "build"]


@dataclasses.dataclass(frozen=True)
class Config(ShotOptions):
    """TuCo against the number of demonstrations, beside two controls of the same length.

    Args:
        complying: .jsonl of `question` and `answer`, or a Model-Written-Evals file, which has
            `answer_matching_behavior`; empty for other AdvBench requests, each answered by an
            opening that agrees and says nothing else.
        harmless: .jsonl of `question` and `answer`; empty for programming questions and web pages
            to be continued. Answers are cut to the lengths that are needed.
        refusing: file of wordings of a refusal (`prompt`, or a line of .txt each), chosen to match
            the complying answers' lengths; empty for wordings from pyrit.
    """

    complying: str = ""
    harmless: str = ""
    refusing: str = ""
    shots: Shots = (0, 1, 2, 4, 8, 16, 32)


class Inputs(NamedTuple):
    """Requests, demonstrations of both kinds, and wordings of a refusal for the third kind."""

    requests: list[str]
    complying: list[Demonstration]
    refusals: list[str]
    harmless: list[Demonstration]


def prepare(config: Config) -> Inputs:
    """Read the files, or take the sets in their place; draw the requests."""
    shots = check_shots(config.shots)
    requests, complying = _requests(config)
    harmless = (
        read_demonstrations(config.harmless)
        if config.harmless
        else [Demonstration(*exchange) for exchange in sources.exchanges()]
    )
    for name, pool in (("complying", complying), ("harmless", harmless)):
        if len(pool) < shots[-1]:
            raise InputError(
                f"shots holds {shots[-1]}: there are {len(pool)} {name} demonstrations; give "
                "more of them or fewer shots"
            )
    refusals = (
        [request.text for request in read_file(config.refusing)]
        if config.refusing
        else sources.labelled_refusals()
    )
    return Inputs(requests, complying, refusals, harmless)


def _requests(config: Config) -> tuple[list[str], list[Demonstration]]:
    """`count` requests, and complying demonstrations, none of which answers one of them."""
    rng = np.random.default_rng(config.seed)

    def shuffled(texts: list[str]) -> list[str]:
        return [texts[int(i)] for i in rng.permutation(len(texts))]

    from_advbench = config.prompts == "advbench"
    held_out: list[str] = []
    if from_advbench or not config.complying:
        held_out = shuffled(harmful_split(SplitOptions(evaluation=160)).evaluation)
    requests = held_out if from_advbench else shuffled(read_texts(config.prompts))
    requests = requests[: config.count]
    if len(requests) < config.count:
        raise InputError(
            f"count is {config.count}: there are {len(requests)} requests; give fewer"
        )
    if config.complying:
        complying = read_demonstrations(config.complying)
    else:
        others = (q for q in held_out if q not in requests)
        complying = [Demonstration(q, OPENINGS[i % len(OPENINGS)]) for i, q in enumerate(others)]
    return requests, [d for d in complying if d.question not in requests]


def build(
    tokenizer: "PreTrainedTokenizerBase", inputs: Inputs, shots: Sequence[int], *, seed: int = 0
) -> dict[str, list[list[Prompt]]]:
    """Prompts of each kind of demonstrations, [S][N].

    A request has the same demonstrations at every number of them: the first ones of a random
    order of its own. Refused demonstrations ask the complying ones' questions.
    """
    requests, complying, refusals, harmless = inputs
    lengths: dict[str, int] = {}

    def count(text: str) -> int:
        if text not in lengths:
            lengths[text] = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        return lengths[text]

    def cuts(answer: str) -> list[str]:
        return [answer[: word.end()] for word in re.finditer(r"\S+", answer)]

    found: dict[str, list[list[Prompt]]] = {kind: [[] for _ in shots] for kind in KINDS}
    for number, request in enumerate(requests):
        rng = np.random.default_rng((seed, number))
        chosen = [complying[int(i)] for i in rng.permutation(len(complying))[: shots[-1]]]
        others = [harmless[int(i)] for i in rng.permutation(len(harmless))[: shots[-1]]]
        targets = [count(d.question) + count(d.answer) for d in chosen]
        asked = [d.question for d in chosen]
        made = {
            "complying": chosen,
            "refusing": matched(targets, asked, [refusals], count, seed=seed + number),
            "harmless": matched(
                targets,
                [d.question for d in others],
                [cuts(d.answer) for d in others],
                count,
                seed=seed + number,
            ),
        }
        for kind in KINDS:
            for row, few in zip(found[kind], shots, strict=True):
                name = f"{kind}, {few} shots, request {number}"
                row.append(prompt_of(name, made[kind][:few], request))
    return found


def _check_lengths(tokens: Mapping[str, np.ndarray], shots: Sequence[int], context: int) -> None:
    """Raises InputError for a prompt beyond the context, or a control of another length."""
    for kind, lengths in tokens.items():
        for few, row in zip(shots, lengths, strict=True):
            if row.max() > context:
                raise InputError(
                    f"shots holds {few}: with {few} {kind} demonstrations a prompt has "
                    f"{row.max()} tokens, but the context holds {context}; leave it out"
                )
        off = np.abs(lengths - tokens["complying"])
        if (off > np.maximum(SLACK, TOLERANCE * tokens["complying"])).any():
            raise InputError(
                f"{kind} demonstrations cannot be made as long as the complying ones: they differ "
                f"by up to {off.max()} tokens; give longer answers or shorter questions"
            )


def measure(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    inputs: Inputs,
    journal: Sections,
) -> dict[str, Curve]:
    """The curve of each kind of demonstrations; all prompts are scored in one call."""
    shots = config.shots
    prompts = build(tokenizer, inputs, shots, seed=config.seed)
    flat = [p for rows in prompts.values() for row in rows for p in row]
    tokens = encode(tokenizer, flat, vocab_size=pair.tuned_config.vocab_size)
    shape = len(prompts), len(shots), -1
    lengths = np.asarray([len(t) for t in tokens]).reshape(shape)
    _check_lengths(dict(zip(prompts, lengths, strict=True)), shots, pair.context)
    scores = score_tokens(pair, tokens, flat, progress=True, journal=journal)
    tuco = scores.tuco.reshape(shape)
    return {k: Curve(tuco[i], lengths[i]) for i, k in enumerate(prompts)}


def findings(config: Config, inputs: Inputs, curves: dict[str, Curve]) -> Findings:
    """The complying curve, and how far its fall goes beyond that of either control."""
    del inputs
    return report.findings(
        curves,
        config.shots,
        seed=config.seed,
        files={kind: getattr(config, kind) for kind in KINDS},
        requests=ORIGIN.get(config.prompts, config.prompts),
    )


STUDY = Study(Config, prepare, measure, findings)
