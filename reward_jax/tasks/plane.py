"""The plane of a world, and heat maps of a reward in it (the paper's maps).

Windows of the base's trajectories are scored at t = 0 (without noise), scores are winsorised at
0.5% in each tail, scaled to 0 .. 1, and averaged in bins of the positions that windows visit.
Legend: N windows, W steps of a window, O observation width, B paths of H steps.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError

__all__ = [
    "BinsOption",
    "HeatMap",
    "MapOptions",
    "Peak",
    "Plane",
    "draw_map",
    "draw_paths",
    "heat_map",
    "read_point",
]

TAIL = 0.005  # share of scores that is winsorised in each tail
LEAST = 5  # positions that a bin needs, or it is left blank


class Plane(abc.ABC):
    """Where the positions of a world lie.

    extent: left, right, bottom, top. cell: the length that `bins` divide. unit: of all lengths.
    place: a word for what two points share that are at one place.
    """

    extent: tuple[float, float, float, float]
    cell: float = 1.0
    unit: str = "m"
    place: str = "place"

    @abc.abstractmethod
    def positions(self, observations: Float[np.ndarray, "... O"]) -> Float[np.ndarray, "... 2"]:
        """Positions of observations."""

    @abc.abstractmethod
    def same_place(self, a: Float[np.ndarray, "2"], b: Float[np.ndarray, "2"]) -> bool:
        """Whether two points [2] are at one place, such as a peak and the goal."""

    @abc.abstractmethod
    def draw(self, axes: Any) -> None:
        """Draw walls or obstacles on matplotlib's axes."""

    def heat_map(
        self,
        observations: Float[np.ndarray, "N W O"],
        scores: Float[np.ndarray, " N"],
        *,
        bins: int,
    ) -> "HeatMap":
        """The map of windows with their scores; `bins` along the side of a cell."""
        places = self.positions(observations)
        return heat_map(places, scores, self.extent, bins=bins, cell=self.cell)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinsOption:
    """How fine a heat map is.

    Args:
        bins: of the map, to the side of a cell of the task's plane.
    """

    bins: PositiveInt = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapOptions(BinsOption):
    """What a heat map is made of.

    Args:
        windows: trajectories that are scored.
    """

    windows: PositiveInt = 10000


@dataclasses.dataclass(frozen=True)
class HeatMap:
    """Mean scaled score of each bin; row 0 at the bottom.

    values: NaN where fewer than 5 positions fell. counts: positions in each bin. extent: left,
    right, bottom, top.
    """

    values: Float[np.ndarray, "rows columns"]
    counts: Int[np.ndarray, "rows columns"]
    extent: tuple[float, float, float, float]

    @property
    def peak(self) -> Float[np.ndarray, "2"]:
        """Centre of the bin of the highest mean."""
        row, column = np.unravel_index(np.nanargmax(self.values), self.values.shape)
        left, right, bottom, top = self.extent
        rows, columns = self.values.shape
        x = left + (column + 0.5) * (right - left) / columns
        return np.array([x, bottom + (row + 0.5) * (top - bottom) / rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Peak:
    """Where a map is highest, and the goal; at_goal: whether these are at one place."""

    at: Float[np.ndarray, "2"]
    goal: Float[np.ndarray, "2"]
    distance: float
    at_goal: bool
    unit: str
    place: str

    @classmethod
    def of(cls, found: HeatMap, plane: Plane, goal: Any) -> "Peak":
        """The peak of a map of `plane`."""
        at, goal = found.peak, np.asarray(goal, np.float64)
        distance = float(np.linalg.norm(at - goal))
        return cls(at, goal, distance, plane.same_place(at, goal), plane.unit, plane.place)

    def __str__(self) -> str:
        (x, y), (gx, gy) = self.at, self.goal
        where = f"the same {self.place}" if self.at_goal else f"another {self.place}"
        return (
            f"peak at ({x:.2f}, {y:.2f}), goal at ({gx:.2f}, {gy:.2f}): {self.distance:.2f} "
            f"{self.unit} apart, {where}"
        )


def heat_map(
    positions: Float[np.ndarray, "N W 2"],
    scores: Float[np.ndarray, " N"],
    extent: tuple[float, float, float, float],
    *,
    bins: int,
    cell: float = 1.0,
) -> HeatMap:
    """The map of windows by their positions and scores; `bins` along the side of a cell.

    Raises InputError where no bin holds 5 positions.
    """
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


def draw_paths(axes: Any, paths: Float[np.ndarray, "B H 2"], *, goal: Any, color: str) -> None:
    """Paths on matplotlib's axes: lines, a dot where each ends, a star for the goal."""
    axes.plot(*paths.transpose(2, 1, 0), color=color, lw=0.8, alpha=0.45)
    axes.plot(*paths[:, -1].T, ".", color="#1b2026", ms=4)
    axes.plot(*goal, "*", color="#d55e00", mec="white", ms=14)


def read_point(given: Any, listed: Sequence[Any]) -> list[float]:
    """A goal in a plane: a number in `listed`, from 0, or its own x and y ("x,y", or [x, y]).

    Raises InputError that says what to give for anything else.
    """
    if given is None:
        raise InputError("the reward's data had no goal; give one with --goal [x, y]")
    parts = given.strip("[]() ").split(",") if isinstance(given, str) else given
    try:
        numbers = [float(part) for part in np.atleast_1d(parts)]
    except ValueError:
        numbers = []
    if len(numbers) == 2:
        return numbers
    if len(numbers) == 1 and numbers[0] in range(len(listed)):
        return list(listed[int(numbers[0])])
    raise InputError(f"goal {given!r}: give 0 to {len(listed) - 1}, or x,y in metres")
