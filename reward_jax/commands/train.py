"""`reward-jax train`: a diffusion model of trajectories, from a file of episodes.

run/
  config.yaml, environment.json, metrics.jsonl, tensorboard/     (`common_jax/run.py`)
  checkpoints/           whole training states
  denoiser.safetensors   the averaged model, and all that using it takes
"""

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from common_jax.cli.options import MeshOptions, check_seed
from common_jax.errors import InputError
from common_jax.mesh import mesh_for
from common_jax.run import Run, check_directory
from reward_jax.commands.progress import check_resumed, reporter
from reward_jax.data.files import read_episodes
from reward_jax.data.hdf5 import EpisodeEnds
from reward_jax.data.trajectory import normalisers
from reward_jax.data.trajectory.checkpoint import Space, TrajectoryModel, load_model, save_model
from reward_jax.data.trajectory.windows import Episodes, transitions, windows
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.loop import OnStep, steps_done
from reward_jax.diffusion.process import Prediction, action_weights
from reward_jax.diffusion.schedule import make_schedule
from reward_jax.diffusion.sources import Source, Strided
from reward_jax.diffusion.train import EMA, start, train_denoiser
from reward_jax.models.temporal.unet import TemporalUnet

__all__ = [
    "NetworkOptions",
    "Training",
    "TrainConfig",
    "check",
    "check_taken_over",
    "fit",
    "optimiser",
    "run_train",
    "space_of",
    "window_source",
]


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The temporal U-Net.

    Args:
        dim: channels of the first level.
        multipliers: channels of each level, in units of dim.
        attention: linear attention after each level.
    """

    dim: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4)
    attention: bool = False


@dataclasses.dataclass(frozen=True)
class Training:
    """How a denoiser is trained.

    Args:
        steps: optimiser steps.
        batch: trajectories of a step.
        learning_rate: of Adam; decays to 2% along a cosine, where decay is set.
        decay: see learning_rate.
        clip: largest norm of a gradient; 0 for none.
        prediction: what the network puts out: v, x0 or epsilon.
        action_weight: weight of the first action in the loss (actions only).
        ema_decay: of the average of the parameters.
        ema_every: steps between updates of the average.
        ema_begin: steps before it is begun.
        steps_per_call: steps of one compiled call.
    """

    steps: int = 8000
    batch: int = 64
    learning_rate: float = 1e-3
    decay: bool = True
    clip: float = 1.0
    prediction: Prediction = "v"
    action_weight: float = 1.0
    ema_decay: float = 0.995
    ema_every: int = 10
    ema_begin: int = 500
    steps_per_call: int = 100


@dataclasses.dataclass
class TrainConfig:
    """Train a diffusion model on the windows of a file of episodes.

    Args:
        data: a file of `reward-jax data`, D4RL's HDF5, or a Minari data set.
        out: the run's directory; it must not exist yet, unless resume is given.
        ends: where episodes of an HDF5 file end: at its marks, where the goal changes, nowhere
            (none: D4RL's Maze2D is one stream), or auto.
        init: a trained denoiser (file or run) to begin with: an expert from its base. Its network,
            horizon, stride, actions, normaliser, schedule, diffusion_steps and clip_x0 are taken
            over: leave those options out.
        horizon: rows of a trajectory.
        stride: environment steps between rows.
        actions: keep the actions in the trajectories.
        normaliser: limits (to -1 .. 1) or gaussian.
        schedule: cosine or linear.
        diffusion_steps: T.
        clip_x0: cut x_0 to [-clip_x0, clip_x0] when the model is used; 0 for none.
        network: of the denoiser.
        training: how it is trained.
        seed: of initial parameters and of all that is drawn.
        save_every: steps between checkpoints.
        resume: go on with the run in out, if there is one.
        mesh: devices; batches are cut over data and fsdp.
    """

    data: str
    out: str
    ends: EpisodeEnds = "auto"
    init: str | None = None
    horizon: int = 32
    stride: int = 10
    actions: bool = False
    normaliser: Literal["limits", "gaussian"] = "limits"
    schedule: Literal["cosine", "linear"] = "cosine"
    diffusion_steps: int = 50
    clip_x0: float = 1.2
    network: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)
    training: Training = dataclasses.field(default_factory=Training)
    seed: int = 0
    save_every: int = 1000
    resume: bool = False
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


@functools.cache
def optimiser(
    learning_rate: float, steps: int, *, decay: bool, clip: float
) -> optax.GradientTransformation:
    """Adam. One object for one setting: compiled steps are kept by their optimiser."""
    rate = optax.cosine_decay_schedule(learning_rate, steps, 0.02) if decay else learning_rate
    adam = optax.adam(rate)
    return optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam


def space_of(
    episodes: Episodes,
    *,
    horizon: int,
    stride: int,
    actions: bool,
    normaliser: str = "limits",
) -> Space:
    """The space of windows of these episodes, the normaliser fitted to all of their rows."""
    rows = transitions(episodes, actions=actions)
    make = {"limits": normalisers.limits, "gaussian": normalisers.gaussian}[normaliser]
    count = episodes.actions.shape[1] if actions else 0
    return Space(horizon, stride, count, make(rows), dict(episodes.about))


def window_source(episodes: Episodes, space: Space) -> Strided:
    """The windows of episodes in a model's space, ready to be drawn from on the device."""
    own, theirs = (about.get("maze") for about in (episodes.about, space.about))
    if None not in (own, theirs) and own != theirs:
        raise InputError(
            f"the data are of maze {own}, the model is of {theirs}: give its own data"
        )
    found = windows(
        episodes,
        space.normaliser,
        horizon=space.horizon,
        stride=space.stride,
        actions=space.actions > 0,
    )
    return Strided(jnp.asarray(found.flat), jnp.asarray(found.starts), found.horizon, found.stride)


def fit(
    source: Source,
    like: TrajectoryModel | None,
    space: Space,
    training: Training,
    *,
    seed: int,
    network: NetworkOptions | None = None,
    schedule: Any = None,
    clip_x0: float | None = None,
    on_step: OnStep | None = None,
    checkpoints: pathlib.Path | None = None,
    save_every: int | None = None,
    mesh: Mesh | None = None,
) -> TrajectoryModel:
    """Train a denoiser; like: one to begin with, whose network, schedule and clip are kept."""
    if like:
        old = like.denoiser
        model, schedule, clip_x0, params = old.model, old.schedule, old.clip, old.params
        _check_prediction(training, like)
    else:
        n = network or NetworkOptions()
        model = TemporalUnet(space.width, n.dim, tuple(n.multipliers), n.attention)
        params = None
    adam = optimiser(
        training.learning_rate, training.steps, decay=training.decay, clip=training.clip
    )
    state = start(model, adam, jnp.zeros((1, *space.shape)), jax.random.key(seed), params=params)
    weights = 1.0
    if space.actions:
        weights = action_weights(*space.shape, space.actions, training.action_weight)
    state, _ = train_denoiser(
        model,
        state,
        source,
        schedule,
        adam,
        steps=training.steps,
        key=jax.random.key(seed + 1),
        prediction=training.prediction,
        batch_size=training.batch,
        weights=weights,
        ema=EMA(training.ema_decay, training.ema_every, training.ema_begin),
        pin=space.pin,
        steps_per_call=training.steps_per_call,
        on_step=on_step,
        checkpoints=checkpoints,
        save_every=save_every,
        mesh=mesh,
    )
    average = jax.tree.map(np.asarray, state.average)
    denoiser = score_from(model, average, training.prediction, schedule, clip=clip_x0)
    return TrajectoryModel(denoiser, space)


def run_train(config: TrainConfig) -> pathlib.Path:
    """Train and write; returns the path of the denoiser.

    Raises InputError for bad settings or data before anything is written, and when the loss is no
    longer finite, naming the step.
    """
    check(config)
    check_directory(config.out, resume=config.resume)
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    like = load_model(config.init) if config.init else None
    if like:
        _check_prediction(config.training, like)
        check_taken_over(config, like)
    episodes = read_episodes(config.data, ends=config.ends)
    if like:
        space = dataclasses.replace(like.space, about=dict(episodes.about))
        schedule = None
    else:
        space = space_of(
            episodes,
            horizon=config.horizon,
            stride=config.stride,
            actions=config.actions,
            normaliser=config.normaliser,
        )
        schedule = make_schedule(config.schedule, config.diffusion_steps)
    source = window_source(episodes, space)
    out = pathlib.Path(config.out)
    written = dataclasses.asdict(config) | {"resume": False}
    done = steps_done(out / "checkpoints")
    check_resumed(out, written)
    with (
        Run(out, written, start=done) as run,
        reporter("training", config.training.steps, run, done) as on_step,
    ):
        model = fit(
            source,
            like,
            space,
            config.training,
            seed=config.seed,
            network=config.network,
            schedule=schedule,
            clip_x0=config.clip_x0 or None,
            on_step=on_step,
            checkpoints=out / "checkpoints",
            save_every=config.save_every,
            mesh=mesh,
        )
    path = out / "denoiser.safetensors"
    save_model(path, model)
    print(f"denoiser: {path}")
    return path


def _check_prediction(training: Training, like: TrajectoryModel) -> None:
    if like.denoiser.prediction != training.prediction:
        raise InputError(
            f"training.prediction is {training.prediction}, but the denoiser to begin with "
            f"predicts {like.denoiser.prediction}: give that"
        )


def check_taken_over(config: TrainConfig, like: TrajectoryModel) -> None:
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
    pairs = [(name, config, TrainConfig, value) for name, value in theirs.items()]
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


def check(config: TrainConfig) -> None:
    """InputError for settings that cannot be trained with."""
    check_seed(config.seed)
    t = config.training
    for name, value in (
        ("training.steps", t.steps),
        ("training.batch", t.batch),
        ("training.steps_per_call", t.steps_per_call),
        ("training.ema_every", t.ema_every),
        ("horizon", config.horizon),
        ("stride", config.stride),
        ("diffusion_steps", config.diffusion_steps),
        ("save_every", config.save_every),
        ("network.dim", config.network.dim),
    ):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, not {value}")
    if not t.learning_rate > 0:
        raise InputError(f"training.learning_rate must be above 0, not {t.learning_rate}")
    if config.network.dim % 8:
        raise InputError(f"network.dim must be a multiple of 8, not {config.network.dim}")
    if not config.network.multipliers or min(config.network.multipliers) < 1:
        raise InputError("network.multipliers must be whole numbers of 1 or more")
    part = 2 ** (len(config.network.multipliers) - 1)
    if not config.init and config.horizon % part:
        raise InputError(
            f"horizon must be a multiple of {part} for the {len(config.network.multipliers)} "
            f"levels of network.multipliers, not {config.horizon}"
        )
    for name, value in (
        ("training.clip", t.clip),
        ("training.ema_begin", t.ema_begin),
        ("training.action_weight", t.action_weight),
        ("clip_x0", config.clip_x0),
    ):
        if not value >= 0:
            raise InputError(f"{name} must be 0 or more, not {value}")
    if not 0 <= t.ema_decay < 1:
        raise InputError(f"training.ema_decay must be 0 or more and below 1, not {t.ema_decay}")
