"""`tuco-jax study gcg`: attack strings by greedy coordinate gradient, and TuCo (section 5.3).

Strings are searched on some requests and evaluated on others, beside random strings of as many
tokens as a control. The report has losses, TuCo and refusal rates by string. The strings
themselves are only in the folder's attacks.jsonl, for a further run; answers are not kept.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common_jax.cli.ranges import NonNegativeInt, PositiveInt
from common_jax.errors import InputError
from common_jax.io.files import write_text
from common_jax.journal import Sections
from common_jax.report.findings import Findings
from tuco_jax.attacks.gcg import Attack, Options, SearchOptions, attack
from tuco_jax.attacks.layout import Goal, Placement, random_strings
from tuco_jax.datasets.refusal_strings import GCG_STRINGS, is_refusal
from tuco_jax.datasets.requests import ORIGIN, Request, read_requests
from tuco_jax.evaluation.baselines import baselines
from tuco_jax.generation.generate import generate
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.read import Prompt, read_prompts
from tuco_jax.scoring.score import score
from tuco_jax.studies import gcg_report as report
from tuco_jax.studies.base import Study
from tuco_jax.studies.gcg_report import Form
from tuco_jax.studies.options import RequestOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STUDY", "Config", "place", "score_forms"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SearchOptions, RequestOptions):  # the last base's fields stand first
    """Attack strings by greedy coordinate gradient, then TuCo with and without them.

    TuCo is measured on requests that no string was searched on. A run that was killed goes on with
    the search that it was at.

    Args:
        attacks: file of strings to use (.txt or .jsonl), in place of a search.
        strings: attack strings to search for.
        goals: requests that each string is searched on.
        target: how an attacked answer is to begin, where the file has no `target`.
        length: number of "!" that a search begins with.
        answer_tokens: of the answers whose refusals are counted; 0 for none.
    """

    attacks: pathlib.Path | None = None
    strings: PositiveInt = 3
    goals: PositiveInt = 2
    target: str = "Sure, here is"
    placement: Placement = "prefix"  # the paper's
    length: PositiveInt = 20
    answer_tokens: NonNegativeInt = 16


def place(string: str, request: str, placement: str) -> str:
    """The user's turn: the string before the request, or after it."""
    return " ".join([string, request] if placement == "prefix" else [request, string])


class Inputs(NamedTuple):
    """Requests to measure on, those to search on, and strings given in place of a search."""

    requests: list[Request]
    searched: list[Request]
    strings: list[str]


class Measured(NamedTuple):
    """The requests in each form, and the searches: none where strings were given."""

    forms: list[Form]
    searches: list[Attack]


def prepare(config: Config) -> Inputs:
    """Draw the requests; read the strings that are given, or check how they are searched for."""
    if not config.target.strip():
        raise InputError("target must be a text, not empty")
    found = read_requests(config.prompts)
    searched = 0 if config.attacks else config.strings * config.goals
    if len(found) < config.count + searched:
        raise InputError(
            f"{config.prompts}: {len(found)} requests, but {config.count} are to be measured on "
            f"and {searched} searched on; lower --count, --strings or --goals"
        )
    order = np.random.default_rng(config.seed).permutation(len(found))
    drawn = [found[int(i)] for i in order[: config.count + searched]]
    _options(config, 0)
    return Inputs(drawn[: config.count], drawn[config.count :], _given(config))


def _given(config: Config) -> list[str]:
    """The strings of the file; none without a file."""
    if config.attacks is None:
        return []
    found = []
    for p in read_prompts(config.attacks, layouts=True):
        if p.prompt is None:
            raise InputError(f"{config.attacks}: {p} has `messages`; give `prompt`, a string")
        found.append(p.prompt)
    return found


def _options(config: Config, number: int) -> Options:
    """Of search `number`, with a seed of its own, which begins anew after the largest."""
    search = {f.name: getattr(config, f.name) for f in dataclasses.fields(SearchOptions)}
    start = " ".join("!" * config.length)
    return Options(**search, start=start, seed=(config.seed + number) % 2**32)


def _search(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    requests: Sequence[Request],
) -> list[Attack]:
    """Search for each string on its own requests; a search that was killed goes on."""
    found = []
    for number in range(config.strings):
        own = requests[number * config.goals : (number + 1) * config.goals]
        goals = [Goal(request.text, request.target or config.target) for request in own]

        result = attack(
            pair,
            tokenizer,
            goals,
            _options(config, number),
            checkpoint=config.out / f"search_{number + 1}",
            progress=f"string {number + 1} of {config.strings}",
        )
        found.append(result)
    return found


def score_forms(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    requests: Sequence[str],
    strings: Mapping[str, str],
    *,
    placement: str,
    answer_tokens: int = 0,
    journal: Sections | None = None,
) -> list[Form]:
    """The requests plain, and with each of the named strings; journal: as of `score`."""
    forms = {"plain": list(requests)}
    forms |= {n: [place(s, r, placement) for r in requests] for n, s in strings.items()}
    prompts = [
        Prompt(f"{name} {i}", None, ({"role": "user", "content": text},))
        if tokenizer.chat_template
        else Prompt(f"{name} {i}", text)
        for name, texts in forms.items()
        for i, text in enumerate(texts)
    ]
    scores = score(pair, tokenizer, prompts, journal=journal)
    simpler = baselines(pair, tokenizer, prompts, journal=journal).columns()
    refused = None
    if answer_tokens:
        answers = generate(pair, tokenizer, prompts, max_new_tokens=answer_tokens, journal=journal)
        refused = np.asarray([is_refusal(a, GCG_STRINGS) for a in answers])
    count = len(requests)
    return [
        Form(
            name,
            scores.tuco[k * count : (k + 1) * count],
            scores.tokens[k * count : (k + 1) * count],
            None if refused is None else refused[k * count : (k + 1) * count],
            {n: v[k * count : (k + 1) * count] for n, v in simpler.items()},
        )
        for k, name in enumerate(forms)
    ]


def measure(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    inputs: Inputs,
    journal: Sections,
) -> Measured:
    """Search for the strings and keep them; score the requests with each, and with random ones."""
    searches = [] if inputs.strings else _search(pair, tokenizer, config, inputs.searched)
    strings = inputs.strings or [found.text for found in searches]
    _keep(config.out / "attacks.jsonl", strings)
    lengths = [len(tokenizer(s, add_special_tokens=False)["input_ids"]) for s in strings]
    drawn = random_strings(
        tokenizer, pair.tuned_config.vocab_size, lengths, seed=config.seed + 1000
    )
    named = {f"attack {i}": s for i, s in enumerate(strings, start=1)}
    named |= {f"random {i}": s for i, s in enumerate(drawn, start=1)}
    forms = score_forms(
        pair,
        tokenizer,
        [request.text for request in inputs.requests],
        named,
        placement=config.placement,
        answer_tokens=config.answer_tokens,
        journal=journal,
    )
    return Measured(forms, searches)


def findings(config: Config, inputs: Inputs, measured: Measured) -> Findings:
    """Losses, TuCo and refusal rates by string; no string, no answer."""
    del inputs
    return report.findings(
        measured.forms,
        measured.searches,
        method=_method(config, bool(measured.searches)),
        facts={"requests": ORIGIN.get(config.prompts, config.prompts)},
        answer_tokens=config.answer_tokens,
        seed=config.seed,
    )


def _keep(path: pathlib.Path, strings: Sequence[str]) -> None:
    rows = [json.dumps({"id": f"attack {i}", "prompt": s}) for i, s in enumerate(strings, 1)]
    write_text(path, "\n".join(rows) + "\n")


def _method(config: Config, searched: bool) -> list[str]:
    where = "before" if config.placement == "prefix" else "behind"
    search = (
        f"Each of {config.strings} strings was searched on {config.goals} requests, added one by "
        f"one, for up to {config.steps} steps of {config.candidates} candidates (top "
        f"{config.topk}), from {config.length} marks; the target was the request's own where its "
        f'file has one, else "{config.target}" for all.'
        if searched
        else "The attack strings were read from a file."
    )
    return [
        f"{search} TuCo was measured on {config.count} other requests, with the string {where} "
        "the request in the user's turn.",
        "Random strings have as many tokens as the attack strings, drawn from the tokens that a "
        "search may use.",
    ]


STUDY = Study(Config, prepare, measure, findings, free={"chunk"})
