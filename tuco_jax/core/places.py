"""Positions of the tokens of a step, for each model of the pair.

Legend: B rows, T tokens of a step, C selected tokens of a row, S columns of all keys, P tokens of
a shared prefix, D residual width.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from common_jax import struct
from tuco_jax.core.cache import Cache
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import EVERY, Positions

__all__ = ["ModelPlaces", "Places", "last_column", "pick"]


class ModelPlaces(NamedTuple):
    """One model's positions: of the step's tokens, of all keys, and of the selected tokens.

    query: [B, T]. key: [B, S], or `query` itself where tokens attend to one another alone.
    selected: [B, C].
    """

    query: Positions
    key: Positions
    selected: Positions | None


@struct.dataclass
class Places:
    """Both models' positions, whose rotary tables may differ, and the selected columns."""

    tuned: ModelPlaces
    base: ModelPlaces
    columns: Int[Array, "B C"] | None

    @classmethod
    def of(
        cls,
        pair: Pair,
        mask: Shaped[Array, "B T"],
        columns: Int[Array, "B C"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | None = None,
    ) -> "Places":
        """Places in rows that hold a prompt each, or several with `segments`.

        mask: True at real tokens. columns: of the selected tokens; by default each row's last
        real one. lengths: of the whole rows, where only their first tokens are given.
        """
        if columns is None:
            columns = last_column(mask)[:, None]

        def at(config: ModelConfig) -> ModelPlaces:
            query = Positions.of(config, mask, segments, lengths)
            return ModelPlaces(query, query, query.pick(columns))

        return cls(at(pair.tuned_config), at(pair.base_config), columns)

    @classmethod
    def after(
        cls,
        pair: Pair,
        cache: Cache,
        index: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        *,
        columns: Int[Array, "B C"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        starts: Int[Array, "B T"] | None = None,
        lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
    ) -> "Places":
        """Places of tokens that attend to earlier columns, too.

        cache: with a column for each of the tokens; or a shared prefix, which their own columns
        follow. Its keys and values are not looked at. index: the tokens' positions. segments:
        prompts that follow a shared prefix, each for itself. starts: how many of the prefix's
        tokens each one's prompt follows, and sees. lengths: of the rows (or segments) by now.
        columns: of selected tokens, or None.
        """
        rows = mask.shape[0]
        if lengths is None:
            lengths = index.max(axis=1) + 1
        key = cache.at
        if cache.shared:

            def joined(
                earlier: Shaped[Array, "_ P"], own: Shaped[Array, "B T"]
            ) -> Shaped[Array, "B S"]:
                earlier = jnp.broadcast_to(earlier, (rows, earlier.shape[1]))
                return jnp.concatenate([earlier, own], axis=1)

            key_index, key_mask = joined(key.index, index), joined(key.mask, mask)
            of = None
            if segments is not None:
                of = joined(jnp.full_like(key.index, EVERY), segments)
            key = Positions(key_index, key_mask, of, None, None)

        def at(config: ModelConfig) -> ModelPlaces:
            query = Positions.at(config, index, mask, segments, lengths)
            query = dataclasses.replace(query, start=starts)
            return ModelPlaces(query, key, None if columns is None else query.pick(columns))

        return cls(at(pair.tuned_config), at(pair.base_config), columns)


def last_column(mask: Shaped[Array, "B T"]) -> Int[Array, " B"]:
    """Column of each row's last real token; padding may stand on either side."""
    return mask.shape[1] - 1 - jnp.argmax(mask.astype(bool)[:, ::-1], axis=1)


def pick(x: Float[Array, "B T D"], columns: Int[Array, "B C"]) -> Float[Array, "B C D"]:
    """The tokens of x at `columns`."""
    return jnp.take_along_axis(x, columns[:, :, None], axis=1)
