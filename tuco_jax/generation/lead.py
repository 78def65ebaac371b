"""What prompts of a batch begin with in common: read once, before the rest of each.

Legend: N prompts, n tokens of one, B rows, P tokens of what follows, padded; G beginnings, M
tokens of one, padded.
"""

from collections.abc import Hashable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from common_jax import struct
from tuco_jax.prompts.batching import Batch, bucket_length, pad
from tuco_jax.prompts.prefixes import GAIN, groups_of

__all__ = ["Lead", "led"]


@struct.dataclass
class Lead:
    """The beginnings of a batch's prompts, to whose caches their columns are copied.

    tokens, mask: the beginnings. totals: length of a prompt that begins so. rows: that prompt's.
    follows: the beginning of each row. seen: True at the columns that it begins with, from the
    first on, or none.
    """

    tokens: Int[Array, "G M"]
    mask: Bool[Array, "G M"]
    totals: Int[Array, " G"]
    rows: Int[Array, " G"]
    follows: Int[Array, " B"]
    seen: Bool[Array, "B M"]


def led(
    prompts: Sequence[Int[np.ndarray, " n"]], size: int, kinds: Sequence[Hashable]
) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"], Lead | None]:
    """Tokens and mask of what follows a lead, and the lead; or of all, and None.

    The lead is left out where it would not spare a tenth of the tokens. size: B. kinds: as of
    `groups_of`. The first row is repeated up to B.
    """

    def padded(starts: Sequence[int]) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
        rest = [row[start:] for row, start in zip(prompts, starts, strict=True)]
        longest = bucket_length(max(row.size for row in rest))
        return pad(rest, Batch(tuple(range(len(rest))), size, longest))

    whole = padded([0] * len(prompts))
    groups = groups_of(prompts, kinds)
    if not groups:
        return *whole, None
    starts, follows = np.zeros((2, size), np.int32)
    for number, group in enumerate(groups):
        starts[list(group.prompts)], follows[list(group.prompts)] = group.starts, number
    rest = padded(starts[: len(prompts)].tolist())
    shape = Batch(
        tuple(group.trunk for group in groups),
        1 << (len(groups) - 1).bit_length(),
        bucket_length(groups[0].length),
    )
    if shape.size * shape.length + rest[0].size > GAIN * whole[0].size:
        return *whole, None
    beginnings = {group.trunk: prompts[group.trunk][: group.length] for group in groups}
    tokens, mask = pad(beginnings, shape)  # pyright: ignore[reportArgumentType]
    rows = np.asarray(shape.rows + shape.rows[:1] * (shape.size - len(groups)))
    totals = np.asarray([prompts[i].size for i in rows], np.int32)
    starts[len(prompts) :], follows[len(prompts) :] = starts[0], follows[0]
    seen = np.arange(shape.length) < starts[:, None]
    return *rest, Lead(*map(jnp.asarray, (tokens, mask, totals, rows, follows, seen)))
