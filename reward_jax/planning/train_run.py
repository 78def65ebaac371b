"""The run that trains a denoiser, from a file of episodes or images to a file of the model.

    options = TrainOptions(data="episodes.hdf5", out="runs/base")
    found = run_training(load_training(options), options)

run/
  config.yaml, environment.json, metrics.jsonl, tensorboard/     (`common_jax/run.py`)
  checkpoints/           whole training states
  denoiser.safetensors   the averaged model, and all that using it takes
"""

import dataclasses
import pathlib
from typing import Any, Literal

from jax.sharding import Mesh

from common_jax.checksum import checksum
from common_jax.cli.options import RunOptions
from common_jax.cli.ranges import NonNegativeFloat, check_ranges
from common_jax.errors import InputError
from common_jax.mesh import mesh_for
from common_jax.run import check_directory
from reward_jax.data.checkpoint import load_model, save_model
from reward_jax.data.model import Space, SpaceModel
from reward_jax.diffusion.schedule import make_schedule
from reward_jax.diffusion.sources import Source
from reward_jax.planning.fit import Training, Untrained, check_prediction, fit, open_run
from reward_jax.planning.kinds import check_own, kind_of_data, kind_of_model, kind_of_space
from reward_jax.planning.options import DiffusionOption, NewSpaceOptions

__all__ = [
    "Prepared",
    "TrainOptions",
    "Trained",
    "check_taken_over",
    "load_training",
    "run_training",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions, DiffusionOption, NewSpaceOptions):
    """Train a diffusion model on the windows of a file of episodes, or on images.

    Args:
        init: a trained denoiser (file or run) to begin with: an expert from its base. Its network,
            horizon, stride, actions, normaliser, size, schedule, diffusion_steps and clip_x0 are
            taken over: leave those options out.
        schedule: cosine or linear.
        clip_x0: cut x_0 to [-clip_x0, clip_x0] when the model is used; 0 for none.
        training: how it is trained.
    """

    init: str | None = None
    schedule: Literal["cosine", "linear"] = "cosine"
    clip_x0: NonNegativeFloat = Untrained.clip_x0 or 0.0
    training: Training = dataclasses.field(default_factory=Training)


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """What a training begins with, and the samples that it is on."""

    begin: SpaceModel[Any] | Untrained[Any]
    space: Space
    source: Source
    mesh: Mesh | None


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A denoiser, and the file that it is in."""

    path: pathlib.Path
    model: SpaceModel[Any]

    def __str__(self) -> str:
        return f"denoiser: {self.path}"


def load_training(options: TrainOptions) -> Prepared:
    """Read data and the model to begin with; writes nothing.

    Raises InputError for bad settings or data, and where the run cannot be written.
    """
    check_ranges(options)
    kind = kind_of_model(options.init) if options.init else kind_of_data(options.data)
    options.network.check(None if options.init else options.horizon)
    check_directory(options.out, resume=options.resume)
    mesh = mesh_for(dataclasses.asdict(options.mesh))
    init = load_model(options.init, kind.space, mesh) if options.init else None
    if init:
        check_prediction(options.training, init)
        check_taken_over(options, init)
    source, space = kind.to_learn(options, init)
    check_own(kind, f"{options.data} is", options)
    if init:
        return Prepared(init, space, source, mesh)
    schedule = make_schedule(options.schedule, options.diffusion_steps)
    begin = Untrained(schedule, kind.network(options, space), options.clip_x0 or None)
    return Prepared(begin, space, source, mesh)


def run_training(prepared: Prepared, options: TrainOptions) -> Trained:
    """Train and write, in the directory `options.out`, where a run goes on.

    options: those that were loaded with; their paths are noted, and not read again. Raises
    InputError when the loss is no longer finite, naming the step.
    """
    p, out = prepared, pathlib.Path(options.out)
    init = None if isinstance(p.begin, Untrained) else p.begin
    with open_run(
        out,
        dataclasses.asdict(options) | {"resume": False},
        "training",
        options.training.steps,
        save_every=options.save_every,
        mesh=p.mesh,
        inputs={"init": checksum(init.denoiser)} if init else None,
    ) as context:
        model = fit(
            p.source, p.space, p.begin, options.training, seed=options.seed, context=context
        )
    path = out / "denoiser.safetensors"
    save_model(path, model)
    return Trained(path, model)


_DEFAULTS = TrainOptions(data="", out="")


def check_taken_over(options: TrainOptions, like: SpaceModel[Any]) -> None:
    """InputError naming the first option that is neither its default nor what `like` has."""
    d = like.denoiser
    theirs: dict[str, Any] = kind_of_space(like.space).taken_over(like) | {
        "schedule": d.schedule.name,
        "diffusion_steps": d.schedule.steps,
        "clip_x0": d.clip or 0.0,
    }
    for name, value in theirs.items():
        given: Any = options
        default: Any = _DEFAULTS
        for part in name.split("."):
            given, default = getattr(given, part), getattr(default, part)
        given = tuple(given) if isinstance(value, tuple) else given
        if given not in (default, value):
            raise InputError(
                f"{name} is {given}, but the denoiser to begin with (init) has {value}, which is "
                "taken over: leave it out, or give that"
            )
