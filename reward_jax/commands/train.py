"""`reward-jax train`: a diffusion model of trajectories, from a file of episodes.

run/
  config.yaml, environment.json, metrics.jsonl, tensorboard/     (`common_jax/run.py`)
  checkpoints/           whole training states
  denoiser.safetensors   the averaged model, and all that using it takes
"""

import dataclasses
import pathlib
from typing import Any, Literal

from common_jax.cli.options import RunOptions
from common_jax.cli.ranges import NonNegativeFloat, check_ranges
from common_jax.digest import digest
from common_jax.errors import InputError
from common_jax.mesh import mesh_for
from common_jax.run import check_directory
from reward_jax.data.checkpoint import load_model, save_model
from reward_jax.data.trajectory.space import TrajectoryModel, TrajectorySpace
from reward_jax.data.trajectory.windows import WindowSize
from reward_jax.diffusion.schedule import make_schedule
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.planning.fit import (
    NetworkOptions,
    Training,
    Untrained,
    check_prediction,
    fit,
    open_run,
    space_of,
    window_source,
)
from reward_jax.planning.options import DiffusionOption, EpisodesOption, NetworkOption
from reward_jax.tasks.find import read

__all__ = ["Config", "check_taken_over", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunOptions, NetworkOption, DiffusionOption, WindowSize, EpisodesOption):
    """Train a diffusion model on the windows of a file of episodes.

    Args:
        init: a trained denoiser (file or run) to begin with: an expert from its base. Its network,
            horizon, stride, actions, normaliser, schedule, diffusion_steps and clip_x0 are taken
            over: leave those options out.
        actions: keep the actions in the trajectories.
        normaliser: limits (to -1 .. 1) or gaussian.
        schedule: cosine or linear.
        clip_x0: cut x_0 to [-clip_x0, clip_x0] when the model is used; 0 for none.
        training: how it is trained.
    """

    init: str | None = None
    actions: bool = False
    normaliser: Literal["limits", "gaussian"] = "limits"
    schedule: Literal["cosine", "linear"] = "cosine"
    clip_x0: NonNegativeFloat = Untrained.clip_x0 or 0.0
    training: Training = dataclasses.field(default_factory=Training)


def run(config: Config) -> pathlib.Path:
    """Train and write; returns the path of the denoiser.

    Raises InputError for bad settings or data before anything is written, and when the loss is no
    longer finite, naming the step.
    """
    check_ranges(config)
    config.network.check(None if config.init else config.horizon)
    check_directory(config.out, resume=config.resume)
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    init = load_model(config.init, TrajectorySpace) if config.init else None
    if init:
        check_prediction(config.training, init)
        check_taken_over(config, init)
    episodes = read(config.data, ends=config.cut.ends)
    if init:
        begin, space = init, dataclasses.replace(init.space, about=dict(episodes.about))
    else:
        space = space_of(
            episodes,
            horizon=config.horizon,
            stride=config.stride,
            actions=config.actions,
            normaliser=config.normaliser,
        )
        schedule = make_schedule(config.schedule, config.diffusion_steps)
        begin = Untrained(schedule, config.network, config.clip_x0 or None)
    source = window_source(episodes, space, config.cut.padding)
    out = pathlib.Path(config.out)
    written = dataclasses.asdict(config) | {"resume": False}
    steps = config.training.steps
    inputs = {"init": digest(init.denoiser)} if init else None
    with open_run(
        out, written, "training", steps, save_every=config.save_every, mesh=mesh, inputs=inputs
    ) as context:
        model = fit(source, space, begin, config.training, seed=config.seed, context=context)
    path = out / "denoiser.safetensors"
    save_model(path, model)
    print(f"denoiser: {path}")
    return path


def check_taken_over(config: Config, like: TrajectoryModel) -> None:
    """InputError naming the first option that is neither its default nor what `like` has."""
    d, space = like.denoiser, like.space
    theirs: dict[str, Any] = {
        "horizon": space.horizon,
        "stride": space.stride,
        "actions": space.actions > 0,
        "normaliser": space.normaliser.kind,
        "schedule": d.schedule.name,
        "diffusion_steps": d.schedule.steps,
        "clip_x0": d.clip or 0.0,
    }
    pairs = [(name, config, Config, value) for name, value in theirs.items()]
    if isinstance(d.model, TemporalUnet):
        pairs += [
            (f"network.{f.name}", config.network, NetworkOptions, getattr(d.model, f.name))
            for f in dataclasses.fields(NetworkOptions)
        ]
    for name, options, defaults, value in pairs:
        field = name.rpartition(".")[2]
        given, default = getattr(options, field), getattr(defaults, field)
        given = tuple(given) if isinstance(value, tuple) else given
        if given not in (default, value):
            raise InputError(
                f"{name} is {given}, but the denoiser to begin with (init) has {value}, which is "
                "taken over: leave it out, or give that"
            )
