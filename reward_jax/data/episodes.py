"""Episodes back to back: what was recorded, wherever it is kept.

Legend: M time steps of all episodes, E episodes, O observation width, A action width, D width of a
transition (A + O: actions first, then observations).
"""

import dataclasses
from typing import Any

import numpy as np

from common_jax.errors import InputError

__all__ = ["Episodes", "check_flags", "check_rewards", "check_rows", "transitions"]


@dataclasses.dataclass(frozen=True, eq=False)
class Episodes:
    """observations [M, O] and actions [M, A] float32; lengths [E] int, of sum M.

    Row t holds an observation and the action taken on it. about: where they come from
    (environment, goal or None, seed, dt, ...), as kept in their file; plain JSON.
    arrivals: [E] steps until the goal was reached for good, or None where that is not known.
    goals: [E, G] the goal of each episode, or None.
    rewards [M] float32, of the action of each row; terminations and truncations [M] bool, whether
    the episode ended by it, in a state without a future or for another reason (time). None where
    the source does not say.
    """

    observations: np.ndarray
    actions: np.ndarray
    lengths: np.ndarray
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrivals: np.ndarray | None = None
    goals: np.ndarray | None = None
    rewards: np.ndarray | None = None
    terminations: np.ndarray | None = None
    truncations: np.ndarray | None = None

    @property
    def starts(self) -> np.ndarray:
        """First row of each episode, [E]."""
        return np.cumsum(self.lengths) - self.lengths

    def choose(self, which: np.ndarray) -> "Episodes":
        """Those of the episodes, which [E] bool, and all that is known of them."""
        rows = np.repeat(which, self.lengths)

        def chosen(values: np.ndarray | None, which: np.ndarray) -> np.ndarray | None:
            return None if values is None else values[which]

        return Episodes(
            self.observations[rows],
            self.actions[rows],
            np.asarray(self.lengths)[which],
            self.about,
            chosen(self.arrivals, which),
            chosen(self.goals, which),
            chosen(self.rewards, rows),
            chosen(self.terminations, rows),
            chosen(self.truncations, rows),
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


def check_rewards(source: str, rewards: Any, steps: int) -> np.ndarray | None:
    """Rewards as float32 [M], None as it is; InputError naming `source` and what is wrong."""
    if rewards is None:
        return None
    values = _one_a_step(source, "rewards", rewards, steps, "iuf")
    values = values.astype(np.float32)
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
        raise InputError(
            f"{source}: rewards row {bad[0]} (from 0) is {values[bad[0]]} ({len(bad)} such values "
            "in all): mend them, or leave rewards out"
        )
    return values


def check_flags(source: str, name: str, flags: Any, steps: int) -> np.ndarray | None:
    """Flags as bool [M], None as they are; InputError likewise."""
    if flags is None:
        return None
    return _one_a_step(source, name, flags, steps, "biuf").astype(bool)


def _one_a_step(source: str, name: str, values: Any, steps: int, kinds: str) -> np.ndarray:
    values = np.asarray(values)
    if values.shape not in ((steps,), (steps, 1)) or values.dtype.kind not in kinds:
        what = "number" if name == "rewards" else "flag"
        raise InputError(
            f"{source}: {name} are {values.dtype} of shape {values.shape}; give one {what} for "
            f"each of the {steps} steps"
        )
    return values.reshape(steps)
