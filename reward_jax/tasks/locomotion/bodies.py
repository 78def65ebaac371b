"""The robots as figures in their plane (x along the track, z up), drawn without a renderer.

Every part of the three is a capsule, which is a thick line in the plane.

Legend: N states, P generalized positions, G capsules.
"""

import importlib
from typing import Any

import numpy as np
from jaxtyping import Float

from common_jax import extras
from reward_jax.tasks.locomotion.robots import environment, quiet

__all__ = ["FAR", "capsules", "draw_strip"]

FAR = 1.6  # metres between two figures of a strip


def capsules(
    name: str, positions: Float[np.ndarray, "N P"]
) -> tuple[Float[np.ndarray, "N G 2 2"], Float[np.ndarray, " G"]]:
    """Both ends (x, z) of every capsule of a robot in these states, and the radii; metres."""
    with extras.named():
        mujoco: Any = importlib.import_module("mujoco")

    made: Any = environment(name).unwrapped
    model = made.model
    chosen = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE)
    state, ends = mujoco.MjData(model), []
    with quiet():
        for row in positions:
            state.qpos[:] = row
            mujoco.mj_kinematics(model, state)
            axes = state.geom_xmat[chosen].reshape(-1, 3, 3)[:, :, 2]
            reach = axes * model.geom_size[chosen, 1:2]
            middle = state.geom_xpos[chosen]
            ends.append(np.stack([middle - reach, middle + reach], axis=1)[..., [0, 2]])
    return np.stack(ends), model.geom_size[chosen, 0].copy()


def draw_strip(
    axes: Any, name: str, positions: Float[np.ndarray, "N P"], *, lane: float, color: str
) -> None:
    """Draw states side by side on matplotlib's axes, the first at the left, on ground at `lane`.

    Under each stands how far it has come.
    """
    from matplotlib.collections import LineCollection

    still = np.array(positions)
    still[:, 0] = 0.0
    ends, radii = capsules(name, still)
    ends = ends + np.array([0.0, lane])
    ends[..., 0] += (FAR * np.arange(len(ends)))[:, None, None]
    # Widths of lines are in points: of the axes' width, which shows the whole strip.
    width = axes.get_window_extent().width * 72 / axes.figure.dpi
    points = 2 * radii * width / (FAR * len(ends))
    parts = LineCollection(
        list(ends.reshape(-1, 2, 2)),
        linewidths=np.tile(points, len(ends)),
        color=color,
        capstyle="round",
        alpha=0.85,
    )
    axes.add_collection(parts)
    axes.axhline(lane, color="#9aa4ad", lw=0.8, zorder=0)
    for place, row in enumerate(positions):
        axes.text(
            FAR * place, lane - 0.3, f"{round(row[0], 1) + 0.0:.1f} m", ha="center", fontsize=6
        )
