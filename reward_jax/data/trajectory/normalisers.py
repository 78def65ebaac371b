"""Per-dimension scaling of transitions, kept with a model: what it was trained on is normalised.

Legend: M rows, D width.
"""

from typing import Any

import numpy as np
from flax import struct

from common_jax.errors import InputError

__all__ = ["Normaliser", "gaussian", "limits", "on_last"]


@struct.dataclass
class Normaliser:
    """Affine on the last axis; numpy and jax arrays alike. offset, scale: [D], scale > 0.

    kind: "limits" (what it was fitted to lies in -1..1) or "gaussian" (mean 0, deviation 1).
    """

    offset: Any
    scale: Any
    kind: str = struct.field(pytree_node=False, default="limits")

    def normalise(self, x: Any) -> Any:
        """What a model sees of rows [..., D] in their own units."""
        return (x - on_last(self.offset, x)) / on_last(self.scale, x)

    def restore(self, z: Any) -> Any:
        """Rows [..., D] in their own units again."""
        return z * on_last(self.scale, z) + on_last(self.offset, z)

    def part(self, dimensions: Any) -> "Normaliser":
        """Of some dimensions alone (a slice or a list): `part(slice(2, 4))` of a position."""
        return Normaliser(self.offset[dimensions], self.scale[dimensions], self.kind)

    def to(self, other: "Normaliser") -> "Normaliser":
        """From what this one makes of a row to what `other` makes of it.

        `a.to(b).normalise(a.normalise(x)) == b.normalise(x)`; a score with respect to a's rows is
        one with respect to b's, divided by `a.to(b).scale`.
        """
        return Normaliser(
            offset=(other.offset - self.offset) / self.scale,
            scale=other.scale / self.scale,
            kind=other.kind,
        )

    def same_as(self, other: "Normaliser") -> bool:
        """Equal to rounding."""
        offsets = np.allclose(self.offset, other.offset, rtol=0, atol=1e-6)
        return offsets and np.allclose(self.scale, other.scale, 1e-6)


def on_last(values: Any, x: Any) -> Any:
    """Values [D] with the axes that they lack of x [..., D]: numpy and jax arrays alike."""
    return values.reshape((1,) * (np.ndim(x) - 1) + values.shape)


def limits(rows: Any) -> Normaliser:
    """Smallest and largest value of each dimension of [M, D] to -1 and 1; a constant one to 0."""
    rows = _checked(rows)
    low, high = rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64)
    return _normaliser((low + high) / 2, (high - low) / 2, "limits")


def gaussian(rows: Any) -> Normaliser:
    """Each dimension of [M, D] to mean 0 and deviation 1; a constant one to 0."""
    rows = _checked(rows)
    mean, deviation = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    # Rounding alone gives a constant dimension a tiny deviation.
    constant = rows.min(axis=0) == rows.max(axis=0)
    return _normaliser(mean, np.where(constant, 0.0, deviation), "gaussian")


def _checked(rows: Any) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 2 or not len(rows):
        raise InputError(f"a normaliser is fitted to rows [M, D], not to shape {rows.shape}")
    return rows


def _normaliser(offset: np.ndarray, scale: np.ndarray, kind: str) -> Normaliser:
    scale = np.where(scale > 0, scale, 1.0)
    return Normaliser(offset.astype(np.float32), scale.astype(np.float32), kind)
