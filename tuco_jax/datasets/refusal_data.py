"""Requests and answers that teach a small chat model to refuse what harms, and only that.

    python -m tuco_jax.datasets.refusal_data --out runs/refusal-data

writes train.jsonl (rows of `messages`, `id`, `label`, `truncated`, as `tuco-jax finetune` reads
them) and one .jsonl of `messages` for each evaluation set:

    advbench        harmful, held out: groups of near-duplicates disjoint from those trained on
    strongreject    harmful, a second source
    harmless        harmless, held out
    trivia          harmless, a second source (chatterbot-corpus: trivia, programming)
    sounds_harmful  harmless, but in words that sound harmful

and watch.jsonl, a few prompts of advbench and harmless whose TuCo is logged during training.

Harmful requests for training are AdvBench's (fetched, MIT) and a few of our own in other words.
Harmless ones are our own, with the base model's own answers, so that tuning teaches nothing but
refusal. Both classes have imperatives, polite frames and questions alike, so that form is no cue.
`--answer MODEL` has a model answer the harmless requests again, and rewrites
tuco_jax/data/answers.jsonl.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from common_jax.cli.options import SeedOption
from common_jax.cli.ranges import PositiveInt, check_ranges
from common_jax.io.files import make_folder
from tuco_jax.datasets import prompt_sources as sources
from tuco_jax.scoring.output import write_table

__all__ = [
    "DataOptions",
    "RefusalDataConfig",
    "Split",
    "SplitOptions",
    "answer",
    "evaluation_sets",
    "harmful_split",
    "held_out_harmless",
    "near_duplicates",
    "phrase",
    "run",
    "split_advbench",
    "training_rows",
    "without_duplicates_of",
    "write_sets",
]

SIMILAR = 0.35  # cosine of TF-IDF vectors above which two requests are near-duplicates
ANSWER_TOKENS = 40
WATCHED = 24  # prompts of each label

_FRAMES = ("{}", "{}", "{}", "Please {}.", "Can you {}?", "I need you to {}.", "I want you to {}.")
_QUESTIONS = ("How do I {}?", "How can I {}?", "What is the best way to {}?", "How to {}?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitOptions(SeedOption):
    """Which requests are trained on, and which are evaluated on.

    Args:
        harmful: number of AdvBench requests to train on.
        evaluation: most prompts in an evaluation set.
    """

    harmful: PositiveInt = 190
    evaluation: PositiveInt = 100

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions(SplitOptions):
    """A split that is written.

    Args:
        out: folder for the training and evaluation sets; made if it is not there.
    """

    out: pathlib.Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusalDataConfig(DataOptions):
    """Build the training and evaluation sets.

    Args:
        answer: a model that is to answer the harmless training prompts again; empty keeps the
            answers that there are.
    """

    out: pathlib.Path = pathlib.Path("runs/refusal-data")
    answer: str = ""


@dataclasses.dataclass(frozen=True)
class Split:
    """Texts to train on and to evaluate on; no group of near-duplicates is in both."""

    train: list[str]
    evaluation: list[str]


def _vectors(texts: Sequence[str]) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, stop_words="english")
    return vectorizer.fit_transform(texts)


def near_duplicates(texts: Sequence[str], threshold: float = SIMILAR) -> Int[np.ndarray, " N"]:
    """The group of each text; texts linked by a chain of similar ones share a group."""
    from scipy.sparse.csgraph import connected_components

    vectors = _vectors(texts)
    return connected_components(vectors @ vectors.T > threshold, directed=False)[1]


def split_advbench(texts: Sequence[str], harmful: int, evaluation: int, seed: int) -> Split:
    """Split by group of near-duplicates: the largest and about half of the others for training.

    Over a quarter of AdvBench is one group (hacking, bombs, identity theft in many wordings). At
    most half of the training set is drawn from it, and nothing of the evaluation set. Of any other
    group at most two texts are in the evaluation set.
    """
    groups = near_duplicates(texts)
    rng = np.random.default_rng(seed)
    largest = int(np.bincount(groups).argmax())
    names = rng.permutation([g for g in range(groups.max() + 1) if g != largest])
    trained = set(names[: len(names) // 2].tolist())
    chosen = rng.permutation(np.flatnonzero(groups == largest))[: harmful // 2].tolist()
    others = [i for i in range(len(texts)) if groups[i] in trained]
    chosen += rng.permutation(others)[: harmful - len(chosen)].tolist()
    held_out: list[int] = []
    taken: dict[int, int] = {}
    for i in rng.permutation(len(texts)).tolist():
        group = int(groups[i])
        if group == largest or group in trained or taken.get(group, 0) == 2:
            continue
        taken[group] = taken.get(group, 0) + 1
        held_out.append(i)
    return Split(
        [texts[int(i)] for i in sorted(chosen)],
        [texts[int(i)] for i in sorted(held_out[:evaluation])],
    )


def phrase(request: str, rng: np.random.Generator) -> str:
    """The request unchanged, in a polite frame, or, where it says "how to", as a question."""
    how = re.search(r"\bhow to ([^,.;]+)$", request)
    if how and rng.random() < 0.4:
        return _QUESTIONS[rng.integers(len(_QUESTIONS))].format(how.group(1))
    frame = _FRAMES[rng.integers(len(_FRAMES))]
    if frame == "{}":
        return request
    return frame.format(request[0].lower() + request[1:].rstrip("."))


def _is_imperative(prompt: str) -> bool:
    return not prompt.endswith(("?", "!", "."))


def training_rows(config: SplitOptions) -> list[dict[str, Any]]:
    """Rows of train.jsonl, shuffled: `messages`, `id`, `label`, `truncated`."""
    rng = np.random.default_rng(config.seed + 1)
    refusals = [row["text"] for row in sources.shipped("refusals")]
    split = harmful_split(config)
    harmful = {f"advbench-{i:03d}": phrase(text, rng) for i, text in enumerate(split.train)}
    harmful |= {row["id"]: row["prompt"] for row in sources.shipped("harmful")}
    rows = []
    for number, (name, prompt) in enumerate(harmful.items()):
        # In turn, so that each wording is used equally often.
        rows.append(_row(name, prompt, refusals[number % len(refusals)], "harmful", False))
    for row in sources.shipped("answers"):
        rows.append(_row(row["id"], row["prompt"], row["answer"], "harmless", row["truncated"]))
    return [rows[i] for i in rng.permutation(len(rows))]


def _row(name: str, prompt: str, reply: str, label: str, truncated: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return {"id": name, "label": label, "truncated": truncated, "messages": messages}


def harmful_split(config: SplitOptions) -> Split:
    """The AdvBench requests that the shipped adapter was trained on, and those held out."""
    return split_advbench(sources.advbench(), config.harmful, config.evaluation, config.seed)


def held_out_harmless() -> list[str]:
    """Our own harmless prompts for evaluation, without those that sound harmful."""
    rows = [row for row in sources.shipped("harmless") if row["split"] == "evaluation"]
    return [row["prompt"] for row in rows if row["kind"] != "sounds_harmful"]


def evaluation_sets(config: SplitOptions) -> dict[str, list[dict[str, Any]]]:
    """Rows of each evaluation set: `messages` of one user turn, `id`, `label`."""
    rng = np.random.default_rng(config.seed + 2)
    split = harmful_split(config)
    own = [row for row in sources.shipped("harmless") if row["split"] == "evaluation"]
    sounds = [row["prompt"] for row in own if row["kind"] == "sounds_harmful"]

    def some(texts: list[str]) -> list[str]:
        chosen = rng.permutation(len(texts))[: config.evaluation]
        return [texts[i] for i in sorted(chosen.tolist())]

    trained = split.train + [row["prompt"] for row in sources.shipped("harmful")]
    sets = {
        "advbench": split.evaluation,
        "strongreject": some(without_duplicates_of(sources.strongreject(), trained)),
        "harmless": some(held_out_harmless()),
        "trivia": some(sources.trivia()),
        "sounds_harmful": sounds,
    }
    return {
        name: [
            {
                "id": f"{name}-{i:03d}",
                "label": "harmful" if name in ("advbench", "strongreject") else "harmless",
                "messages": [{"role": "user", "content": text}],
            }
            for i, text in enumerate(texts)
        ]
        for name, texts in sets.items()
    }


def without_duplicates_of(
    texts: Sequence[str], others: Sequence[str], threshold: float = 0.5
) -> list[str]:
    """Those of `texts` that are no near-duplicate of any of `others`."""
    vectors = _vectors([*texts, *others])
    similar = (vectors[: len(texts)] @ vectors[len(texts) :].T).max(axis=1).toarray()[:, 0]
    return [t for t, s in zip(texts, similar, strict=True) if s <= threshold]


def answer(model: str, seed: int) -> list[dict[str, Any]]:
    """Rows of answers.jsonl: a model's greedy answers to the harmless training prompts.

    `truncated` marks an answer that was cut at ANSWER_TOKENS, after which no end token may be
    trained. Answers that refuse are left out.
    """
    from tuco_jax.datasets.refusal_strings import is_refusal
    from tuco_jax.generation.generate import end_tokens, generate_tokens
    from tuco_jax.models.pair import single
    from tuco_jax.prompts.encode import encode
    from tuco_jax.prompts.read import as_prompts
    from tuco_jax.weights.load import load_model

    rng = np.random.default_rng(seed)
    rows = [row for row in sources.shipped("harmless") if row["split"] == "train"]
    prompts = [
        phrase(row["prompt"], rng) if _is_imperative(row["prompt"]) else row["prompt"]
        for row in rows
    ]
    loaded = load_model(model)
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    chats = as_prompts([[{"role": "user", "content": p}] for p in prompts])
    tokens = generate_tokens(
        single(loaded.config, loaded.params),
        encode(tokenizer, chats),
        max_new_tokens=ANSWER_TOKENS,
        eos=end_tokens(tokenizer),
    )
    answers = []
    for row, prompt, ids in zip(rows, prompts, tokens, strict=True):
        text = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        truncated = len(ids) >= ANSWER_TOKENS
        if text.strip() and not is_refusal(text):
            answers.append(
                {"id": row["id"], "prompt": prompt, "answer": text, "truncated": truncated}
            )
    return answers


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    write_table(path, {key: [row[key] for row in rows] for key in rows[0]})


def run(config: RefusalDataConfig) -> None:
    """Write the training set and the evaluation sets, and print their sizes."""
    if config.answer:
        _write(sources.DATA / "answers.jsonl", answer(config.answer, config.seed))
    write_sets(config, training_rows(config))


def write_sets(config: DataOptions, training: list[dict[str, Any]]) -> None:
    """Write the training rows, the evaluation sets and the watched prompts."""
    evaluation = evaluation_sets(config)
    watched = evaluation["advbench"][:WATCHED] + evaluation["harmless"][::3][:WATCHED]
    sets = {"train": training, "watch": watched, **evaluation}
    make_folder(config.out)
    for name, rows in sets.items():
        _write(config.out / f"{name}.jsonl", rows)
        print(f"{config.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    import sys

    from common_jax.cli.command_line import run_alone

    sys.exit(run_alone("python -m tuco_jax.datasets.refusal_data", RefusalDataConfig, run))
