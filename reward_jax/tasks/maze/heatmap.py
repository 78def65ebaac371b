"""Where a reward is high: averages over the places that trajectories visit (the paper's maps).

Windows of the base's trajectories are scored at t = 0 (nothing is noised), scores are winsorised
at 0.5% a tail and scaled to 0 .. 1, and averaged in bins of the positions that windows visit.
Legend: N windows, W steps of a window, P bins of a map.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common_jax.errors import InputError
from common_jax.mesh import constrain

__all__ = ["HeatMap", "draw_map", "heat_map", "score_windows"]

TAIL = 0.005  # winsorised at each end
LEAST = 5  # visits that a bin needs, or it is left blank


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """values: [rows, columns], NaN where fewer than 5 positions fell; row 0 at the bottom.

    extent: left, right, bottom, top; metres. counts: positions in each bin.
    """

    values: np.ndarray
    counts: np.ndarray
    extent: tuple[float, float, float, float]

    @property
    def peak(self) -> np.ndarray:
        """Centre of the bin of the highest average, [2] metres."""
        row, column = np.unravel_index(np.nanargmax(self.values), self.values.shape)
        left, right, bottom, top = self.extent
        rows, columns = self.values.shape
        x = left + (column + 0.5) * (right - left) / columns
        return np.array([x, bottom + (row + 0.5) * (top - bottom) / rows])


def score_windows(
    guide: Any, x_0: Any, *, t: int = 0, batch: int = 4096, mesh: Mesh | None = None
) -> np.ndarray:
    """The guide's reward of clean trajectories [N, ...] at t, [N].

    batch: scored in one call. mesh: batches are cut over its data and fsdp axes.
    """
    parts = []
    for start in range(0, len(x_0), batch):
        rows = jnp.asarray(x_0[start : start + batch])
        missing = min(batch, len(x_0)) - len(rows)  # one shape, one program
        padded = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        parts.append(np.asarray(_score(guide, padded, t, mesh=mesh))[: len(rows)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames="mesh")
def _score(guide: Any, x: jax.Array, t: int, *, mesh: Mesh | None) -> jax.Array:
    x = constrain(x, mesh)
    return guide(x, jnp.full(x.shape[:1], t))


def heat_map(
    positions: np.ndarray,
    scores: np.ndarray,
    extent: tuple[float, float, float, float],
    *,
    bins: int,
    cell: float = 1.0,
) -> HeatMap:
    """Positions [N, W, 2] metres and scores [N] of windows; `bins` to the side of a cell."""
    low, high = np.quantile(scores, [TAIL, 1 - TAIL])
    scaled = (np.clip(scores, low, high) - low) / max(high - low, np.finfo(np.float32).tiny)
    left, right, bottom, top = extent
    shape = [round((b - a) / cell * bins) for a, b in ((bottom, top), (left, right))]
    column = ((positions[..., 0] - left) * bins / cell).astype(int).clip(0, shape[1] - 1)
    row = ((positions[..., 1] - bottom) * bins / cell).astype(int).clip(0, shape[0] - 1)
    index = (row * shape[1] + column).ravel()
    weights = np.broadcast_to(scaled[:, None], row.shape).ravel()
    counts = np.bincount(index, minlength=shape[0] * shape[1])
    sums = np.bincount(index, weights, minlength=counts.size)
    if not (counts >= LEAST).any():
        raise InputError(
            f"no bin of the map holds {LEAST} positions: take more windows, or fewer bins"
        )
    values = np.where(counts >= LEAST, sums / np.maximum(counts, 1), np.nan)
    return HeatMap(values.reshape(shape), counts.reshape(shape), extent)


def draw_map(axes: Any, found: HeatMap, *, goal: Any = None, peak: bool = True) -> Any:
    """The map on matplotlib's axes, with its peak and the goal; returns the image."""
    image = axes.imshow(
        found.values, origin="lower", extent=found.extent, cmap="viridis", interpolation="nearest"
    )
    if peak:
        axes.plot(*found.peak, "o", mfc="none", mec="white", mew=2, ms=13, label="peak")
    if goal is not None:
        axes.plot(*goal, "*", color="#d55e00", mec="white", ms=13, label="goal")
    return image
