"""Conversations as tokens, and which of these the assistant wrote.

The loss is on the assistant's turns only: on their text and on the token that ends the turn, so
that the model learns to stop. An answer that is marked as cut short has no such end.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from common_jax.errors import InputError
from tuco_jax.prompts.messages import Message
from tuco_jax.prompts.read import read_prompts
from tuco_jax.prompts.render import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Conversation", "Example", "read_conversations", "tokenize"]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One row of a file. truncated: its last answer was cut short."""

    messages: tuple[Message, ...]
    truncated: bool
    where: str  # file:line


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation's tokens; answer: True at those that the assistant wrote."""

    tokens: Int[np.ndarray, " n"]
    answer: Bool[np.ndarray, " n"]


def read_conversations(path: str | pathlib.Path) -> list[Conversation]:
    """Rows {"messages": [{"role", "content"}, ...], "truncated": false} of a .jsonl file.

    Other fields are ignored. Raises InputError naming file and line.
    """
    path = pathlib.Path(path)
    if path.suffix != ".jsonl":
        raise InputError(f"{path}: training data comes as .jsonl, rows of `messages`")
    prompts = read_prompts(path)
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    conversations = []
    for prompt in prompts:
        where = f"{path}:{prompt.line}"
        if prompt.messages is None:
            raise InputError(f"{where}: the row has no `messages`; training wants conversations")
        if not any(m["role"] == "assistant" for m in prompt.messages):
            raise InputError(f"{where}: no assistant turn, so nothing to learn; add an answer")
        truncated = json.loads(lines[prompt.line - 1]).get("truncated", False)
        if not isinstance(truncated, bool):
            raise InputError(f"{where}: `truncated` must be true or false, not {truncated!r}")
        for turn, m in enumerate(prompt.messages):
            if not isinstance(m.get("content"), str) or prompt.tools:
                what = "`tools`" if prompt.tools else f"`messages[{turn}].content`"
                raise InputError(f"{where}: {what} cannot be learned from; give texts alone")
        if truncated and prompt.messages[-1]["role"] != "assistant":
            raise InputError(f"{where}: `truncated`, but the last turn is not the assistant's")
        conversations.append(Conversation(prompt.messages, truncated, where))
    return conversations


def tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    conversations: Sequence[Conversation],
    *,
    max_tokens: int,
    vocab_size: int,
    truncate: bool = False,
) -> list[Example]:
    """The tokens of each conversation as the chat template writes it, and no others.

    Conversations longer than `max_tokens` are an error, or with `truncate` lose their end. Raises
    InputError naming file and line.
    """
    renderer = Renderer(tokenizer)
    examples = [
        _example(tokenizer, renderer, c, max_tokens, vocab_size, truncate) for c in conversations
    ]
    renderer.warn()
    return examples


def _example(
    tokenizer: "PreTrainedTokenizerBase",
    renderer: Renderer,
    conversation: Conversation,
    max_tokens: int,
    vocab_size: int,
    truncate: bool,
) -> Example:
    where = conversation.where
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: the base model's tokenizer has no chat template, which training on "
            "`messages` needs; name one with --chat_template"
        )
    if not tokenizer.is_fast:
        raise InputError(f"{where}: the tokenizer gives no character offsets; use a fast one")
    text = _render(renderer, conversation, len(conversation.messages))
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    tokens = np.asarray(encoded["input_ids"], np.int32)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    special = np.isin(tokens, _special_ids(tokenizer))
    answer = np.zeros(tokens.shape, bool)
    for turn, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            answer |= _answer_tokens(renderer, conversation, turn, text, offsets, special)
    if tokens.max() >= vocab_size:
        raise InputError(
            f"{where}: token {tokens.max()} is beyond the model's vocabulary of {vocab_size}; "
            "the tokenizer belongs to another model"
        )
    if tokens.size > max_tokens:
        if not truncate:
            raise InputError(
                f"{where}: {tokens.size} tokens, but `length` is {max_tokens}; raise it, shorten "
                "the row, or cut off its end with --truncate"
            )
        tokens, answer = tokens[:max_tokens], answer[:max_tokens]
    if not answer[1:].any():
        raise InputError(
            f"{where}: none of the first {tokens.size} tokens is the assistant's; raise `length` "
            "or shorten the row"
        )
    return Example(tokens, answer)


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> np.ndarray:
    added = tokenizer.added_tokens_decoder  # pyright: ignore[reportAttributeAccessIssue]
    return np.asarray([*tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)])


def _answer_tokens(
    renderer: Renderer,
    conversation: Conversation,
    turn: int,
    text: str,
    offsets: np.ndarray,
    special: np.ndarray,
) -> np.ndarray:
    """Which tokens of the whole text belong to one assistant turn, its end token included."""
    prefix = _render(renderer, conversation, turn, opened=True)
    content = conversation.messages[turn]["content"].strip()
    at = text.find(content, len(prefix))
    if not text.startswith(prefix) or at < 0:
        raise InputError(
            f"{conversation.where}: the chat template rewrites messages[{turn}] when later turns "
            "follow it; end the row with that turn"
        )
    begin, end = len(prefix), at + len(content)
    inside = (offsets[:, 1] > begin) & (offsets[:, 0] < end)
    if conversation.truncated and turn == len(conversation.messages) - 1:
        return inside
    # What closes the turn: the text that the template writes after it when no turn follows.
    closed = _render(renderer, conversation, turn + 1)
    tail = end + len(closed) - (closed.rfind(content) + len(content))
    closing = np.flatnonzero((offsets[:, 0] >= end) & (offsets[:, 1] <= tail) & special)
    if closing.size:
        return inside | ((offsets[:, 0] >= end) & (np.arange(inside.size) <= closing[0]))
    tail = end + len(text[end:tail].rstrip())
    return inside | ((offsets[:, 0] >= end) & (offsets[:, 0] < tail))


def _render(
    renderer: Renderer,
    conversation: Conversation,
    turns: int,
    opened: bool = False,
) -> str:
    """The first turns as text; opened: followed by what begins an assistant's turn."""
    try:
        messages = conversation.messages[:turns]
        whole = not opened and turns == len(conversation.messages)  # once is enough
        return renderer.text(messages, opened=opened, whole=whole)
    except InputError as error:
        raise InputError(f"{conversation.where}: {error}") from error
