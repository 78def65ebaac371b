"""Minari datasets, read through its own package and from this machine only.

Legend: T steps of an episode, O observation width, A action width, G width of a goal.
"""

import functools
import pathlib
import re
from typing import Any

import numpy as np

from common_jax import extras
from common_jax.errors import InputError
from common_jax.io.files import parse_json
from reward_jax.data.episodes import (
    Episodes,
    check_flags,
    check_rewards,
    check_rows,
    same_goal,
)
from reward_jax.data.storage import check_stored

__all__ = ["read"]

_MOST_EPISODES = 10**7
IDENTIFIER = re.compile(r"(?:[\w.-]+/)*[\w.-]+-v\d+")


def read(dataset: str | pathlib.Path) -> Episodes:
    """Episodes of a Minari dataset: a folder, or the id of one that was downloaded before.

    Minari keeps T + 1 observations for T actions: the last, on which none was taken, is left out.
    Of dict observations (of goal environments) "observation" is taken; "desired_goal" becomes the
    episode's goal where it does not change, but for its first row: some environments gave that of
    the episode before there (Minari issue 265). Raises InputError naming the dataset and what is
    wrong.
    """
    name, stored = _open(dataset)
    try:
        _check_files(name, pathlib.Path(stored.storage.data_path))
        found = [
            (e.id, e.observations, e.actions, e.rewards, e.terminations, e.truncations)
            for e in stored.iterate_episodes()
        ]
    except InputError:
        raise
    except Exception as error:  # which one depends on where the damage is
        raise _unreadable(name, error) from None
    if not found:
        raise InputError(f"{name}: has no episodes; give a dataset that has some")
    rows = [_rows(f"{name}, episode {number}", *rest) for number, *rest in found]
    observations, actions, goals, rewards, terminations, truncations = zip(*rows, strict=True)
    widths = {(o.shape[1], a.shape[1]) for o, a in zip(observations, actions, strict=True)}
    if len(widths) > 1:
        raise InputError(
            f"{name}: episodes differ in width, (observation, action) {sorted(widths)}; give "
            "those of one environment"
        )
    known = len({None if goal is None else goal.shape for goal in goals}) == 1
    first = goals[0] if known else None
    shared = first is not None and all(same_goal(goal, first) for goal in goals)
    environment = stored.env_spec.id if stored.env_spec is not None else None
    return Episodes(
        observations=np.concatenate(observations),
        actions=np.concatenate(actions),
        lengths=np.array([len(o) for o in observations]),
        about={
            "environment": environment,
            "minari": stored.id,
            "goal": first.tolist() if first is not None and shared else None,
        },
        goals=None if first is None else np.stack(goals),
        rewards=np.concatenate(rewards),
        terminations=np.concatenate(terminations),
        truncations=np.concatenate(truncations),
    )


def _open(dataset: str | pathlib.Path) -> tuple[str, Any]:
    """The dataset's name in messages, and Minari's own object."""
    with extras.named():
        import minari
        from minari.storage.datasets_root_dir import get_dataset_path

    folder = pathlib.Path(dataset)
    name = f"Minari dataset {dataset}"
    if folder.is_dir():
        # Minari's own folders hold the files under data/; that folder itself is taken, too.
        inner = folder / "data" if (folder / "data").is_dir() else folder
        if not (inner / "metadata.json").is_file():
            raise InputError(f"{name}: has no data/metadata.json; give a Minari dataset's folder")
        opened = functools.partial(minari.MinariDataset, inner)
    else:
        if not IDENTIFIER.fullmatch(str(dataset)):
            raise InputError(f"{name}: no such folder, nor an id such as NAMESPACE/NAME-v0")
        inner = get_dataset_path(str(dataset)) / "data"
        opened = functools.partial(minari.load_dataset, str(dataset))
    try:
        _check_metadata(name, inner / "metadata.json")
        return name, opened()
    except FileNotFoundError:
        raise InputError(
            f"{name}: is not on this machine; run `minari download {dataset}` first"
        ) from None
    except InputError:
        raise
    except Exception as error:  # which one depends on where the damage is
        raise _unreadable(name, error) from None


def _check_metadata(name: str, path: pathlib.Path) -> None:
    """InputError for a number of episodes that would fill memory: Minari lists them all."""
    found = parse_json(path.read_bytes())
    count = found.get("total_episodes") if isinstance(found, dict) else None
    if type(count) is not int or not 0 <= count <= _MOST_EPISODES:
        raise InputError(f"{name}: metadata.json has no sound total_episodes ({count!r:.40})")


def _check_files(name: str, folder: pathlib.Path) -> None:
    """InputError where a file declares more than it holds (`check_stored`)."""
    with extras.named():
        import h5py

    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path, "r") as file:

            def check(inside: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    check_stored(name, inside, item)

            file.visititems(check)


def _rows(
    source: str,
    observations: Any,
    actions: Any,
    rewards: Any,
    terminations: Any,
    truncations: Any,
) -> tuple[Any, ...]:
    """Observations [T, O], actions [T, A], goal [G] or None, and the rest [T], of one episode."""
    goal = None
    if isinstance(observations, dict):
        if "observation" not in observations:
            raise InputError(
                f"{source}: its observations are {', '.join(sorted(observations))}; a dict needs "
                "an 'observation'"
            )
        goal = _goal(observations.get("desired_goal"))
        observations = observations["observation"]
    for what, values in (("observations", observations), ("actions", actions)):
        if isinstance(values, dict | tuple | list):
            parts = "a dict" if isinstance(values, dict) else "a tuple, or texts"
            raise InputError(
                f"{source}: its {what} are {parts}, where one array a step is wanted; flatten "
                "them (gymnasium's FlattenObservation, or your own) and record them anew"
            )
    taken, acted = np.atleast_1d(observations), np.atleast_1d(actions)
    if len(taken) != len(acted) + 1:
        raise InputError(
            f"{source}: has {len(taken)} observations and {len(acted)} actions; Minari keeps one "
            "observation more than actions: write it anew"
        )
    observed, acted = check_rows(source, taken[:-1], acted)
    steps = len(acted)
    return (
        *(observed, acted, goal, check_rewards(source, rewards, steps)),
        check_flags(source, "terminations", terminations, steps),
        check_flags(source, "truncations", truncations, steps),
    )


def _goal(wanted: Any) -> np.ndarray | None:
    """The goal that all rows [T + 1, G] but perhaps the first have, or None."""
    sound = isinstance(wanted, np.ndarray) and wanted.ndim == 2 and wanted.dtype.kind in "fiu"
    if not sound or not len(wanted) or not np.isfinite(wanted).all():
        return None
    first = 1 if len(wanted) > 2 else 0
    goal = wanted[first].astype(np.float32)
    return goal if same_goal(wanted[first:].astype(np.float32), goal).all() else None


def _unreadable(name: str, error: Exception) -> InputError:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{name}: cannot be read ({said}); fetch or write it anew")
