"""What the maze study found, from the results of its goals."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from common_jax.errors import InputError
from common_jax.io.files import read_json, write_json
from reward_jax.studies.maze.measure import GUIDES
from reward_jax.tasks.maze.mazes import maze

__all__ = ["read_results", "summarise"]


def read_results(
    out: pathlib.Path, scales: Sequence[float]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Results of the goals and, by maze, of the null control; InputError for a damaged file."""
    peak = dict.fromkeys(("metres", "in_cell", "at"))
    guides = [f"{name} {scale:g}" for name in GUIDES for scale in scales]
    shares = dict.fromkeys(("planned", "executed", "inside"))
    wanted = {
        **{"maze": None, "goal": [None], "free_cells": None, "diagnostics": {}, "seconds": {}},
        **{"peak": peak, "seed_peaks": [peak], "discriminator_peak": peak},
        "steering": dict.fromkeys(("unsteered", "expert", *guides), shares),
    }
    results = [read_json(p, wanted) for p in sorted(out.glob("*/goal_*/result.json"))]
    nulls = {
        p.parent.name: read_json(p, {"peaks": [None], "diagnostics": None})
        for p in sorted(out.glob("*/null.json"))
    }
    return results, nulls


def summarise(out: pathlib.Path, scales: Sequence[float]) -> dict[str, Any]:
    """The study's figures from what is there; also written to results.json.

    scales: those of the study. Raises InputError naming a result that is damaged.
    """
    results, nulls = read_results(out, scales)
    if not results:
        raise InputError(f"{out}: holds no result yet")

    def share(values: Any) -> float:
        return float(np.mean(list(values)))

    steering = {
        name: {
            key: round(share(r["steering"][name][key] for r in results), 4)
            for key in ("planned", "executed", "inside")
        }
        for name in results[0]["steering"]
    }
    null_hits = []
    for r in results:
        layout = maze(r["maze"])
        cell = layout.cell_of(np.array(r["goal"]))
        peaks = nulls.get(r["maze"], {}).get("peaks", [])[:1]
        null_hits += [bool((layout.cell_of(np.array(p)) == cell).all()) for p in peaks]
    summary = {
        "goals": len(results),
        "peaks_in_goal_cell": sum(r["peak"]["in_cell"] for r in results),
        "share_in_goal_cell": share(r["peak"]["in_cell"] for r in results),
        "seed_share_in_goal_cell": share(p["in_cell"] for r in results for p in r["seed_peaks"]),
        "median_metres": float(np.median([r["peak"]["metres"] for r in results])),
        "discriminator_share_in_goal_cell": share(
            r["discriminator_peak"]["in_cell"] for r in results
        ),
        "null_share_in_goal_cell": share(null_hits) if null_hits else None,
        "chance_share_in_goal_cell": share(1 / r["free_cells"] for r in results),
        "steering": steering,
        "seconds": sum(sum(r["seconds"].values()) for r in results),
        "results": results,
        "null": nulls,
    }
    write_json(out / "results.json", summary)
    return summary
