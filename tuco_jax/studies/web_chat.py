"""`tuco-jax study web-chat`: TuCo of chat prompts against that of web text (section 5.2).

The paper compares random pieces of 97 tokens of OpenWebText with prompts of HH-RLHF in their chat
format. The two differ in content, format and length at once. Two controls separate format from the
rest: the chat prompts as plain text, and the web pieces as a user's turn.

Legend: N prompts of a kind, T tokens.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from common_jax.cli.ranges import PositiveInt, TwoOrMore
from common_jax.errors import InputError
from common_jax.journal import Sections
from common_jax.report.findings import Claim, Findings
from tuco_jax.datasets import prompt_sources as sources
from tuco_jax.evaluation.baselines import baselines_of_tokens
from tuco_jax.evaluation.contrasts import (
    Sample,
    compare,
    contrast_table,
    means_table,
    shown,
    strip_plot,
    verdict,
)
from tuco_jax.evaluation.simpler_scores import simpler_table, under_each_score
from tuco_jax.models.pair import Pair
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.messages import text_of
from tuco_jax.prompts.read import Prompt, read_prompts
from tuco_jax.scoring.score import score_tokens
from tuco_jax.studies.base import Study, StudyOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STUDY", "Config", "windows"]


@dataclasses.dataclass(frozen=True)
class Config(StudyOptions):
    """TuCo of chat prompts against windows of web text.

    Args:
        web: file of texts (`prompt`); empty for pieces of web pages that a package carries.
        chat: file of prompts; a `prompt` is taken as a user's turn. Empty for questions of
            chatterbot-corpus.
        window: tokens of a piece of web text.
        prompts: most prompts of each kind.
    """

    web: str = ""
    chat: str = ""
    window: PositiveInt = 97
    prompts: TwoOrMore = 64


Turns = tuple[Mapping[str, str], ...]


class Inputs(NamedTuple):
    """Texts of web pages, and conversations."""

    web: list[str]
    chat: list[Turns]


class Measured(NamedTuple):
    """scores: each score's samples by kind of prompt, [N] each; lengths in tokens by kind."""

    scores: dict[str, dict[str, Sample]]
    lengths: dict[str, list[int]]


def _turn(text: str) -> Turns:
    return ({"role": "user", "content": text},)


def prepare(config: Config) -> Inputs:
    """Read both files, and draw at most `prompts` conversations."""
    web, chat = _read_web(config.web), _read_chat(config.chat)
    rng = np.random.default_rng(config.seed)
    chat = [chat[int(i)] for i in sorted(rng.permutation(len(chat))[: config.prompts])]
    if len(chat) < 2:
        raise InputError(f"{config.chat}: one chat prompt; give 2 or more")
    return Inputs(web, chat)


def _read_web(path: str) -> list[str]:
    if not path:
        return sources.passages(length=800)
    found = []
    for prompt in read_prompts(path, layouts=True):
        if prompt.prompt is None:
            raise InputError(
                f"{path}:{prompt.line}: web text is `prompt`, not `messages`; give the text alone"
            )
        found.append(prompt.prompt)
    return found


def _read_chat(path: str) -> list[Turns]:
    if not path:
        return [_turn(text) for text in sources.trivia()]
    return [p.messages or _turn(p.prompt or "") for p in read_prompts(path, layouts=True)]


def windows(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[str],
    length: int,
    *,
    most: int,
    seed: int = 0,
) -> list[Int[np.ndarray, " T"]]:
    """A random window of `length` tokens of each text that is long enough.

    Of more than `most` such texts, `most` are drawn. Special tokens that the tokenizer begins a
    text with come before the window, in addition to its length. Raises InputError for fewer than 2
    windows.
    """
    rng = np.random.default_rng(seed)
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    long = [np.asarray(row, np.int32) for row in rows if len(row) >= length]
    if len(long) < 2:
        raise InputError(
            f"window is {length}, but {len(long)} of {len(rows)} texts have so many tokens; "
            "give longer texts or a smaller window"
        )
    chosen = [long[int(i)] for i in sorted(rng.permutation(len(long))[:most])]
    starts = [int(rng.integers(len(row) - length + 1)) for row in chosen]
    special = set(tokenizer.all_special_ids)
    begin = itertools.takewhile(special.__contains__, tokenizer("a")["input_ids"])
    before = np.asarray(list(begin), np.int32)
    pieces = zip(chosen, starts, strict=True)
    return [np.concatenate([before, row[start : start + length]]) for row, start in pieces]


def measure(
    pair: Pair,
    tokenizer: "PreTrainedTokenizerBase",
    config: Config,
    inputs: Inputs,
    journal: Sections,
) -> Measured:
    """Every score of the prompts of each kind, in one call."""
    pieces = windows(tokenizer, inputs.web, config.window, most=config.prompts, seed=config.seed)
    for piece in pieces:
        if len(piece) > pair.context:
            raise InputError(f"window is {config.window}: the context holds {pair.context} tokens")
    kinds = {
        "chat": [Prompt(f"chat {i}", None, turns) for i, turns in enumerate(inputs.chat)],
        "chat as plain text": [
            Prompt(f"plain chat {i}", "\n".join(map(text_of, turns)))
            for i, turns in enumerate(inputs.chat)
        ],
        "web text as a turn": [
            Prompt(
                f"web turn {i}", None, _turn(str(tokenizer.decode(p, skip_special_tokens=True)))
            )
            for i, p in enumerate(pieces)
        ],
    }
    vocab = pair.tuned_config.vocab_size
    tokens = {
        name: encode(tokenizer, group, max_tokens=pair.context, vocab_size=vocab)
        for name, group in kinds.items()
    }
    kinds["web text"] = [Prompt(f"web {i}", "piece") for i in range(len(pieces))]
    tokens["web text"] = pieces
    prompts = [p for group in kinds.values() for p in group]
    rows = [row for group in tokens.values() for row in group]
    scores = {
        "TuCo": score_tokens(pair, rows, prompts, progress=True, journal=journal).tuco,
        **baselines_of_tokens(pair, rows, prompts, journal=journal).columns(),
    }
    ends = np.cumsum([len(group) for group in tokens.values()])[:-1]
    samples = {
        score: {n: Sample(n, v) for n, v in zip(tokens, np.split(values, ends), strict=True)}
        for score, values in scores.items()
    }
    return Measured(samples, {n: [len(row) for row in group] for n, group in tokens.items()})


def findings(config: Config, inputs: Inputs, measured: Measured) -> Findings:
    """The contrast of the paper and its two controls."""
    del inputs
    pairs = (
        ("chat", "web text"),
        ("chat as plain text", "web text"),
        ("chat", "web text as a turn"),
        ("chat", "chat as plain text"),
    )
    samples = measured.scores["TuCo"]
    kinds = list(samples.values())
    found = [compare(samples[a], samples[b], seed=config.seed) for a, b in pairs]
    simpler = [
        under_each_score({n: (s[a], s[b]) for n, s in measured.scores.items()}, seed=config.seed)
        for a, b in pairs[:3]
    ]
    return Findings(
        title="Chat prompts against web text",
        summary=[
            f"Of {found[0].sizes[0]} chat prompts and {found[0].sizes[1]} pieces of web text, a "
            f"chat prompt has the higher TuCo with probability {shown(found[0].auc)}. Without the "
            f"chat template it is {shown(found[1].auc)}; with it on both sides, "
            f"{shown(found[2].auc)}.",
        ],
        claims=[
            Claim(
                "Chat prompts have a higher TuCo than web text (section 5.2)",
                "AUC .89 to 1.0; Zephyr-Gemma .63",
                f"AUC {shown(found[0].auc)}",
                verdict(found[0].auc if found[0].enough else None),
            ),
            *(
                Claim(
                    f"It is so with both {form}, too (our control)",
                    "no control",
                    f"AUC {shown(c.auc)}",
                    verdict(c.auc if c.enough else None),
                )
                for form, c in zip(("as plain text", "as a user's turn"), found[1:], strict=False)
            ),
        ],
        tables=[
            contrast_table("Contrasts", found),
            simpler_table(simpler),
            means_table("TuCo of each kind", kinds, list(measured.lengths.values()), config.seed),
        ],
        figures=[strip_plot("tuco", "TuCo", kinds, "TuCo of every prompt, with the mean.")],
        method=[
            f"Web text: a random piece of {config.window} tokens of each page. "
            + (f"From {config.web}. " if config.web else f"{sources.PASSAGES_ARE} ")
            + "Chat: "
            + (f"{config.chat}." if config.chat else "questions of chatterbot-corpus.")
            + " A chat prompt is scored at the last token of the chat template, where the answer "
            "begins; a plain text at its own last token.",
        ],
        caveats=[
            "Chat prompts and web text differ in the chat template, in length and in content; the "
            "second and third contrast take the template out, nothing here takes out length.",
            "The paper's chat prompts are HH-RLHF's, which no package at hand carries.",
        ],
        facts={"window": f"{config.window} tokens"},
        data={
            "tuco": {n: s.values.tolist() for n, s in samples.items()},
            "tokens": measured.lengths,
            "contrasts": [dataclasses.asdict(c) for c in found],
            "simpler": [[dataclasses.asdict(row) for row in c] for c in simpler],
        },
    )


STUDY = Study(Config, prepare, measure, findings)
