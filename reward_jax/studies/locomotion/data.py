"""Data of others that the locomotion study learns from, in place of the sets that it records.

Legend: E episodes.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from common_jax.checksum import checksum
from common_jax.distributed import there
from common_jax.errors import InputError
from common_jax.io.files import read_json
from reward_jax.data.episodes import Episodes
from reward_jax.data.trajectory.windows import Padding, begins
from reward_jax.studies.locomotion.settings import Ablation, Config, given, sources
from reward_jax.tasks.find import read
from reward_jax.tasks.locomotion.collect import SETS

__all__ = [
    "NOTES",
    "PADDING",
    "check_data",
    "facts_of",
    "is_recorded",
    "limits_of",
    "read_data",
]

NOTES = "data.json"  # what a robot learns from, in its folder

PADDING: Padding = "terminal"  # what follows a recovery that was cut out is not known
_EVERY = 10  # an episode of so many is held out


def is_recorded(source: str) -> bool:
    """Whether a source is a set that is recorded here."""
    return source in SETS


def read_data(
    config: Config, name: str, which: str, count: int | None = None
) -> tuple[Episodes, Episodes]:
    """A robot's data of others: episodes to train on, and those held out for diagnostics.

    which: "base", "expert", or "unseen", of which none is held out. count: of the episodes to
    train on, spread evenly; None for all in which a window begins. Raises InputError, naming the
    setting, as `find.read` does, and for fewer episodes than are asked for, or than can be parted.
    """
    source, horizon = sources(config, name)[which], config.robots[name].horizon
    where = f"robots.{name}.data.{which}"
    try:
        episodes = read(source, env=name)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    usable = np.flatnonzero(begins(episodes, horizon, PADDING))
    wanted = 1 if which == "unseen" else 2
    if len(usable) < wanted:
        raise InputError(
            f"{where}: {source}: {len(usable)} of {len(episodes.lengths)} episodes have a window "
            f"of {horizon} steps (the horizon): give {wanted} or more"
            + (", for one of ten is held out" if wanted > 1 else "")
        )
    held = np.zeros(len(episodes.lengths), bool)
    if which != "unseen":
        held[usable[_EVERY - 1 :: _EVERY] if len(usable) >= _EVERY else usable[-1:]] = True
    chosen = usable[~held[usable]]
    if count is not None:
        if count > len(chosen):
            raise InputError(
                f"{where}: {source}: {count} episodes are asked for ({which}_episodes), but "
                f"{len(chosen)} are there to train on: give as many or fewer"
            )
        chosen = chosen[np.linspace(0, len(chosen) - 1, count).round().astype(int)]
    trained = np.zeros_like(held)
    trained[chosen] = True
    return episodes.choose(trained), episodes.choose(held)


def facts_of(source: str, trained: Episodes, held: Episodes) -> dict[str, Any]:
    """What results say of data of others, as JSON."""
    return {
        "source": source,
        "environment": trained.about.get("environment"),
        "episodes": len(trained.lengths),
        "steps": len(trained.observations),
        "held_out": len(held.lengths),
        "rows": checksum((trained.observations, trained.actions, np.asarray(trained.lengths))),
    }


def check_data(config: Config, robots: Iterable[str]) -> None:
    """InputError for data of others that these robots cannot learn from; trains nothing.

    Also where a robot's work began with other rows, and where an ablation asks for more episodes
    than there are.
    """
    for name in robots:
        path = config.out / name / NOTES
        others = {w: s for w, s in sources(config, name).items() if not is_recorded(s)}
        noted = read_json(path, dict.fromkeys(others, {"rows": None})) if there(path) else {}
        ablations = [a for a in config.ablations.values() if a.robot == name]
        for which, source in others.items():
            facts = facts_of(source, *read_data(config, name, which))
            if noted and noted[which]["rows"] != facts["rows"]:
                raise InputError(
                    f"robots.{name}.data.{which}: {source}: holds other rows than those that "
                    f"{path.parent} began with: put that file back, or name a new out"
                )
            for count in (limits_of(ablation).get(which) for ablation in ablations):
                if count:
                    read_data(config, name, which, count)


def limits_of(ablation: Ablation) -> dict[str, int]:
    """How many episodes of data of others an ablation trains on: "base" or "expert" -> count."""
    return given(base=ablation.base_episodes, expert=ablation.expert_episodes)
