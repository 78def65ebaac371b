"""Figures of a reward and of plans or images: those of a page, and pictures of their own."""

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.figure
import numpy as np
from jaxtyping import Float, Shaped

from common_jax.report.figures import PALETTE, draw
from reward_jax.report.measure import SHOWN, Judged, Maps, Measured
from reward_jax.tasks.base import Outcome, Task
from reward_jax.tasks.plane import HeatMap, Plane, draw_map

__all__ = ["map_figure", "outcomes_figure", "page_figures", "panels"]

_PANELS = 6  # of the denoising of one trajectory
_SIDE_BY_SIDE = 64  # trajectories of each picture


def map_figure(plane: Plane, found: HeatMap, goal: Any) -> matplotlib.figure.Figure:
    """A heat map in its plane, with its peak and the goal."""
    figure = matplotlib.figure.Figure(figsize=(5.4, 4.8), layout="constrained")
    axis = figure.subplots()
    plane.draw(axis)
    figure.colorbar(draw_map(axis, found, goal=goal), label="reward, scaled to 0 .. 1")
    axis.legend(loc="upper right", fontsize=8)
    return figure


def outcomes_figure(
    task: Task, outcomes: Mapping[str, Outcome], goal: Any
) -> matplotlib.figure.Figure:
    """What came of two planners, side by side."""
    figure = matplotlib.figure.Figure(figsize=(10, 4.6), layout="constrained")
    for axis, (name, outcome) in zip(figure.subplots(1, 2), outcomes.items(), strict=True):
        task.draw(axis, outcome.shown[:_SIDE_BY_SIDE], goal=goal)
        axis.set_title(f"{name}: {task.summarise(outcome.means())}")
    return figure


def page_figures(measured: Measured) -> dict[str, tuple[str, str]]:
    """Name -> (data URI, what it shows in words)."""
    (task, goal), maps = (measured.compared.task, measured.compared.goal), measured.maps

    def paths(shown: Shaped[np.ndarray, "B ..."], color: str) -> Callable[[Any], None]:
        return lambda axis: task.draw(axis, shown[:SHOWN], goal=goal, color=color)

    def loss(axis: Any) -> None:
        rows = [m for m in measured.metrics if "loss" in m]
        axis.plot([m["step"] for m in rows], [m["loss"] for m in rows], color=PALETTE[0])
        axis.set(xlabel="step", ylabel="loss", yscale="log")

    def explained(axis: Any) -> None:
        names = {
            "explained": "explained by the reward",
            "antisymmetric": "no gradient field (share of the Jacobian)",
            "seed_agreement": "agreement of seeds (cosine)",
        }
        for color, (name, label) in zip(PALETTE, names.items(), strict=False):
            if name in measured.diagnostics:
                axis.plot(measured.diagnostics[name], color=color, label=label)
        axis.set(xlabel="diffusion step t", ylim=(-0.05, 1.05))
        axis.legend(fontsize=8)

    unsteered, steered, expert = (outcome.shown for outcome in measured.outcomes.values())
    size: dict[str, Any] = dict(width=4.8, height=4.4)
    made = measured.compared.kind.made
    figures = {
        "base": (draw(paths(measured.recorded, PALETTE[1]), **size), task.captions.alt_base),
        "expert": (draw(paths(expert, PALETTE[3]), **size), task.captions.alt_expert),
        "unsteered": (draw(paths(unsteered, PALETTE[1]), **size), f"unsteered {made}"),
        "steered": (draw(paths(steered, PALETTE[0]), **size), f"steered {made}"),
    }
    if maps:
        away = f"the peak lies {maps.peak.distance:.2f} {maps.peak.unit} from the goal"
        heat = draw(lambda axis: _heat(axis, measured, maps), width=5.6, height=4.6)
        figures["heat"] = heat, f"heat map of the reward; {away}"
    if judged := measured.judged:
        columns = 1 if judged.lacking is None else 2
        drawn = draw(lambda axes: _judged(axes, judged), width=4.0 * columns, columns=columns)
        figures["judged"] = drawn, str(judged)
    if measured.metrics:
        figures["loss"] = draw(loss), "loss of the reward against training steps"
    if measured.diagnostics:
        figures["explained"] = draw(explained), "diagnostics at each diffusion step"
    return figures


def _judged(axes: Any, judged: Judged) -> None:
    """Rewards at the step that tells images apart best, else at a middle one; and AUC by step."""
    if judged.lacking is None:
        best, parts = len(judged.t) // 2, [(np.ones(judged.rewards.shape[1], bool), 0, "images")]
    else:
        found = judged.aucs()
        best = int(np.argmax(found))
        parts = [(~judged.lacking, 0, "others"), (judged.lacking, 2, "never seen by the expert")]
        axes, curve = axes
        curve.plot(judged.t, found, "o-", color=PALETTE[0])
        curve.set(xlabel="diffusion step t", ylabel="AUC", ylim=(0, 1.02))
    rewards = judged.rewards[best]
    bins = np.linspace(rewards.min(), rewards.max(), 40)
    for rows, color, label in parts:
        axes.hist(rewards[rows], bins, color=PALETTE[color], alpha=0.6, density=True, label=label)
    axes.set(xlabel=f"reward of images noised to t = {judged.t[best]}", yticks=[])
    axes.legend(fontsize=8)


def _heat(axis: Any, measured: Measured, maps: Maps) -> None:
    plane = measured.compared.task.plane
    assert plane
    image = draw_map(axis, maps.map, goal=measured.compared.goal)
    plane.draw(axis)
    axis.plot(*maps.seed_peaks.T, "+", color="white", ms=9, mew=1.6, label="each seed's")
    axis.figure.colorbar(image, ax=axis, shrink=0.8)
    axis.legend(loc="lower left", fontsize=8, facecolor="#333b42", labelcolor="white")


def panels(measured: Measured) -> list[tuple[str, str]]:
    """The steered denoising of one trajectory: (caption, data URI); none without a plane."""
    plane, maps = measured.compared.task.plane, measured.maps
    if plane is None or maps is None:
        return []
    found = []
    for index in np.linspace(0, len(maps.chain) - 1, _PANELS).round().astype(int):
        xy = maps.chain[index]

        def paint(axis: Any, xy: Float[np.ndarray, "H 2"] = xy) -> None:
            plane.draw(axis)
            axis.plot(*xy.T, "-", color=PALETTE[0], lw=0.8, alpha=0.5)
            axis.scatter(*xy.T, c=np.arange(len(xy)), cmap="viridis", s=14, zorder=3)
            axis.plot(*measured.compared.goal, "*", color="#d55e00", mec="white", ms=14)
            axis.set(xlabel="", ylabel="", xticks=[], yticks=[])

        found.append((f"t = {maps.left[index]}", draw(paint, width=2.6, height=2.6)))
    return found
