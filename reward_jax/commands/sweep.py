"""`reward-jax sweep`: how far to push a base's plans, and until when."""

import dataclasses

import jax

from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError
from common_jax.io.files import write_json
from common_jax.run import check_run, held_run
from reward_jax.planning.steer import (
    SteeringOptions,
    SweepOptions,
    load_steering,
    sweep_outcomes,
)
from reward_jax.reward.guide import GuidanceOptions

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
        found = []
        print(measure.title)
        print("scale \\ t_stopgrad" + "".join(f"{stop:8d}" for stop in config.t_stopgrads))
        for row in sweep_outcomes(steering, starts, config, key=key):
            means = [one.outcome.means() for one in row]
            found += [
                {"scale": one.scale, "t_stopgrad": one.t_stopgrad}
                | mean
                | {"standard_errors": one.outcome.standard_errors()}
                | {"seconds": one.outcome.seconds}
                for one, mean in zip(row, means, strict=True)
            ]
            line = "".join(f"{mean[measure.name]:8.{measure.digits}f}" for mean in means)
            print(f"{row[0].scale:18g}{line}")
        write_json(config.out / "sweep.json", found)
        print(f"sweep: {config.out / 'sweep.json'}")
