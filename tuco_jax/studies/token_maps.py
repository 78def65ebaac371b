"""TuCo of every token of a prompt, with the tokens' texts: what the report's heat map shows.

Legend: B rows of a batch, T its length.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from tuco_jax.batching import Batch, ladder, pad
from tuco_jax.decompose import decompose, share
from tuco_jax.pair import Pair
from tuco_jax.prompts import Prompt, encode
from tuco_jax.studies.report import Token, TokenMap

__all__ = ["token_maps"]


@jax.jit
def _token_tuco(pair: Pair, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """TuCo of every token, [B, T]: the share of FTC in the sums over all layers at that token."""
    out = decompose(pair, tokens, mask)
    return share(out.ptc, out.ftc)


def token_maps(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, chosen: Sequence[tuple[str, float, Prompt]]
) -> list[TokenMap]:
    """TuCo of every token of chosen prompts (group, tuco, prompt), with their texts."""
    tokens = encode(tokenizer, [prompt for _, _, prompt in chosen])
    # One shape: the rows are few, and a compilation costs more than their padding.
    batch = Batch(tuple(range(len(tokens))), len(tokens), ladder(max(map(len, tokens)))[-1])
    ids, mask = pad(tokens, batch)
    values = np.asarray(_token_tuco(pair, jnp.asarray(ids), jnp.asarray(mask)))
    return [
        TokenMap(
            group, tuco, _pieces(tokenizer, tokens[row], values[row, : tokens[row].size], prompt)
        )
        for row, (group, tuco, prompt) in enumerate(chosen)
    ]


def _pieces(
    tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, values: np.ndarray, prompt: Prompt
) -> list[Token]:
    """Tokens with their texts; the bytes of one character, split over tokens, are shown as one."""
    first, last = _content(tokenizer, ids, prompt)
    pieces: list[Token] = []
    held: list[int] = []
    for position, token in enumerate(ids.tolist()):
        held.append(token)
        text = str(tokenizer.decode(held))
        if text.endswith("\ufffd") and position + 1 < len(ids):
            continue
        pieces.append(Token(text, float(values[position]), not first <= position < last))
        held = []
    return pieces


def _content(
    tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, prompt: Prompt
) -> tuple[int, int]:
    """First and end position of the user's own text among the tokens of a prompt."""
    if prompt.messages is None:
        return 0, len(ids)
    text = prompt.messages[-1]["content"]
    ends = [len(str(tokenizer.decode(ids[:n].tolist()))) for n in range(len(ids) + 1)]
    whole = str(tokenizer.decode(ids.tolist()))
    start = whole.rfind(text)
    if start < 0:
        return 0, len(ids)
    first = int(np.searchsorted(ends, start, side="right")) - 1
    return first, int(np.searchsorted(ends, start + len(text), side="left"))
