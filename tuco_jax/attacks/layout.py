"""The tokens of a prompt around an attack string, and which tokens and strings are allowed.

Legend: A tokens of the string, N candidates, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Int

from common_jax.errors import InputError
from tuco_jax.attacks.target_loss import Pieces
from tuco_jax.prompts.render import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Goal",
    "Layout",
    "Placement",
    "PlacementOption",
    "allowed_tokens",
    "lay_out",
    "random_strings",
    "surviving",
]

Placement = Literal["prefix", "suffix"]  # before the request, or behind it


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementOption:
    """Where a string goes that is no template of its own.

    Args:
        placement: an attack string before the request (prefix), or behind it (suffix).
    """

    placement: Placement = "suffix"


@dataclasses.dataclass(frozen=True)
class Goal:
    """A user's request, and how the attack wants the answer to begin."""

    request: str
    target: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """A goal's text on both sides of the string, and its tokens with the initial string in place.

    special: whether the tokenizer adds its special tokens (there is no chat template).
    """

    left: str
    right: str
    special: bool
    pieces: Pieces


def lay_out(
    tokenizer: "PreTrainedTokenizerBase",
    goals: Sequence[Goal],
    start: str,
    placement: Placement,
    *,
    context: int | None = None,
    vocab_size: int | None = None,
) -> list[Layout]:
    """Texts and tokens of every goal, through the chat template where there is one.

    Raises InputError naming the goal where the request or target is empty, where the tokenizer
    merges the string's ends with the text around it, and beyond the model's context or vocabulary.
    """
    if not goals:
        raise InputError("no goals: give one request and its target, or more")
    found = []
    for number, goal in enumerate(goals, start=1):
        where = f"goal {number}"
        if not goal.request.strip() or not goal.target.strip():
            raise InputError(f"{where}: request and target must be texts, not empty")
        own = _lay_out(tokenizer, goal, start, placement, where)
        ids = own.pieces.whole
        if vocab_size is not None and ids.max() >= vocab_size:
            raise InputError(
                f"{where}: token {ids.max()} is beyond the model's vocabulary of {vocab_size}; "
                "the tokenizer belongs to another model"
            )
        if context is not None and ids.size > context:
            raise InputError(
                f"{where}: {ids.size} tokens with string and target, but the model's context "
                f"holds {context}; shorten them"
            )
        found.append(own)
    first = found[0].pieces.attack
    for number, own in enumerate(found, start=1):
        if not np.array_equal(own.pieces.attack, first):
            raise InputError(
                f"goal {number}: start has other tokens than in goal 1; choose another start"
            )
    return found


def _lay_out(
    tokenizer: "PreTrainedTokenizerBase",
    goal: Goal,
    start: str,
    placement: Placement,
    where: str,
) -> Layout:
    request, target = goal.request.strip(), goal.target.strip()
    parts = [start, request] if placement == "prefix" else [request, start]
    content = " ".join(parts)
    special = not tokenizer.chat_template
    if special:
        text, target = content, " " + target
    else:
        try:
            messages = [{"role": "user", "content": content}]
            text = render(tokenizer, messages, opened=True, whole=False)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    at = text.find(content)
    if at < 0:
        raise InputError(f"{where}: the chat template changes the user's text; the string is lost")
    begin = at if placement == "prefix" else at + len(request) + 1
    end = begin + len(start)
    whole = tokenizer(
        text + target, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    ids = np.asarray(whole["input_ids"], np.int32)
    starts, ends = np.asarray(whole["offset_mapping"]).T
    cuts = [
        int(np.argmax(inside))
        for inside in (ends > begin, starts >= end, ends > len(text))
        if inside.any()
    ]
    # A token with characters of both sides belongs to neither: the string could not be replaced.
    if len(cuts) < 3 or any(
        c and ends[c - 1] > place for c, place in zip(cuts, (begin, end, len(text)), strict=True)
    ):
        raise InputError(
            f"{where}: the tokenizer merges the string or the target with the text beside it; "
            "choose another start or target"
        )
    pieces = Pieces(*np.split(ids, cuts))
    return Layout(text[:begin], text[end:] + target, special, pieces)


def allowed_tokens(
    tokenizer: "PreTrainedTokenizerBase", vocab_size: int, non_ascii: bool = False
) -> Bool[np.ndarray, " V"]:
    """Which tokens a string may contain: no special ones, and by default only printable ASCII."""
    allowed = np.zeros(vocab_size, bool)
    count = min(len(tokenizer), vocab_size)
    texts = tokenizer.batch_decode([[i] for i in range(count)])
    for i, text in enumerate(texts):
        allowed[i] = bool(text) and (non_ascii or (text.isascii() and text.isprintable()))
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    allowed[[i for i in special if i < vocab_size]] = False
    if not allowed.any():
        raise InputError("the tokenizer has no token that a string may hold; allow non_ascii")
    return allowed


def random_strings(
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    lengths: Sequence[int],
    *,
    seed: int = 0,
    tries: int = 1000,
) -> list[str]:
    """For each length in tokens, a string of random tokens that a search may use: a control.

    Raises InputError where the text of none of `tries` draws tokenizes to that many tokens.
    """
    allowed = np.flatnonzero(allowed_tokens(tokenizer, vocab_size))
    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        for _ in range(tries):
            ids = rng.choice(allowed, length).tolist()
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            again = tokenizer(text, add_special_tokens=False)["input_ids"]
            if text and text == text.strip() and len(again) == length:
                found.append(text)
                break
        else:
            raise InputError(
                f"no random string of {length} tokens in {tries} draws: take shorter strings"
            )
    return found


def surviving(
    tokenizer: "PreTrainedTokenizerBase",
    layouts: Sequence[Layout],
    candidates: Int[np.ndarray, "N A"],
) -> Bool[np.ndarray, " N"]:
    """Which candidates tokenize to the same tokens when their text is put in its place."""
    texts = [
        str(tokenizer.decode(c, clean_up_tokenization_spaces=False)) for c in candidates.tolist()
    ]
    survives = np.asarray([bool(t) and t == t.strip() for t in texts])
    for own in layouts:
        rows = tokenizer(
            [own.left + t + own.right for t in texts],
            add_special_tokens=own.special,
            verbose=False,
        )["input_ids"]
        for i, row in enumerate(rows):
            expected = own.pieces._replace(attack=candidates[i]).whole
            survives[i] &= np.array_equal(row, expected)
    return survives
