"""TuCo of every token of a prompt, for the heat map of the demo's report."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tuco_jax.models.pair import Pair
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.messages import text_of
from tuco_jax.prompts.read import Prompt
from tuco_jax.scoring.token_tuco import pieces, token_tuco
from tuco_jax.studies.demo_report import Token, TokenMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["token_maps"]


def token_maps(
    pair: Pair, tokenizer: "PreTrainedTokenizerBase", chosen: Sequence[tuple[str, float, Prompt]]
) -> list[TokenMap]:
    """A map for each chosen (group, tuco, prompt): the texts and TuCo of its tokens."""
    tokens = encode(tokenizer, [prompt for _, _, prompt in chosen])
    # In one batch: for few rows a second compilation costs more than padding.
    values = token_tuco(pair, tokens, token_budget=1 << 30)
    return [
        TokenMap(group, tuco, _tokens(tokenizer, ids, shares, prompt))
        for (group, tuco, prompt), ids, shares in zip(chosen, tokens, values, strict=True)
    ]


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", ids: np.ndarray, values: np.ndarray, prompt: Prompt
) -> list[Token]:
    """A prompt's tokens; those outside the user's own text are marked as special."""
    first, last = _content(tokenizer, ids, prompt)
    found = pieces(tokenizer, ids, values)
    return [Token(p.text, p.tuco, not first <= p.position < last) for p in found]


def _content(
    tokenizer: "PreTrainedTokenizerBase", ids: np.ndarray, prompt: Prompt
) -> tuple[int, int]:
    """Range (first, end) of the tokens of the user's own text."""
    if prompt.messages is None:
        return 0, len(ids)
    text = text_of(prompt.messages[-1])
    ends = [len(str(tokenizer.decode(ids[:n].tolist()))) for n in range(len(ids) + 1)]
    whole = str(tokenizer.decode(ids.tolist()))
    start = whole.rfind(text)
    if start < 0:
        return 0, len(ids)
    first = int(np.searchsorted(ends, start, side="right")) - 1
    return first, int(np.searchsorted(ends, start + len(text), side="left"))
