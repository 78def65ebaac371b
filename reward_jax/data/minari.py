"""Minari datasets, read and written through its own package, on this machine only.

Legend: T steps of an episode, O observation width, A action width, G width of a goal.
"""

import functools
import importlib.metadata
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

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

__all__ = ["read", "write"]

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
    observations, actions, led_to, goals, *rest = zip(*rows, strict=True)
    rewards, terminations, truncations = rest
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
    own = _about(name, stored.storage.read_raw_metadata(stored.storage.data_path).get("about"))
    return Episodes(
        observations=np.concatenate(observations),
        actions=np.concatenate(actions),
        lengths=np.array([len(o) for o in observations]),
        about={
            "environment": environment,
            "goal": first.tolist() if first is not None and shared else None,
            **own,
            "minari": stored.id,
        },
        goals=None if first is None else np.stack(goals),
        rewards=np.concatenate(rewards),
        terminations=np.concatenate(terminations),
        truncations=np.concatenate(truncations),
        led_to=np.stack(led_to) if np.isfinite(led_to).all() else None,
    )


def folder_of(identifier: str) -> pathlib.Path:
    """Where Minari keeps, or would keep, the dataset of this id; InputError for no id."""
    with extras.named():
        from minari.storage.datasets_root_dir import get_dataset_path

    if not IDENTIFIER.fullmatch(identifier):
        raise InputError(f"Minari dataset {identifier}: no id such as NAMESPACE/NAME-v0")
    return get_dataset_path(identifier)


def write(
    folder: str | pathlib.Path,
    episodes: Episodes,
    *,
    identifier: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder of a Minari dataset, which appears whole or not at all.

    `read` gives the same episodes, but for arrivals and goals, which Minari has no place for;
    `about`, and `run`, what made them, stand in its metadata, plain JSON. identifier: by default
    the folder's name. Raises InputError for a folder that exists, and for episodes without what
    Minari asks for: rewards, flags, what the last actions led to.
    """
    with extras.named():
        import gymnasium
        from minari.data_collector.episode_buffer import EpisodeBuffer
        from minari.dataset.minari_storage import MinariStorage

    folder, e = pathlib.Path(folder), episodes
    name = f"Minari dataset {folder}"
    if folder.exists():
        raise InputError(f"{name}: exists; name another folder, or remove it")
    for what in ("rewards", "terminations", "truncations", "led_to"):
        if getattr(e, what) is None:
            raise InputError(f"{name}: the episodes have no {what}, which Minari asks for")
    led_to: Any = e.led_to

    def buffers() -> Iterator[EpisodeBuffer]:
        for number, (first, stop) in enumerate(zip(e.starts, e.ends, strict=True)):
            seen: Any = np.concatenate([e.observations[first:stop], led_to[number, None]])
            yield EpisodeBuffer(
                observations=seen,
                **{
                    what: getattr(e, what)[first:stop]
                    for what in ("actions", "rewards", "terminations", "truncations")
                },
            )

    def space(rows: Float[np.ndarray, "M W"]) -> gymnasium.spaces.Box:
        return gymnasium.spaces.Box(-np.inf, np.inf, rows.shape[1:], np.float32)

    environment = e.about.get("environment")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            whole = pathlib.Path(scratch) / folder.name
            (whole / "data").mkdir(parents=True)
            storage = MinariStorage.new(
                whole / "data",
                observation_space=space(e.observations),
                action_space=space(e.actions),
                env_spec=gymnasium.spec(environment) if environment else None,
            )
            storage.update_episodes(buffers())
            storage.update_metadata(
                {
                    "dataset_id": identifier or _named(folder),
                    "minari_version": importlib.metadata.version("minari"),
                    "about": json.dumps(e.about),
                    "run": json.dumps(run),
                }
            )
            os.replace(whole, folder)
    except (OSError, RuntimeError) as error:  # h5py raises either for a full disk
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: cannot be written ({said}); give another folder") from None


def _named(folder: pathlib.Path) -> str:
    bare = re.sub(r"[^\w.-]", "-", folder.name)
    return bare if IDENTIFIER.fullmatch(bare) else f"{bare}-v0"


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
            raise InputError(
                f"{name}: has no data/metadata.json; give a Minari dataset's folder, or, to train "
                "on, one that holds images"
            )
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


def _about(name: str, stored: Any) -> dict[str, Any]:
    """What `write` noted of the data; nothing in a dataset of others."""
    try:
        about = {} if stored is None else parse_json(stored)
    except (TypeError, ValueError):
        about = None
    if not isinstance(about, dict):
        raise InputError(f"{name}: about in metadata.json is no JSON object; leave it out")
    return about


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
    with np.errstate(over="ignore"):
        led_to = taken[-1].astype(np.float32)
    return (
        *(observed, acted, led_to, goal, check_rewards(source, rewards, steps)),
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
