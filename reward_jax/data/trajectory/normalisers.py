"""Per-dimension scaling of transitions, stored with the model that was trained on scaled ones.

Legend: M rows, D width.
"""

from typing import Any, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float

from common_jax import struct
from common_jax.errors import InputError

__all__ = ["KINDS", "Normaliser", "gaussian", "limits", "on_last"]

KINDS = ("limits", "gaussian")

Rows = TypeVar("Rows", Float[np.ndarray, "... D"], Float[Array, "... D"])  # numpy's, or jax's
Values = Float[np.ndarray, " D"] | Float[Array, " D"]


@struct.dataclass
class Normaliser:
    """Affine on the last axis: z = (x - offset) / scale, scale above 0.

    kind: "limits" (the rows that it was fitted to lie in -1 .. 1) or "gaussian" (they have mean 0
    and standard deviation 1).
    """

    offset: Float[np.ndarray, " D"] | Float[Array, " D"]
    scale: Float[np.ndarray, " D"] | Float[Array, " D"]
    kind: str = struct.field(pytree_node=False, default="limits")

    def normalise(self, x: Rows) -> Rows:
        """Rows in their own units as a model sees them."""
        return (x - on_last(self.offset, x)) / on_last(self.scale, x)

    def restore(self, z: Rows) -> Rows:
        """Rows in their own units again."""
        return z * on_last(self.scale, z) + on_last(self.offset, z)

    def part(self, dimensions: slice | list[int]) -> "Normaliser":
        """The normaliser of some dimensions alone, by a slice or a list."""
        return Normaliser(self.offset[dimensions], self.scale[dimensions], self.kind)

    def to(self, other: "Normaliser") -> "Normaliser":
        """The map from rows normalised by this one to rows normalised by `other`.

        `a.to(b).normalise(a.normalise(x)) == b.normalise(x)`; a score with respect to a's rows is
        one with respect to b's, divided by `a.to(b).scale`.
        """
        return Normaliser(
            offset=(other.offset - self.offset) / self.scale,
            scale=other.scale / self.scale,
            kind=other.kind,
        )

    def same_as(self, other: "Normaliser") -> bool:
        """Whether both are equal, up to rounding: 1e-6 of a scale, or of an offset."""
        a, b, x, y = (
            np.asarray(values, np.float64)
            for values in (self.scale, other.scale, self.offset, other.offset)
        )
        near = np.abs(x - y) <= 1e-6 * (a + np.abs(x))
        return a.shape == b.shape and bool((near & (np.abs(a - b) <= 1e-6 * a)).all())


def on_last(values: Values, x: Float[np.ndarray, "... D"] | Float[Array, "... D"]) -> Any:
    """Values with as many axes as x."""
    return values.reshape((1,) * (np.ndim(x) - 1) + values.shape)


def limits(rows: Float[np.ndarray, "M D"]) -> Normaliser:
    """Smallest and largest value of each dimension to -1 and 1; a constant dimension to 0.

    Where float32 has not the middle of the two (large values close to each other), to what lies
    within: -1 and 1 are not left.
    """
    rows = _checked(rows)
    low, high = rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64)
    middle, half = (low + high) / 2, (high - low) / 2
    rounded, coarse = _rounded(middle, half)
    reach = np.maximum(high - rounded, rounded - low)
    return _normaliser(middle, np.where(coarse, reach, half), "limits")


def gaussian(rows: Float[np.ndarray, "M D"]) -> Normaliser:
    """Each dimension to mean 0 and standard deviation 1; a constant dimension to 0.

    Where float32 has not the mean (large values close to each other), to a mean square of 1.
    """
    rows = _checked(rows)
    mean, deviation = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    rounded, coarse = _rounded(mean, deviation)
    deviation = np.where(coarse, np.hypot(deviation, rounded - mean), deviation)
    # Rounding alone gives a constant dimension a tiny deviation.
    constant = rows.min(axis=0) == rows.max(axis=0)
    return _normaliser(mean, np.where(constant, 0.0, deviation), "gaussian")


def _rounded(
    offset: Float[np.ndarray, " D"], scale: Float[np.ndarray, " D"]
) -> tuple[Float[np.ndarray, " D"], Bool[np.ndarray, " D"]]:
    """Offsets as float32 has them, and whether that is too far from them for the scale."""
    rounded = offset.astype(np.float32).astype(np.float64)
    return rounded, np.abs(rounded - offset) > 1e-6 * scale


def _checked(rows: Float[np.ndarray, "M D"]) -> Float[np.ndarray, "M D"]:
    rows = np.asarray(rows)
    if rows.ndim != 2 or not len(rows):
        raise InputError(f"a normaliser is fitted to rows [M, D], not to shape {rows.shape}")
    with np.errstate(over="ignore"):
        fine = np.isfinite(np.asarray(rows, np.float32)).all(axis=0)
    if not fine.all():
        raise InputError(
            f"a normaliser is fitted to rows that float32 holds: dimension {int(fine.argmin())} "
            "has NaN, infinity or more than 3.4e38; leave such rows out"
        )
    return rows


def _normaliser(
    offset: Float[np.ndarray, " D"], scale: Float[np.ndarray, " D"], kind: str
) -> Normaliser:
    # Below float32's least normal number 1 / scale is infinite, or scale itself 0.
    scale = np.where(scale > 2 * np.finfo(np.float32).tiny, scale, 1.0)
    return Normaliser(offset.astype(np.float32), scale.astype(np.float32), kind)
