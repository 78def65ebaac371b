"""What the maze study found, beside the paper: a map for every goal, counts, and a table.

Reads the folder that `studies/maze/run.py` fills; measures nothing.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common_jax.io.files import read_arrays
from common_jax.report.figures import draw
from common_jax.report.findings import Claim, Figure, Findings, Table, Verdict, print_tables, write
from common_jax.run import made_by
from reward_jax.tasks.maze.mazes import Maze, draw_maze, maze

__all__ = ["write_report"]

PAPER_SHARE = 0.7812  # of goals whose map peaks there; arXiv 2306.01804, Maze2D


def write_report(out: pathlib.Path, summary: Mapping[str, Any], scale: float) -> pathlib.Path:
    """Tables on the console, and report.html and report.md in `out/report`; the page's path.

    summary: of `summarise`. scale: the guidance scale that the claims tell of.
    """
    names = list(dict.fromkeys(r["maze"] for r in summary["results"]))
    by_maze = {n: [r for r in summary["results"] if r["maze"] == n] for n in names}
    findings = Findings(
        title="Maze2D: a reward from two diffusion models, goal by goal",
        summary=_sentences(summary, scale),
        claims=_claims(summary, scale),
        tables=[_counts(by_maze, scale), _steering(summary), _goals(summary, scale)],
        figures=[_maps(out, maze(n), results) for n, results in by_maze.items()],
        method=METHOD,
        caveats=CAVEATS,
        facts=_facts(out, summary, scale),
        data={k: v for k, v in summary.items() if k != "results"} | {"goals_by_maze": by_maze},
    )
    print_tables(findings)
    return write(
        out / "report", findings, command=f"reward-jax study maze --config {out}/config.yaml"
    )


METHOD = (
    "For each maze a diffusion model is trained on walks to random goals (the base), and for each "
    "goal trained further on walks to that goal alone (the expert). A network's gradient is "
    "matched to the difference of the two models' scores on noised walks of both, with three "
    "seeds whose mean is the reward (Algorithm 1 of arXiv 2306.01804). The map averages the "
    "reward of 10,000 of the base's held-out walks over the places that they visit.",
    "A peak counts when the highest bin lies in the goal's cell. Beside it: chance, one over the "
    "number of free cells; a null control, the reward of two checkpoints of one base; and a "
    "discriminator of the same network, trained on as many walks.",
    "A plan ends at the goal when its last row is within 0.5 m of it; executed: when the ball, "
    "driven along the plan by the controller in the simulator, comes to rest there. Inside: share "
    "of the plan's rows that are not in a wall.",
)
CAVEATS = (
    "Sizes are reduced to what two CPU cores carry: 32 rows of every 10th to 28th environment "
    "step, networks of 16 channels, 50 diffusion steps (the paper: 256 rows, 32 channels, 100).",
    "Experts begin as their base; rewards see whole walks and are trained on walks of both "
    "models, with v prediction and a smooth activation. The authors' choices are in "
    "configs/reward/paper_*.",
    "One seed of data and models; three of each reward.",
)


def _at(r: Mapping[str, Any], name: str, key: str) -> float:
    return r["steering"][name][key]


def _sentences(summary: Mapping[str, Any], scale: float) -> list[str]:
    steered, free = (summary["steering"][k] for k in (f"reward {scale:g}", "unsteered"))
    return [
        f"Of {summary['goals']} goals, {summary['peaks_in_goal_cell']} have a reward whose map "
        f"peaks in the goal's cell; the median distance is {summary['median_metres']:.2f} m.",
        f"Steered at scale {scale:g}, {100 * steered['planned']:.0f}% of the base's plans end at "
        f"the goal, {100 * steered['executed']:.0f}% when executed in the simulator; unsteered "
        f"{100 * free['planned']:.0f}% and {100 * free['executed']:.0f}%.",
    ]


def _claims(summary: Mapping[str, Any], scale: float) -> list[Claim]:
    share, chance = summary["share_in_goal_cell"], summary["chance_share_in_goal_cell"]
    steered, free = (summary["steering"][k] for k in (f"reward {scale:g}", "unsteered"))
    judge = max(
        v["executed"] for k, v in summary["steering"].items() if k.startswith(("logit", "sigmoid"))
    )

    def verdict(holds: bool) -> Verdict:
        return "reproduced" if holds else "not reproduced"

    return [
        Claim(
            "The heat maps of learned rewards peak at the expert's goal (Maze2D)",
            f"{100 * PAPER_SHARE:.2f}% of 32 (as remembered), chance about 4%",
            f"{100 * share:.1f}% of {summary['goals']}, chance {100 * chance:.1f}%",
            verdict(share >= PAPER_SHARE),
        ),
        Claim(
            "Steering the base by the reward makes it behave as the expert",
            "shown for locomotion",
            f"plans at the goal {free['planned']:.2f} -> {steered['planned']:.2f}, executed "
            f"{free['executed']:.2f} -> {steered['executed']:.2f}",
            verdict(steered["executed"] > free["executed"]),
        ),
        Claim(
            "The reward steers better than a discriminator",
            "mean return 32.4 against 27.8 (locomotion, as remembered)",
            f"executed {steered['executed']:.2f} against {judge:.2f}, the discriminator's best",
            verdict(steered["executed"] > judge),
        ),
    ]


def _counts(by_maze: Mapping[str, Sequence[Any]], scale: float) -> Table:
    rows = []
    for name, results in by_maze.items():
        seeds = [p["in_cell"] for r in results for p in r["seed_peaks"]]
        judge = sum(r["discriminator_peak"]["in_cell"] for r in results)
        key = f"reward {scale:g}"
        rows.append(
            (
                name,
                len(results),
                sum(r["peak"]["in_cell"] for r in results),
                f"{sum(seeds)} of {len(seeds)}",
                judge,
                f"{1 / results[0]['free_cells']:.2f}",
                f"{np.median([r['peak']['metres'] for r in results]):.2f}",
                f"{np.mean([_at(r, key, 'planned') for r in results]):.2f}",
                f"{np.mean([_at(r, key, 'executed') for r in results]):.2f}",
            )
        )
    columns = ("maze", "goals", "peaks in the cell", "of single seeds", "discriminator's")
    columns += ("chance", "median metres off", "plans at the goal", "executed")
    return Table(f"Peaks and steering (scale {scale:g}) by maze", columns, rows)


def _steering(summary: Mapping[str, Any]) -> Table:
    rows = [
        (name, *(f"{found[k]:.2f}" for k in ("planned", "executed", "inside")))
        for name, found in summary["steering"].items()
    ]
    return Table(
        "Steering, mean over goals",
        ("guide and scale", "plans at the goal", "executed", "inside"),
        rows,
        "Logit and sigmoid: the discriminator, its logit or its sigmoid differentiated.",
    )


def _goals(summary: Mapping[str, Any], scale: float) -> Table:
    rows = []
    for r in summary["results"]:
        at = f"({r['goal'][0]:.1f}, {r['goal'][1]:.1f})"
        reward = r["steering"][f"reward {scale:g}"]
        rows.append(
            (
                f"{r['maze']} {at}",
                "yes" if r["peak"]["in_cell"] else "no",
                f"{r['peak']['metres']:.2f}",
                ", ".join(f"{p['metres']:.2f}" for p in r["seed_peaks"]),
                f"{reward['planned']:.2f}",
                f"{reward['executed']:.2f}",
            )
        )
    columns = ("goal", "in the cell", "metres off", "each seed's", "plans at the goal", "executed")
    return Table(f"Every goal (steered at scale {scale:g})", columns, rows)


def _maps(out: pathlib.Path, layout: Maze, results: Sequence[Mapping[str, Any]]) -> Figure:
    """The maps of one maze, side by side in two rows."""
    folders = sorted((out / layout.name).glob("goal_*"), key=lambda p: int(p.name[5:]))
    columns = min(4, len(results))
    lines = -(-len(results) // columns)
    left, right, bottom, top = layout.extent
    wide = 2.2

    def paint(axes: Any) -> None:
        every = np.atleast_1d(axes).ravel()
        for axis in every[len(results) :]:
            axis.set_axis_off()
        for axis, folder, r in zip(every, folders, results, strict=False):
            values = _reward_map(folder)
            axis.imshow(
                values, origin="lower", extent=layout.extent, cmap="viridis", rasterized=True
            )
            draw_maze(axis, layout)
            axis.plot(*r["peak"]["at"], "o", mfc="none", mec="white", mew=1.5, ms=9)
            axis.plot(*r["goal"], "*", color="#d55e00", mec="white", mew=0.5, ms=10)
            axis.set(xlabel="", ylabel="", xticks=[], yticks=[])

    height = lines * wide * (top - bottom) / (right - left)
    image = draw(paint, width=columns * wide, height=height, rows=lines, columns=columns)
    hits = sum(r["peak"]["in_cell"] for r in results)
    return Figure(
        f"maps_{layout.name}",
        image,
        f"{layout.name}: where each goal's reward is high (yellow); star: the goal, circle: the "
        f"map's peak. {hits} of {len(results)} peak in the goal's cell.",
    )


def _reward_map(folder: pathlib.Path) -> np.ndarray:
    mend = f"delete {folder / 'result.json'}, and both are made again"
    return read_arrays(folder / "maps.npz", ["reward"], mend)["reward"]


def _facts(out: pathlib.Path, summary: Mapping[str, Any], scale: float) -> dict[str, str]:
    null = summary["null_share_in_goal_cell"]
    return {
        "null control": "none"
        if null is None
        else f"{100 * null:.1f}% of goals hold the peak of "
        "the map of two checkpoints of their base",
        "guidance scale": f"{scale:g} (1 moves as far as the expert's mean would)",
        "seconds of all goals": f"{summary['seconds']:.0f}, bases apart",
        **made_by(out, "flax", "gymnasium-robotics", "mujoco"),
    }
