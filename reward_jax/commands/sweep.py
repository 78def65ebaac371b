"""`reward-jax sweep`: how far to push a base's plans, and until when."""

import dataclasses
from typing import Any

import jax

from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError
from common_jax.io.files import write_json
from common_jax.run import check_run, held_run
from reward_jax.planning.steer import (
    SteeringOptions,
    SweepOptions,
    Swept,
    load_steering,
    sweep_outcomes,
)
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.tasks.base import Measure, Outcome

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SweepOptions, SteeringOptions):
    """Every guidance scale with every t_stopgrad; writes sweep.json."""

    plans: PositiveInt = 64


def run(config: Config) -> None:
    """Sweep, measure, write; prints a table."""
    config.check()
    for name in ("scale", "t_stopgrad"):
        if getattr(config.guidance, name) != getattr(GuidanceOptions, name):
            raise InputError(f"guidance.{name} is swept: give {name}s, and leave it out")
    check_run(config.out, "sweep", dataclasses.asdict(config))
    steering = load_steering(config)
    for note in steering.notes:
        print(f"note: {note}")
    task = steering.task
    measure = task.shown_measure(executed=config.execute)
    if measure is None:
        if config.execute:
            raise InputError(f"nothing of {task.name} is executed: leave execute out")
        raise InputError(f"plans of {task.name} alone tell nothing: give --execute")
    with held_run(config.out, "sweep", dataclasses.asdict(config)):
        starts, key = task.starts(config.plans, config.seed), jax.random.key(config.seed)
        found, width = [], 28 if config.by_seed else 8
        errors = f" (its standard errors over starts; over {steering.seeds} reward seeds)"
        print(measure.title + (errors if config.by_seed else ""))
        stops = "".join(f"{stop:{width}d}" for stop in config.t_stopgrads)
        print(f"scale \\ t_stopgrad{stops}")
        for row in sweep_outcomes(steering, starts, config, key=key):
            found += [_row(one, by_seed=config.by_seed) for one in row]
            cells = (_cell(one.outcome, measure, by_seed=config.by_seed) for one in row)
            print(f"{row[0].scale:18g}" + "".join(f"{cell:>{width}}" for cell in cells))
        write_json(config.out / "sweep.json", found)
        print(f"sweep: {config.out / 'sweep.json'}")


def _row(one: Swept, *, by_seed: bool) -> dict[str, Any]:
    """What a setting came to, as JSON."""
    outcome = one.outcome
    seeds = {
        "seed_means": outcome.seed_means(),
        "seed_standard_errors": outcome.seed_standard_errors(),
    }
    return {
        "scale": one.scale,
        "t_stopgrad": one.t_stopgrad,
        **outcome.means(),
        "standard_errors": outcome.standard_errors(),
        **(seeds if by_seed else {}),
        "seconds": outcome.seconds,
    }


def _cell(outcome: Outcome, measure: Measure, *, by_seed: bool) -> str:
    """The mean of a measure, by seed with both its errors."""
    found = [outcome.means()]
    if by_seed:
        found += [outcome.standard_errors(), outcome.seed_standard_errors()]
    mean, *errors = (
        "-" if (x := of[measure.name]) is None else f"{x:.{measure.digits}f}" for of in found
    )
    return f"{mean} ({'; '.join(errors)})" if errors else mean
