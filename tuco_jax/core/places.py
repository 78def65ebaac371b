"""Where the tokens at hand stand, for each model of the pair.

Legend: B rows, T tokens given, C wanted tokens of a row, S columns of all keys, D residual width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from tuco_jax.models.config import ModelConfig
from tuco_jax.models.layers import Positions
from tuco_jax.models.pair import Pair

__all__ = ["At", "Places", "last_column", "pick"]


class At(NamedTuple):
    """One model's positions: of the tokens given [B, T], of all keys, of those wanted [B, C].

    Where tokens attend to one another alone, `key` is `query`.
    """

    query: Positions
    key: Positions
    wanted: Positions | None


@struct.dataclass
class Places:
    """Both models' positions, whose rotary tables may differ, and the wanted columns [B, C]."""

    tuned: At
    base: At
    columns: jax.Array | None

    @classmethod
    def of(
        cls,
        pair: Pair,
        mask: jax.Array,
        columns: jax.Array | None = None,
        segments: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> "Places":
        """Of rows `mask` [B, T] that hold a prompt each, or several with `segments` [B, T].

        columns: the wanted tokens [B, C], by default each row's last real one. lengths [B]: of
        the whole rows, where these tokens are but their beginnings.
        """
        if columns is None:
            columns = last_column(mask)[:, None]

        def at(config: ModelConfig) -> At:
            query = Positions.of(config, mask, segments, lengths)
            return At(query, query, query.pick(columns))

        return cls(at(pair.tuned_config), at(pair.base_config), columns)

    @classmethod
    def after(
        cls,
        pair: Pair,
        before: Positions,
        index: jax.Array,
        mask: jax.Array,
        *,
        columns: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> "Places":
        """Of tokens at positions `index`, `mask` [B, T] that attend to columns `before`, too.

        before: index and mask [B, S] of what a cache holds; the tokens' own columns are among
        them, or, where `before` has a row for all (a shared prefix, [1, P]), behind them.
        lengths [B]: of the rows by now. columns [B, C]: of wanted tokens, or None.
        """
        rows = mask.shape[0]
        if lengths is None:
            lengths = index.max(axis=1) + 1
        key = before
        if before.index.shape[0] == 1:

            def joined(earlier: jax.Array, own: jax.Array) -> jax.Array:
                earlier = jnp.broadcast_to(earlier, (rows, earlier.shape[1]))
                return jnp.concatenate([earlier, own], axis=1)

            key_index, key_mask = joined(before.index, index), joined(before.mask, mask)
            key = Positions(key_index, key_mask, None, None, None)

        def at(config: ModelConfig) -> At:
            query = Positions.at(config, index, mask, None, lengths)
            return At(query, key, None if columns is None else query.pick(columns))

        return cls(at(pair.tuned_config), at(pair.base_config), columns)


def last_column(mask: jax.Array) -> jax.Array:
    """Column of each row's last real token, [B] int; padding may stand on either side."""
    return mask.shape[1] - 1 - jnp.argmax(mask.astype(bool)[:, ::-1], axis=1)


def pick(x: jax.Array, columns: jax.Array) -> jax.Array:
    """Tokens [B, C, D] of x [B, T, D] at `columns` [B, C]."""
    return jnp.take_along_axis(x, columns[:, :, None], axis=1)
