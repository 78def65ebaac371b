"""`reward-jax steer`: plans or images of a base, steered by a reward, and what comes of them."""

import dataclasses
from typing import Any

import jax

from common_jax.io.files import atomic, write_arrays, write_json
from common_jax.run import check_run, held_run
from reward_jax.planning.options import SteeredOption
from reward_jax.planning.steer import SteeringOptions, both_outcomes, errors_of, load_steering
from reward_jax.report.figures import outcomes_figure

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SteeredOption, SteeringOptions):
    """Plan with a base model, steered by a reward; writes plans.npz, steer.json and steer.png.

    Plans of a model of images are images, 0 .. 255, and steer.png shows them side by side.
    By_seed, the plans that are written are those of each seed in turn.
    """


def run(config: Config) -> None:
    """Plan, execute, measure, draw; prints what comes of plans, unsteered and steered."""
    check_run(config.out, "steer", dataclasses.asdict(config))
    steering = load_steering(config)
    for note in steering.notes:
        print(f"note: {note}")
    task, goal = steering.task, steering.goal
    with held_run(config.out, "steer", dataclasses.asdict(config)):
        starts = task.starts(config.plans, config.seed)
        found = both_outcomes(steering, starts, key=jax.random.key(config.seed))

        means = {name: outcome.means() for name, outcome in found.items()}
        for name, mean in means.items():
            errors = errors_of(task, found[name]) if config.by_seed else ""
            print(f"{name}: {task.summarise(mean)}{errors}")
        write_arrays(
            config.out / "plans.npz",
            plans=found["steered"].shown,
            unsteered=found["unsteered"].shown,
            starts=starts,
        )
        figure = outcomes_figure(task, found, goal)
        atomic(config.out / "steer.png", lambda path: figure.savefig(path, dpi=120, format="png"))
        facts: dict[str, Any] = {"goal": goal, "scale": config.guidance.scale}
        facts["standard_errors"] = {n: outcome.standard_errors() for n, outcome in found.items()}
        if config.by_seed:
            facts["seed_means"] = found["steered"].seed_means()
            facts["seed_standard_errors"] = found["steered"].seed_standard_errors()
        facts["seconds"] = {name: outcome.seconds for name, outcome in found.items()}
        write_json(config.out / "steer.json", means | facts)
        print(f"plans: {config.out}")
