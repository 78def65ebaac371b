"""What the locomotion study found, from the results of its robots."""

import dataclasses
import json
from typing import Any

from common_jax.errors import InputError
from common_jax.io.files import read_json, write_json
from reward_jax.studies.locomotion.settings import Config
from reward_jax.tasks.locomotion.robots import ROBOTS

__all__ = ["MAIN", "read_results", "summarise"]

MAIN = ("unsteered", "discriminator", "raw_difference", "reward", "expert")
_ARM = dict.fromkeys(("mean", "standard_error", "normalized", "episodes", "returns", "settings"))


def read_results(config: Config) -> dict[str, dict[str, Any]]:
    """Results by robot, of those that are done; InputError for a damaged file."""
    arms: dict[str, Any] = dict.fromkeys(MAIN, _ARM)
    wanted = {"arms": arms, "gap": {"mean": None}, "diagnostics": {}, "seconds": {}}
    if config.unseen_data:
        wanted["unseen"] = arms
    paths = {name: config.out / name / "result.json" for name in config.robots}
    return {name: read_json(path, wanted) for name, path in paths.items() if path.exists()}


def summarise(config: Config) -> dict[str, Any]:
    """The study's figures from what is there; also written to results.json.

    environments -> id -> arm -> mean, standard_error, normalized, episodes, with every setting
    beside.
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
            name: {key: result[key] for key in ("gap", "diagnostics", "seconds")}
            for name, result in results.items()
        },
        "settings": settings,
    }
    write_json(config.out / "results.json", found)
    return found
