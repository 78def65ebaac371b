"""Prompts as token ids: texts with special tokens, conversations through the chat template.

Legend: n tokens of a prompt.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from common_jax.errors import InputError
from tuco_jax.prompts.read import Prompt
from tuco_jax.prompts.render import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["encode"]


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None = None,
    vocab_size: int | None = None,
    truncate: bool | None = None,
    continue_final: bool = False,
    notes: list[str] | None = None,
) -> list[Int[np.ndarray, " n"]]:
    """Token ids of each prompt, int32.

    A text gets the tokenizer's default special tokens, but no second BOS where it begins with
    one. A conversation goes through the chat template, which opens the assistant's turn unless
    the last message is the assistant's, and gets no special tokens beyond the template's own. An
    assistant's turn at the end is closed by the template, or left open with `continue_final`.

    A prompt beyond `max_tokens` is an error, or with `truncate` keeps its last `max_tokens` tokens
    (a BOS at its start is lost); with None the message does not offer `--truncate`. What a chat
    template leaves out that says nothing by itself (`Renderer.notes`) is added to `notes`, or with
    None a warning. Raises
    InputError naming the prompt, also for a token beyond `vocab_size`, and where there is no chat
    template, or it refuses the conversation, leaves out some of it, or runs for too long.
    """
    plain = [i for i, p in enumerate(prompts) if p.messages is None]
    chats = [i for i, p in enumerate(prompts) if p.messages is not None]
    rows: dict[int, list[int]] = {}
    renderer = Renderer(tokenizer)
    conversations = [_render(renderer, tokenizer, prompts[i], continue_final) for i in chats]
    if notes is None:
        renderer.warn()
    else:
        notes += renderer.notes
    for indices, texts, special in (
        (plain, [prompts[i].prompt for i in plain], True),
        (chats, conversations, False),
    ):
        if indices:
            ids = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]  # pyright: ignore[reportArgumentType]
            if special:
                ids = [_one_bos(tokenizer, *pair) for pair in zip(texts, ids, strict=True)]
            rows.update(zip(indices, ids, strict=True))
    encoded = []
    for i, prompt in enumerate(prompts):
        tokens = np.asarray(rows[i], np.int32)
        if not tokens.size:
            raise InputError(f"{prompt}: the tokenizer makes no token of it")
        if vocab_size is not None and tokens.max() >= vocab_size:
            raise InputError(
                f"{prompt}: token {tokens.max()} is beyond the tuned model's vocabulary of "
                f"{vocab_size}; the tokenizer belongs to another model"
            )
        if max_tokens is not None and tokens.size > max_tokens:
            if not truncate:
                offer = "" if truncate is None else ", or keep its last tokens with --truncate"
                raise InputError(
                    f"{prompt}: {tokens.size} tokens, but the model's context holds {max_tokens}; "
                    f"shorten it{offer}"
                )
            tokens = tokens[-max_tokens:]
        encoded.append(tokens)
    return encoded


def _one_bos(tokenizer: "PreTrainedTokenizerBase", text: Any, ids: list[int]) -> list[int]:
    """The tokens of a text without the BOS that was put before one of its own."""
    if len(ids) < 2 or not ids[0] == ids[1] == tokenizer.bos_token_id:
        return ids
    own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids[1:] if ids[1 : len(own) + 1] == own else ids


def _render(
    renderer: Renderer, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, continue_final: bool
) -> str:
    """The conversation as the text that the chat template makes of it."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{prompt}: `messages` need a chat template and the tuned model's tokenizer has none; "
            "give `prompt` instead"
        )
    assert prompt.messages
    messages = prompt.messages
    answered = messages[-1]["role"] == "assistant"
    try:
        return renderer.text(
            messages,
            tools=prompt.tools,
            opened=not answered,
            continued=answered and continue_final,
        )
    except InputError as error:
        raise InputError(f"{prompt}: {error}") from error
