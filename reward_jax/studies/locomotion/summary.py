"""What the locomotion study found, from the results of its robots."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from common_jax.errors import InputError
from common_jax.io.files import read_json, write_json
from reward_jax.studies.locomotion.models import ablation_part
from reward_jax.studies.locomotion.settings import Config, changed, sources
from reward_jax.studies.locomotion.work import ARM
from reward_jax.tasks.locomotion.robots import ROBOTS

__all__ = ["EXPLAINED", "MAIN", "read_ablations", "read_results", "summarise"]

MAIN = ("unsteered", "discriminator", "raw_difference", "reward", "expert")
_ARM = ARM | {"over": {}}
EXPLAINED = ("explained", "explained_on_raw_paths", "explained_on_own_paths")
_DIAGNOSTICS = dict.fromkeys(EXPLAINED)
_DATA = dict.fromkeys(("source", "episodes", "held_out"))


def read_results(config: Config) -> dict[str, dict[str, Any]]:
    """Results by robot, of those that are done; InputError for a damaged file."""
    arms: dict[str, Any] = dict.fromkeys(MAIN, _ARM)
    gap = dict.fromkeys(("mean", "standard_error", "expert_beats_base"))
    wanted = {"arms": arms, "gap": gap, "diagnostics": _DIAGNOSTICS, "seconds": {}}
    of_each = {}
    for name in config.robots:
        learned = sources(config, name)
        of_each[name] = wanted | {"data": dict.fromkeys(learned, _DATA)}
        if "unseen" in learned:
            of_each[name]["unseen"] = arms
    return _read(config, {name: name for name in config.robots}, of_each)


def read_ablations(config: Config) -> dict[str, dict[str, Any]]:
    """Results by ablation, of those that are done; InputError for a damaged file."""
    wanted = {"arms": dict.fromkeys(MAIN, _ARM), "diagnostics": _DIAGNOSTICS, "seconds": {}}
    parts = {name: ablation_part(name) for name in config.ablations}
    return _read(config, parts, dict.fromkeys(parts, wanted))


def _read(
    config: Config, parts: Mapping[str, str], wanted: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    paths = {name: config.out / part / "result.json" for name, part in parts.items()}
    return {name: read_json(path, wanted[name]) for name, path in paths.items() if path.exists()}


def summarise(config: Config) -> dict[str, Any]:
    """The study's figures from what is there; also written to results.json.

    environments -> id -> arm -> mean, standard_error, normalized, episodes, with every setting
    beside; ablations -> name -> arm, likewise, and what the reward explains (diagnostics).
    """
    results = read_results(config)
    if not results:
        raise InputError(f"{config.out}: holds no result yet")
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    found = {
        "environments": {ROBOTS[n].environment: r["arms"] for n, r in results.items()},
        "unseen": {
            ROBOTS[n].environment: r["unseen"] for n, r in results.items() if "unseen" in r
        },
        "robots": {
            name: {key: result[key] for key in ("data", "gap", "diagnostics", "seconds")}
            for name, result in results.items()
        },
        "ablations": {
            name: result["arms"]
            | {"change": changed(config.ablations[name]), "diagnostics": result["diagnostics"]}
            for name, result in read_ablations(config).items()
        },
        "settings": settings,
    }
    write_json(config.out / "results.json", found)
    return found
