"""Prompts as token ids: texts with special tokens, conversations through the chat template.

Legend: n tokens of a prompt.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from common_jax.errors import InputError
from tuco_jax.prompts.read import Prompt

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
) -> list[Int[np.ndarray, " n"]]:
    """Token ids of each prompt, int32.

    A text gets the tokenizer's default special tokens. A conversation goes through the chat
    template, which opens the assistant's turn unless the last message is the assistant's, and
    gets no special tokens beyond the template's own: never a second BOS.

    A prompt beyond `max_tokens` is an error, or with `truncate` keeps its last `max_tokens` tokens
    (a BOS at its start is lost); with None the message does not offer `--truncate`. Raises
    InputError naming the prompt, also for a token beyond `vocab_size`, and where there is no chat
    template or it refuses the conversation.
    """
    plain = [i for i, p in enumerate(prompts) if p.messages is None]
    chats = [i for i, p in enumerate(prompts) if p.messages is not None]
    rows: dict[int, list[int]] = {}
    for indices, texts, special in (
        (plain, [prompts[i].prompt for i in plain], True),
        (chats, [_render(tokenizer, prompts[i]) for i in chats], False),
    ):
        if indices:
            ids = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]  # pyright: ignore[reportArgumentType]
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


def _render(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> str:
    """The conversation as the text that the chat template makes of it."""
    if not tokenizer.chat_template:
        raise InputError(
            f"{prompt}: `messages` need a chat template and the tuned model's tokenizer has none; "
            "give `prompt` instead"
        )
    messages = [dict(m) for m in prompt.messages or ()]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=messages[-1]["role"] != "assistant",
        )
    except Exception as error:  # whatever a template raises: jinja2's own errors, or TypeErrors
        reason = " ".join(str(error).split())
        raise InputError(f"{prompt}: the chat template refuses `messages`: {reason}") from error
    assert isinstance(text, str)
    return text
