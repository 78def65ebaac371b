"""Recorded episodes, back to back in arrays.

Legend: M time steps of all episodes, E episodes, O observation width, A action width, G width of a
goal, D width of a transition (A + O: actions first, then observations).
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from common_jax.errors import InputError

__all__ = [
    "Episodes",
    "check_flags",
    "check_rewards",
    "check_rows",
    "same_goal",
    "transitions",
    "without_terminations",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Episodes:
    """Episodes, float32. Row t holds an observation and the action taken on it.

    lengths: time steps of each episode, of sum M. about: where the data come from (environment,
    goal or None, seed, dt, ...), as in their file; plain JSON. arrivals: steps until the goal was
    reached for good. goals: the goal of each episode. rewards: of the action of each row.
    terminations, truncations: whether the episode ended with that action, in a terminal state or
    for another reason (time). led_to: what the last action of each episode led to, an observation
    on which none was taken. None where the source does not say.
    """

    observations: Float[np.ndarray, "M O"]
    actions: Float[np.ndarray, "M A"]
    lengths: Int[np.ndarray, " E"]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrivals: Int[np.ndarray, " E"] | None = None
    goals: Float[np.ndarray, "E G"] | None = None
    rewards: Float[np.ndarray, " M"] | None = None
    terminations: Bool[np.ndarray, " M"] | None = None
    truncations: Bool[np.ndarray, " M"] | None = None
    led_to: Float[np.ndarray, "E O"] | None = None

    @property
    def starts(self) -> Int[np.ndarray, " E"]:
        """First row of each episode."""
        return np.cumsum(self.lengths) - self.lengths

    def choose(self, which: Bool[np.ndarray, " E"]) -> "Episodes":
        """Some of the episodes, with all that is known of them."""
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
            chosen(self.led_to, which),
        )

    @property
    def ends(self) -> Int[np.ndarray, " E"]:
        """The row after the last of each episode."""
        return np.cumsum(self.lengths)


def transitions(episodes: Episodes, *, actions: bool = True) -> Float[np.ndarray, "M D"]:
    """All rows, actions first; without actions the observations alone (D = O)."""
    if not actions:
        return episodes.observations
    return np.concatenate([episodes.actions, episodes.observations], axis=1)


def without_terminations(episodes: Episodes) -> Episodes:
    """The same rows, for a world without terminal states: what seems one ends no episode.

    An episode that ended in one goes on with the next, but for the last of all, which is
    truncated. Of joined episodes the goals and arrivals of the first are kept. Data without flags
    get them, all false.
    """
    flags = episodes.terminations
    if flags is None:
        none = np.zeros(len(episodes.observations), bool)
        return dataclasses.replace(episodes, terminations=none)
    if not flags.any():
        return episodes
    last = episodes.ends - 1
    ended = np.ones(len(last), bool)
    ended[:-1] = ~flags[last[:-1]]
    if episodes.truncations is not None:
        ended |= episodes.truncations[last]
    began = np.concatenate([[True], ended[:-1]])

    def chosen(values: np.ndarray | None, which: np.ndarray) -> np.ndarray | None:
        return None if values is None else values[which]

    truncations = episodes.truncations
    if truncations is not None:
        truncations = truncations.copy()
        truncations[-1] = True
    return dataclasses.replace(
        episodes,
        lengths=np.diff(episodes.ends[ended], prepend=0),
        arrivals=chosen(episodes.arrivals, began),
        goals=chosen(episodes.goals, began),
        terminations=np.zeros_like(flags),
        truncations=truncations,
        led_to=chosen(episodes.led_to, ended),
    )


def check_rows(
    source: str, observations: Any, actions: Any
) -> tuple[Float[np.ndarray, "M O"], Float[np.ndarray, "M A"]]:
    """Observations and actions as float32; raises InputError naming `source` and what is wrong.

    Wrong are: no rows, no numbers, shapes that do not match, or a value that is not finite, which
    is named by its row and column (both from 0).
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


def check_rewards(source: str, rewards: Any, steps: int) -> Float[np.ndarray, " M"] | None:
    """Rewards as float32, or None as it is; errors as `check_rows`. steps: M."""
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


def check_flags(source: str, name: str, flags: Any, steps: int) -> Bool[np.ndarray, " M"] | None:
    """Flags as bool, or None as it is; errors as `check_rows`. steps: M.

    Numbers must be 0 or 1: a NaN, as pandas writes for what is missing, would count as true.
    """
    if flags is None:
        return None
    values = _one_a_step(source, name, flags, steps, "biuf")
    if (bad := np.flatnonzero((values != 0) & (values != 1))).size:
        others = f" ({len(bad)} such values in all)" if len(bad) > 1 else ""
        raise InputError(
            f"{source}: {name} row {bad[0]} (from 0) is {values[bad[0]]}{others}: a flag is 0 or "
            "1; mend them (in pandas: fillna(False).astype(bool))"
        )
    return values.astype(bool)


def same_goal(
    a: Float[np.ndarray, "... G"], b: Float[np.ndarray, "... G"]
) -> Bool[np.ndarray, "..."]:
    """Whether goals are one: no further apart than 1e-6, or than 1e-6 of their size."""
    size = np.maximum(1, np.maximum(np.abs(a), np.abs(b)))
    return np.asarray((np.abs(a - b) <= 1e-6 * size).all(axis=-1))


def _one_a_step(
    source: str, name: str, values: Any, steps: int, kinds: str
) -> Shaped[np.ndarray, " M"]:
    values = np.asarray(values)
    if values.shape not in ((steps,), (steps, 1)) or values.dtype.kind not in kinds:
        what = "number" if name == "rewards" else "flag"
        raise InputError(
            f"{source}: {name} are {values.dtype} of shape {values.shape}; give one {what} for "
            f"each of the {steps} steps"
        )
    return values.reshape(steps)
