"""`reward-jax sweep`: how far to push a base's plans, and until when.

Legend: B plans, H horizon, D transition width, S scales.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from common_jax.cli.ranges import NonNegativeInt, PositiveInt
from common_jax.errors import InputError
from common_jax.io.files import write_json
from common_jax.run import note_run
from reward_jax.commands.steering import Steering, SteeringConfig, load
from reward_jax.planning.plan import plan_sweep, precomputed
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.tasks.base import Planner

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SteeringConfig):
    """Every guidance scale with every t_stopgrad; writes sweep.json.

    Args:
        scales: guidance scales.
        t_stopgrads: diffusion steps below which there is no guidance.
        execute: in the world, too, and not in plans alone.
    """

    plans: PositiveInt = 64
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    t_stopgrads: tuple[NonNegativeInt, ...] = (0, 2, 5, 10)
    execute: bool = False


def run(config: Config) -> pathlib.Path:
    """Sweep, measure, print a table; returns the folder."""
    if not config.scales or not config.t_stopgrads:
        raise InputError("scales and t_stopgrads need a number each, or more")
    for name in ("scale", "t_stopgrad"):
        if getattr(config.guidance, name) != getattr(GuidanceOptions, name):
            raise InputError(f"guidance.{name} is swept: give {name}s, and leave it out")
    steering = load(config)
    task = steering.task
    measure = task.shown_measure(executed=config.execute)
    if measure is None:
        raise InputError(f"plans of {task.name} alone tell nothing: give --execute")
    note_run(config.out, dataclasses.asdict(config))
    starts, key = task.starts(config.plans, config.seed), jax.random.key(config.seed)
    rows = []
    print(measure.title)
    print("scale \\ t_stopgrad" + "".join(f"{stop:8d}" for stop in config.t_stopgrads))
    for scale, planners in _planners(config, steering, starts, key):
        line = []
        for stop, one in zip(config.t_stopgrads, planners, strict=True):
            options: dict[str, Any] = dict(key=key, goal=steering.goal, simulate=config.execute)
            found = task.execute(one, starts, **options).means()
            rows.append({"scale": scale, "t_stopgrad": stop} | found)
            line.append(found[measure.name])
        print(f"{scale:18g}" + "".join(f"{value:8.{measure.digits}f}" for value in line))
    write_json(config.out / "sweep.json", rows)
    print(f"sweep: {config.out / 'sweep.json'}")
    return config.out


def _planners(
    config: Config, steering: Steering, starts: np.ndarray, key: jax.Array
) -> Iterator[tuple[float, list[Planner]]]:
    """Each scale, with a planner for each t_stopgrad.

    Where the task plans once, all plans are made in one compiled call, and given out.
    """
    base = steering.base
    if steering.task.replans:
        for scale in config.scales:
            stops = config.t_stopgrads
            yield scale, [steering.planner(scale=scale, t_stopgrad=s) for s in stops]
        return
    swept = plan_sweep(
        base,
        starts,
        key=key,
        guide=steering.guide,
        scales=config.scales,
        t_stopgrads=config.t_stopgrads,
        options=steering.options,
        mesh=steering.mesh,
    )
    for scale, row in zip(config.scales, swept, strict=True):
        plans = [precomputed(base.space.plans(x)) for x in row]
        yield scale, plans
