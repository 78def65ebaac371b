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
from reward_jax.data.episodes import Episodes, check_flags, check_rewards, check_rows

__all__ = ["read"]

IDENTIFIER = re.compile(r"(?:[\w.-]+/)*[\w.-]+-v\d+")


def read(dataset: str | pathlib.Path) -> Episodes:
    """Episodes of a Minari dataset: a folder, or the id of one that was downloaded before.

    Minari keeps T + 1 observations for T actions: the last, on which none was taken, is left out.
    Of dict observations (of goal environments) "observation" is taken; "desired_goal" becomes the
    episode's goal where it does not change. Raises InputError naming the dataset and what is
    wrong.
    """
    name, stored = _open(dataset)
    # What Minari raises for a damaged dataset depends on where the damage is.
    try:
        found = [
            (e.id, e.observations, e.actions, e.rewards, e.terminations, e.truncations)
            for e in stored.iterate_episodes()
        ]
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
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
    known = all(goal is not None for goal in goals)
    shared = known and all(np.array_equal(goal, goals[0]) for goal in goals)
    environment = stored.env_spec.id if stored.env_spec is not None else None
    return Episodes(
        observations=np.concatenate(observations),
        actions=np.concatenate(actions),
        lengths=np.array([len(o) for o in observations]),
        about={
            "environment": environment,
            "minari": stored.id,
            "goal": goals[0].tolist() if shared else None,
        },
        goals=np.stack(goals) if known else None,
        rewards=np.concatenate(rewards),
        terminations=np.concatenate(terminations),
        truncations=np.concatenate(truncations),
    )


def _open(dataset: str | pathlib.Path) -> tuple[str, Any]:
    """The dataset's name in messages, and Minari's own object."""
    with extras.named():
        import minari

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
        opened = functools.partial(minari.load_dataset, str(dataset))
    try:
        return name, opened()
    except FileNotFoundError:
        raise InputError(
            f"{name}: is not on this machine; run `minari download {dataset}` first"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise _unreadable(name, error) from None


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
        wanted = np.asarray(observations.get("desired_goal", ()))
        if wanted.ndim == 2 and len(wanted) and (wanted == wanted[0]).all():
            goal = wanted[0].astype(np.float32)
        observations = observations["observation"]
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


def _unreadable(name: str, error: Exception) -> InputError:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"{name}: cannot be read ({said}); fetch or write it anew")
