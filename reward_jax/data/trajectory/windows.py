"""Episodes back to back, and the windows of them that a trajectory model is trained on.

Legend: M time steps of all episodes, E episodes, O observation width, A action width, D width of a
transition (A + O: actions first, then observations), N windows, H horizon.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from common_jax.errors import InputError

if TYPE_CHECKING:
    from reward_jax.data.trajectory.normalisers import Normaliser

__all__ = ["Episodes", "Windows", "check_rows", "transitions", "windows"]


@dataclasses.dataclass(frozen=True, eq=False)
class Episodes:
    """observations [M, O] and actions [M, A] float32; lengths [E] int, of sum M.

    Row t holds an observation and the action taken on it. about: where they come from
    (environment, goal or None, seed, dt, ...), as kept in their file; plain JSON.
    arrivals: [E] steps until the goal was reached for good, or None where that is not known.
    goals: [E, G] the goal of each episode, or None.
    """

    observations: np.ndarray
    actions: np.ndarray
    lengths: np.ndarray
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrivals: np.ndarray | None = None
    goals: np.ndarray | None = None

    @property
    def starts(self) -> np.ndarray:
        """First row of each episode, [E]."""
        return np.cumsum(self.lengths) - self.lengths

    def choose(self, which: np.ndarray) -> "Episodes":
        """Those of the episodes, which [E] bool, and all that is known of them."""
        rows = np.repeat(which, self.lengths)
        known = {
            name: None if value is None else value[which]
            for name, value in (("arrivals", self.arrivals), ("goals", self.goals))
        }
        return Episodes(
            self.observations[rows],
            self.actions[rows],
            np.asarray(self.lengths)[which],
            self.about,
            **known,
        )

    @property
    def ends(self) -> np.ndarray:
        """The row after the last of each episode, [E]."""
        return np.cumsum(self.lengths)


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """An index into a series: flat [M, D] float32 (normalised), starts [N] int32.

    Window n is `flat[starts[n] + stride * arange(horizon)]`.
    """

    flat: np.ndarray
    starts: np.ndarray
    horizon: int
    stride: int = 1

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, indices: Any) -> np.ndarray:
        """The windows of these numbers, [n] -> [n, H, D]."""
        first = self.starts[np.asarray(indices)]
        return self.flat[first[..., None] + self.stride * np.arange(self.horizon)]


def transitions(episodes: Episodes, *, actions: bool = True) -> np.ndarray:
    """All rows, actions first: [M, D], D = A + O; without actions the observations, [M, O]."""
    if not actions:
        return episodes.observations
    return np.concatenate([episodes.actions, episodes.observations], axis=1)


def windows(
    episodes: Episodes,
    normaliser: "Normaliser",
    *,
    horizon: int,
    stride: int = 1,
    actions: bool = True,
    until: float | None = 1.0,
) -> Windows:
    """Windows of `horizon` rows, every `stride`-th, cut at every offset of every episode.

    Where episodes know their arrivals, windows start during the walk: at offsets 0 to
    `until * arrival` (1.0: up to the arrival itself; None: at every offset that leaves room), so
    that they hold a part of the walk and then the stay, and are not mostly a pure stay. All such
    offsets must leave room for a window, or long walks would be cut out of the data and bias it:
    InputError otherwise. Elsewhere (D4RL, Minari) a window starts wherever it fits, and episodes
    that are too short are left out; InputError where all are.
    actions: False for observations alone, with a normaliser of as many dimensions.
    """
    if horizon < 1 or stride < 1:
        raise InputError(f"horizon and stride must be 1 or more, not {horizon} and {stride}")
    rows = transitions(episodes, actions=actions)
    if np.shape(normaliser.offset) != rows.shape[1:]:
        raise InputError(
            f"the normaliser has {np.size(normaliser.offset)} dimensions, the data "
            f"{rows.shape[1]}: fit it to `transitions` with the same `actions`"
        )
    span = (horizon - 1) * stride + 1
    lengths = np.asarray(episodes.lengths)
    size = f"windows of {horizon} rows, stride {stride}, take {span} steps"
    if lengths.max() < span:
        raise InputError(
            f"{size}, but the episodes have {lengths.min()} to {lengths.max()}: lower the horizon "
            "or the stride, or record longer ones"
        )
    last = lengths - span
    if until is not None and episodes.arrivals is not None:
        wanted = np.floor(until * np.asarray(episodes.arrivals)).astype(int)
        if (short := np.flatnonzero(wanted > last)).size:
            worst = short[np.argmax((wanted - last)[short])]
            raise InputError(
                f"{size}, but episode {worst} has {lengths[worst]} and walks for "
                f"{episodes.arrivals[worst]}: record {wanted[worst] + span} steps or more, so "
                "that long walks are not left out (or lower the horizon or the stride)"
            )
        last = wanted
    counts = np.maximum(last + 1, 0)
    # Every offset 0 .. last of every episode, without a loop over episodes.
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(episodes.starts, counts) + offsets
    flat = np.asarray(normaliser.normalise(rows), np.float32)
    return Windows(flat, starts.astype(np.int32), horizon, stride)


def check_rows(source: str, observations: Any, actions: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rows as float32 [M, O] and [M, A]; InputError naming `source` and what is wrong.

    That is: empty, no numbers, shapes that do not match, or a value that is not finite, with its
    row and column (both from 0).
    """
    found = []
    for name, values in (("observations", observations), ("actions", actions)):
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise InputError(f"{source}: {name} hold {array.dtype}, not numbers")
        if array.ndim != 2 or not array.shape[1]:
            raise InputError(f"{source}: {name} have shape {array.shape}, not [steps, width]")
        if not len(array):
            raise InputError(f"{source}: {name} are empty; the data have no step")
        with np.errstate(over="ignore"):  # too large for float32 is not finite, as told below
            array = array.astype(np.float32)
        if (bad := np.argwhere(~np.isfinite(array))).size:
            row, column = bad[0]
            others = f" ({len(bad)} such values in all)" if len(bad) > 1 else ""
            raise InputError(
                f"{source}: {name} row {row}, column {column} (from 0) is "
                f"{array[row, column]}{others}: mend or remove that episode"
            )
        found.append(array)
    if len(found[0]) != len(found[1]):
        raise InputError(
            f"{source}: {len(found[0])} observations but {len(found[1])} actions; "
            "each step needs one of each"
        )
    return found[0], found[1]
