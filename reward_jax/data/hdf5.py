"""D4RL's HDF5 layout: flat arrays of steps, and flags at the last step of each episode.

    observations [M, O]  actions [M, A]  rewards, terminals, timeouts [M]  infos/goal [M, G]

What that layout has no place for stands under `metadata/`, which D4RL's and Diffuser's readers
ignore: about and run (JSON; run: settings, revision and command that made the file), lengths and
arrivals [E], led_to [E, O]. Rewards or terminals that are not known are left out, and not written
as zeros.

Legend: M steps, E episodes; O, A, G: widths of observations, actions and goals.
"""

import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from common_jax import extras
from common_jax.errors import InputError
from common_jax.io.files import atomic, parse_json, writing
from reward_jax.data.episodes import (
    Episodes,
    check_flags,
    check_rewards,
    check_rows,
    same_goal,
)
from reward_jax.data.storage import check_link, check_stored

__all__ = ["EpisodeEnds", "read", "write"]

EpisodeEnds = Literal["auto", "marks", "goal", "none"]
_NOTES = ("about", "arrivals", "led_to", "lengths")
_STEPS = ("observations", "actions", "rewards", "terminals", "timeouts", "infos/goal")


def read(path: str | pathlib.Path, *, ends: str = "auto") -> Episodes:
    """Episodes of a file in D4RL's layout; raises InputError naming the file and what is wrong.

    ends: where episodes end. "marks": where `terminals` or `timeouts` say so; "goal": where
    `infos/goal` changes; "none": nowhere, the file is one episode; "auto": at the marks, and at
    the changes of the goal where nothing is marked; as they were, in a file that `write` made.
    Steps after the last are an episode, too.

    Some of D4RL's files are one stream of ways to ever new goals: `terminals` are all false, and
    `timeouts` mark where a goal was reached (D4RL issue 85); files from its generation script may
    lack timeouts. Most of these ways are shorter than a window of 256 steps: ends="none" allows
    such windows. (Diffuser cuts where the stream leaves the surroundings of the task's own goal.)
    Positions are as the file has them: D4RL counts cells from a corner, not metres from the
    middle.
    """
    with extras.named():
        import h5py

    path = pathlib.Path(path)
    if ends not in get_args(EpisodeEnds):
        raise InputError(f"ends is one of {', '.join(get_args(EpisodeEnds))}, not {ends!r}")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; give an HDF5 file in D4RL's layout")
    try:
        with h5py.File(path, "r") as file:
            arrays = {name: _array(path, file, name) for name in _STEPS}
            notes = {n: _array(path, file, f"metadata/{n}") for n in _NOTES}
    # h5py raises one of them for what is no HDF5 file, is damaged, or points at nothing.
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, MemoryError) as error:
        raise InputError(
            f"{path}: cannot be read as HDF5 ({_first_line(error)}); fetch or write it anew"
        ) from None
    for name in ("observations", "actions"):
        if arrays[name] is None:
            raise InputError(f"{path}: has no {name!r}, which D4RL's layout asks for")
    observations, actions = check_rows(str(path), arrays["observations"], arrays["actions"])
    steps = len(observations)
    rewards = check_rewards(str(path), arrays["rewards"], steps)
    terminations, truncations = (
        check_flags(str(path), name, arrays[name], steps) for name in ("terminals", "timeouts")
    )
    goal = _goal_rows(path, arrays["infos/goal"], steps)
    if ends == "auto" and notes["lengths"] is not None:
        lengths = _stored_lengths(path, notes["lengths"], steps)
    else:
        lengths = _lengths(path, terminations, truncations, goal, steps, ends)
    goals, about = _goals(goal, lengths), notes["about"]
    led_to = notes["led_to"] if ends == "auto" else None  # cut otherwise, it has no place
    return Episodes(
        observations=observations,
        actions=actions,
        lengths=lengths,
        about=_about(path, about) if about is not None else {"goal": _only(goals)},
        arrivals=_arrivals(path, notes["arrivals"], lengths),
        goals=goals,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        led_to=_led_to(path, led_to, (len(lengths), observations.shape[1])),
    )


def write(
    path: str | pathlib.Path, episodes: Episodes, *, run: Mapping[str, Any] | None = None
) -> None:
    """Write D4RL's layout; the file appears whole or not at all.

    `read` gives the same episodes, but for truncations: `timeouts` are these and the last step
    of each episode that no termination marks, so that D4RL's readers find the same episodes.
    run: what made them, stored, too; plain JSON.
    """
    with extras.named():
        import h5py

    path = pathlib.Path(path)
    lengths = np.asarray(episodes.lengths)
    steps = len(episodes.observations)
    if lengths.sum() != steps or (lengths < 1).any():
        raise ValueError(f"lengths must be 1 or more, of sum {steps}: {lengths}")
    for name in ("actions", "rewards", "terminations", "truncations"):
        values = getattr(episodes, name)
        if values is not None and len(values) != steps:
            raise ValueError(f"{len(values)} {name} for {steps} observations")
    last = episodes.ends - 1
    timeouts = np.zeros(steps, bool) if episodes.truncations is None else episodes.truncations
    timeouts = np.array(timeouts, bool)
    timeouts[last] |= True if episodes.terminations is None else ~episodes.terminations[last]
    arrays = {
        "observations": episodes.observations,
        "actions": episodes.actions,
        "timeouts": timeouts,
        "metadata/lengths": lengths.astype(np.int64),
    }
    if episodes.rewards is not None:
        arrays["rewards"] = np.asarray(episodes.rewards, np.float32)
    if episodes.terminations is not None:
        arrays["terminals"] = np.asarray(episodes.terminations, bool)
    if episodes.goals is not None:
        arrays["infos/goal"] = np.repeat(np.asarray(episodes.goals, np.float32), lengths, axis=0)
    if episodes.arrivals is not None:
        arrays["metadata/arrivals"] = np.asarray(episodes.arrivals, np.int64)
    if episodes.led_to is not None:
        arrays["metadata/led_to"] = np.asarray(episodes.led_to, np.float32)
    notes = {"about": json.dumps(episodes.about)}
    if run is not None:
        notes["run"] = json.dumps(run)
    memory = io.BytesIO()  # where a disk is full, HDF5's library may end the process by signal 11
    with h5py.File(memory, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip", shuffle=True)
        for name, text in notes.items():
            file[f"metadata/{name}"] = text
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    atomic(path, lambda temporary: temporary.write_bytes(memory.getbuffer()))


def _array(path: pathlib.Path, file: Any, name: str) -> Shaped[np.ndarray, "..."] | None:
    """A data set's values (of a text: its bytes), or None where the file has none of this name."""
    import h5py

    if not check_link(str(path), file, name):
        return None
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{path}: {name!r} is a group, not a data set as in D4RL's layout")
    check_stored(str(path), name, dataset)
    return np.asarray(dataset[()])


def _stored_lengths(path: pathlib.Path, stored: np.ndarray, steps: int) -> Int[np.ndarray, " E"]:
    whole = stored.ndim == 1 and stored.dtype.kind in "iu"
    # Each is compared, too, for a sum may wrap around.
    if not whole or (stored < 1).any() or (stored > steps).any() or stored.sum() != steps:
        raise InputError(
            f"{path}: metadata/lengths are no numbers of steps of sum {steps}; mend them, or "
            "leave them out"
        )
    return stored.astype(np.int64)


def _lengths(
    path: pathlib.Path,
    terminations: Bool[np.ndarray, " M"] | None,
    truncations: Bool[np.ndarray, " M"] | None,
    goal: Float[np.ndarray, "M G"] | None,
    steps: int,
    ends: str,
) -> Int[np.ndarray, " E"]:
    """Lengths of episodes."""
    marks = np.zeros(steps, bool)
    for flags in (terminations, truncations):
        marks |= False if flags is None else flags
    if ends == "auto" and truncations is None and goal is None:
        raise InputError(
            f"{path}: has neither 'timeouts' nor 'infos/goal', so where episodes end is unknown; "
            "add timeouts, true at the last step of each episode (or read it with ends='marks' "
            "or 'none')"
        )
    if ends == "goal" and goal is None:
        raise InputError(f"{path}: has no 'infos/goal' to cut episodes by; use ends='auto'")
    last = np.zeros(steps, bool)
    if ends == "marks" or (ends == "auto" and marks.any()):
        last = marks
    elif ends != "none" and goal is not None:
        last[:-1] = ~same_goal(goal[1:], goal[:-1])
    last[-1] = True
    return np.diff(np.flatnonzero(last), prepend=-1)


def _goal_rows(path: pathlib.Path, goal: Any, steps: int) -> Float[np.ndarray, "M G"] | None:
    """The goal at each step, or None."""
    if goal is None:
        return None
    if goal.ndim != 2 or len(goal) != steps or goal.dtype.kind not in "iuf":
        raise InputError(
            f"{path}: infos/goal is {goal.dtype} of shape {goal.shape}; give a goal for each of "
            f"the {steps} steps, or leave it out"
        )
    if (bad := np.argwhere(~np.isfinite(goal))).size:
        row, column = bad[0]
        raise InputError(
            f"{path}: infos/goal row {row}, column {column} (from 0) is {goal[row, column]}; "
            "mend it, or leave infos/goal out"
        )
    return goal.astype(np.float32)


def _goals(
    goal: Float[np.ndarray, "M G"] | None, lengths: Int[np.ndarray, " E"]
) -> Float[np.ndarray, "E G"] | None:
    """Goals of episodes; None where an episode has no goal, or several."""
    if goal is None:
        return None
    goals = goal[np.cumsum(lengths) - lengths]
    return goals if same_goal(goal, np.repeat(goals, lengths, axis=0)).all() else None


def _only(goals: Float[np.ndarray, "E G"] | None) -> list[float] | None:
    """The goal that all episodes share, or None."""
    shared = goals is not None and same_goal(goals, goals[:1]).all()
    return goals[0].tolist() if goals is not None and shared else None


def _arrivals(
    path: pathlib.Path, stored: Any, lengths: Int[np.ndarray, " E"]
) -> Int[np.ndarray, " E"] | None:
    if stored is None:
        return None
    sound = stored.shape == lengths.shape and stored.dtype.kind in "iu"
    if not sound or (stored < 0).any() or (stored > 2**31).any():
        raise InputError(
            f"{path}: metadata/arrivals is {stored.dtype} of shape {stored.shape}; give a number "
            f"of steps for each of the {len(lengths)} episodes, or leave it out"
        )
    return stored.astype(np.int64)


def _led_to(
    path: pathlib.Path, stored: Any, shape: tuple[int, int]
) -> Float[np.ndarray, "E O"] | None:
    if stored is None:
        return None
    if stored.shape != shape or stored.dtype.kind != "f" or not np.isfinite(stored).all():
        raise InputError(
            f"{path}: metadata/led_to is {stored.dtype} of shape {stored.shape}; give an "
            f"observation for each episode, {list(shape)}, or leave it out"
        )
    return stored.astype(np.float32)


def _about(path: pathlib.Path, stored: Any) -> dict[str, Any]:
    try:
        about = parse_json(stored.item())
    except (TypeError, ValueError):
        about = None
    if not isinstance(about, dict):
        raise InputError(f"{path}: metadata/about is no JSON object; mend it, or leave it out")
    return about


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
