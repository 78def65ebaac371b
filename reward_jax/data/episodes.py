"""Episodes back to back: what was recorded, wherever it is kept.

Legend: M time steps of all episodes, E episodes, O observation width, A action width, D width of a
transition (A + O: actions first, then observations).
"""

import dataclasses
from typing import Any

import numpy as np

from common_jax.errors import InputError

__all__ = ["Episodes", "check_rows", "transitions"]


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


def transitions(episodes: Episodes, *, actions: bool = True) -> np.ndarray:
    """All rows, actions first: [M, D], D = A + O; without actions the observations, [M, O]."""
    if not actions:
        return episodes.observations
    return np.concatenate([episodes.actions, episodes.observations], axis=1)


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
        with np.errstate(over="ignore"):  # too large for float32 is not finite, as said below
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
