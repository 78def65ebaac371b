"""`tuco-jax study web-chat`: TuCo of chat prompts against that of web text (section 5.2).

The paper takes random pieces of 97 tokens of OpenWebText, and prompts of HH-RLHF in their chat
format. Its contrast is one of content, of format and of length at once. Two controls take it
apart: the chat prompts as plain text, and the web pieces as a user's turn.

Legend: N prompts.
"""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common_jax.errors import InputError
from common_jax.io.files import make_folder
from common_jax.report.findings import Claim, Findings, print_tables, write
from tuco_jax.datasets import prompt_sources as sources
from tuco_jax.evaluation.baselines import baselines_of_tokens
from tuco_jax.evaluation.contrasts import (
    Sample,
    compare,
    contrast_table,
    means_table,
    shown,
    spread,
    verdict,
)
from tuco_jax.evaluation.simpler_scores import simpler_table, under_each_score
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    Prompt,
    read_prompts,
)
from tuco_jax.scoring.score import score_tokens
from tuco_jax.studies.base import Studied, command, load_studied

__all__ = ["Config", "run", "windows"]


@dataclasses.dataclass(frozen=True)
class Config(Studied):
    """TuCo of chat prompts against windows of web text.

    Args:
        out: folder for results and report.
        web: file of texts (`prompt`); empty for pieces of web pages that a package carries.
        chat: file of prompts; a `prompt` is taken as a user's turn. Empty for questions of
            chatterbot-corpus.
        window: tokens of a piece of web text.
        prompts: most prompts of each kind.
    """

    out: pathlib.Path
    web: str = ""
    chat: str = ""
    window: int = 97
    prompts: int = 64


def windows(
    tokenizer: Any, texts: Sequence[str], length: int, *, most: int, seed: int = 0
) -> list[np.ndarray]:
    """A random piece of `length` tokens of each text that has so many, int32 [length] each.

    From `most` texts at most, chosen by `seed` too. A tokenizer that begins texts with special
    tokens has them before the piece, beyond its length. Raises InputError for fewer than 2 pieces.
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


def _read(config: Config) -> tuple[list[str], list[tuple[Mapping[str, str], ...]]]:
    """Texts of web pages, and conversations."""
    if config.window < 1 or config.prompts < 2:
        raise InputError("window must be 1 or more, prompts 2 or more")
    web = sources.passages(length=800) if not config.web else []
    if config.web:
        for prompt in read_prompts(config.web, layouts=True):
            if prompt.prompt is None:
                raise InputError(
                    f"{config.web}:{prompt.line}: web text is `prompt`, not `messages`; "
                    "give the text alone"
                )
            web.append(prompt.prompt)
    if not config.chat:
        return web, [_turn(text) for text in sources.trivia()]
    return web, [
        p.messages or _turn(p.prompt or "") for p in read_prompts(config.chat, layouts=True)
    ]


def _turn(text: str) -> tuple[Mapping[str, str], ...]:
    return ({"role": "user", "content": text},)


def run(config: Config) -> Findings:
    """Read, score, report; everything is checked before a model is loaded."""
    started = time.perf_counter()
    web, chat = _read(config)
    rng = np.random.default_rng(config.seed)
    chat = [chat[int(i)] for i in sorted(rng.permutation(len(chat))[: config.prompts])]
    if len(chat) < 2:
        raise InputError(f"{config.chat}: one chat prompt; give 2 or more")
    make_folder(config.out)
    pair, tokenizer, facts = load_studied(config)
    pieces = windows(tokenizer, web, config.window, most=config.prompts, seed=config.seed)
    vocab = pair.tuned_config.vocab_size
    kinds: dict[str, list[Prompt]] = {
        "chat": [Prompt(f"chat {i}", None, turns) for i, turns in enumerate(chat)],
        "chat as plain text": [
            Prompt(f"plain chat {i}", "\n".join(t["content"] for t in turns))
            for i, turns in enumerate(chat)
        ],
        "web text as a turn": [
            Prompt(f"web turn {i}", None, _turn(tokenizer.decode(p, skip_special_tokens=True)))
            for i, p in enumerate(pieces)
        ],
    }
    tokens = {
        name: encode(tokenizer, group, max_tokens=pair.context, vocab_size=vocab)
        for name, group in kinds.items()
    }
    kinds["web text"] = [Prompt(f"web {i}", "piece") for i in range(len(pieces))]
    tokens["web text"] = pieces
    for piece in pieces:
        if len(piece) > pair.context:
            raise InputError(f"window is {config.window}: the context holds {pair.context} tokens")
    prompts = [p for group in kinds.values() for p in group]
    rows = [row for group in tokens.values() for row in group]
    scores = {
        "TuCo": score_tokens(pair, rows, prompts, progress=True).tuco,
        **baselines_of_tokens(pair, rows, prompts).columns(),
    }
    ends = np.cumsum([len(group) for group in tokens.values()])[:-1]
    samples = {
        score: {n: Sample(n, v) for n, v in zip(tokens, np.split(values, ends), strict=True)}
        for score, values in scores.items()
    }
    findings = _findings(config, samples, tokens, facts)
    print_tables(findings)
    write(config.out, findings, started, command("web-chat", config))
    return findings


def _findings(
    config: Config,
    scores: Mapping[str, Mapping[str, Sample]],
    tokens: Mapping[str, Sequence[np.ndarray]],
    facts: Mapping[str, str],
) -> Findings:
    pairs = (
        ("chat", "web text"),
        ("chat as plain text", "web text"),
        ("chat", "web text as a turn"),
        ("chat", "chat as plain text"),
    )
    samples = scores["TuCo"]
    found = [compare(samples[a], samples[b], seed=config.seed) for a, b in pairs]
    simpler = [
        under_each_score({n: (s[a], s[b]) for n, s in scores.items()}, seed=config.seed)
        for a, b in pairs[:3]
    ]
    lengths = [[len(row) for row in rows] for rows in tokens.values()]
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
            means_table("TuCo of each kind", list(samples.values()), lengths, config.seed),
        ],
        figures=[
            spread("tuco", "TuCo", list(samples.values()), "TuCo of every prompt, with the mean.")
        ],
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
        facts={**facts, "window": f"{config.window} tokens", "seed": str(config.seed)},
        data={
            "tuco": {n: s.values.tolist() for n, s in samples.items()},
            "tokens": dict(zip(samples, lengths, strict=True)),
            "contrasts": [dataclasses.asdict(c) for c in found],
            "simpler": [[dataclasses.asdict(row) for row in c] for c in simpler],
        },
    )
