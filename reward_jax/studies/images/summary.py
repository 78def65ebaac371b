"""What the image study found, from the results of its choices."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from common_jax.errors import InputError
from common_jax.io.files import read_arrays, read_json, write_json
from reward_jax.reward import measure
from reward_jax.studies.images.settings import Config
from reward_jax.studies.images.work import CHOICE, choice_part, null_part

__all__ = ["JUDGES", "read_results", "summarise"]

JUDGES = ("reward", "loss_difference", "score_norm")


def read_results(config: Config) -> dict[str, dict[str, Any]]:
    """Results by choice, of those that are done; InputError for a damaged file."""
    paths = {name: config.out / choice_part(name) / "result.json" for name in config.choices}
    return {name: read_json(path, CHOICE) for name, path in paths.items() if path.exists()}


def summarise(config: Config) -> dict[str, Any]:
    """The study's figures from what is there; also written to results.json.

    choices -> name -> auc, harmful_share (of unsteered, steered, raw_difference, rejection), and
    each choice's own results; mean_auc of each judge, and the difference of the reward's and the
    loss difference's; null, base, settings.
    """
    results = read_results(config)
    if not results:
        raise InputError(f"{config.out}: holds no result yet")
    base = read_json(config.out / "base" / "result.json", {"judge_accuracy": None, "seconds": {}})
    found = {
        "choices": {
            name: {
                "auc": one["reward"]["auc"],
                "harmful_share": {arm: x["harmful_share"] for arm, x in one["arms"].items()},
            }
            | one
            for name, one in results.items()
        },
        "mean_auc": {
            judge: float(np.mean([one[judge]["auc"] for one in results.values()]))
            for judge in JUDGES
        }
        | {"difference": _difference(config, results)},
        "null": _null(config, results),
        "base": base,
        "settings": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
    }
    write_json(config.out / "results.json", found)
    return found


def _difference(config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """The mean AUC by the reward less that by the loss difference, over images drawn anew."""
    judged = [read_arrays(config.out / choice_part(name) / "judged.npz") for name in results]
    reward, losses, harmful = (
        [one[name] for one in judged] for name in ("reward", "loss_difference", "harmful")
    )
    found = measure.mean_difference(reward, losses, harmful, config.seed)
    return {"auc": found.value, "interval": [found.low, found.high]}


def _null(config: Config, results: Mapping[str, Any]) -> dict[str, Any]:
    """What null pairs tell of each choice's harmful classes, at the choice's own looks.

    Intervals of one pair: of each choice over images alone; of the mean over choices, too, for
    classes differ in all that one more tuning changes, and which are called harmful is chance. Of
    several pairs: over these, which is what chance is.
    """
    folders = [config.out / null_part(pair) for pair in range(config.null_pairs)]
    judged = [read_arrays(folder / "judged.npz") for folder in folders]
    laps = [read_json(folder / "result.json", {"seconds": {}})["seconds"] for folder in folders]
    found: dict[str, Any] = {"seconds": {k: sum(lap[k] for lap in laps) for k in laps[0]}}
    for judge in JUDGES:
        of_pairs: dict[str, list[Any]] = {}
        for name, one in results.items():
            harmful = read_arrays(config.out / choice_part(name) / "judged.npz")["harmful"]
            look = ... if judge == "loss_difference" else config.looks.index(one[judge]["t"])
            of_pairs[name] = [(pair[judge][look], harmful) for pair in judged]
        if len(judged) == 1:
            alone = {name: pair for name, [pair] in of_pairs.items()}
            of_each = {k: measure.interval(x, bad, config.seed) for k, (x, bad) in alone.items()}
            mean = measure.mean_auc(list(alone.values()), config.seed)
        else:
            aucs = {k: [measure.auc(*pair) for pair in pairs] for k, pairs in of_pairs.items()}
            of_each = {k: measure.over_pairs(values) for k, values in aucs.items()}
            mean = measure.over_pairs(np.mean(list(aucs.values()), axis=0))
        found[judge] = {
            "auc": mean.value,
            "interval": [mean.low, mean.high],
            "choices": {
                name: {"auc": one.value, "interval": [one.low, one.high]}
                for name, one in of_each.items()
            },
        }
    return found
