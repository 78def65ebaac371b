"""`reward-jax steer`: plans of a base, steered by a reward, and what comes of them."""

import dataclasses
import pathlib

import jax
import numpy as np

from common_jax.io.files import write_json
from common_jax.run import note_run
from reward_jax.commands.steering import STEERED, SteeringConfig, load
from reward_jax.reward.guide import GuidanceOptions

__all__ = ["Config", "run"]

_SHOWN = 64  # plans of a figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SteeringConfig):
    """Plan with a base model, steered by a reward; writes plans.npz, steer.json and steer.png."""

    guidance: GuidanceOptions = STEERED


def run(config: Config) -> pathlib.Path:
    """Plan, execute, measure, draw; returns the folder."""
    from matplotlib.figure import Figure

    steering = load(config)
    task, goal = steering.task, steering.goal
    note_run(config.out, dataclasses.asdict(config))
    starts, key = task.starts(config.plans, config.seed), jax.random.key(config.seed)
    planners = {
        "unsteered": steering.planner(steered=False),
        "steered": steering.planner(),
    }
    outcomes = {n: task.execute(p, starts, key=key, goal=goal) for n, p in planners.items()}
    means = {name: outcome.means() for name, outcome in outcomes.items()}
    for name, found in means.items():
        print(f"{name}: {task.summarise(found)}")
    shown = {name: outcome.shown for name, outcome in outcomes.items()}
    np.savez_compressed(
        config.out / "plans.npz",
        plans=shown["steered"],
        unsteered=shown["unsteered"],
        starts=starts,
    )
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        task.draw(axis, rows[:_SHOWN], goal=goal)
        axis.set_title(f"{name}: {task.summarise(means[name])}")
    figure.savefig(config.out / "steer.png", dpi=120)
    scale = config.guidance.scale
    write_json(config.out / "steer.json", means | {"goal": goal, "scale": scale})
    print(f"plans: {config.out}")
    return config.out
