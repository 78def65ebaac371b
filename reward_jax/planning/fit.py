"""A diffusion model, fitted to data: to the windows of recorded episodes, or to other samples.

    episodes = read_episodes("episodes.hdf5")
    space = space_of(episodes, horizon=32, stride=10, actions=False)
    begin = Untrained(cosine_schedule(50), NetworkOptions())
    model = fit(window_source(episodes, space), space, begin, Training(), seed=0)

Legend: H horizon, D transition width.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from common_jax import resume
from common_jax.cli.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from common_jax.errors import InputError
from common_jax.mesh import fetch
from common_jax.progress import bar
from common_jax.run import Run
from reward_jax.data.episodes import Episodes, transitions
from reward_jax.data.model import Space, SpaceModel
from reward_jax.data.trajectory import normalisers
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.data.trajectory.windows import Padding, windows
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.loop import OnStep, steps_done
from reward_jax.diffusion.process import action_weights
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import Source, Strided, example, split_batch
from reward_jax.diffusion.train import TrainingOptions, init_state, train_denoiser
from reward_jax.models.temporal.mlp import ResidualMLP
from reward_jax.models.temporal.unet import TemporalUnet

__all__ = [
    "AdamOptions",
    "Network",
    "NetworkOptions",
    "RunContext",
    "Training",
    "Untrained",
    "check_prediction",
    "fit",
    "open_run",
    "optimizer",
    "space_of",
    "window_source",
]


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The denoiser's network: the fields of both kinds that a user chooses, with their defaults.

    Args:
        kind: unet (the temporal U-Net) or mlp (a residual MLP over the whole window: quicker, and
            better at short horizons).
        dim: unet: channels of the first level.
        multipliers: unet: channels of each level, in units of dim.
        attention: unet: linear attention after each level.
        width: mlp: of every layer.
        blocks: mlp: how many, of two layers each.
    """

    kind: Literal["unet", "mlp"] = "unet"
    dim: PositiveInt = TemporalUnet.dim
    multipliers: tuple[PositiveInt, ...] = TemporalUnet.multipliers
    attention: bool = TemporalUnet.attention
    width: PositiveInt = ResidualMLP.width
    blocks: PositiveInt = ResidualMLP.blocks

    def make(self, space: TrajectorySpace) -> TemporalUnet | ResidualMLP:
        """The module, for trajectories of that space."""
        if self.kind == "mlp":
            return ResidualMLP(self.width, self.blocks)
        return TemporalUnet(space.width, self.dim, tuple(self.multipliers), self.attention)

    @staticmethod
    def of(module: Any) -> dict[str, Any]:
        """The options that would make a module; none for one of another kind."""
        kinds = {
            TemporalUnet: ("unet", ("dim", "multipliers", "attention")),
            ResidualMLP: ("mlp", ("width", "blocks")),
        }
        if type(module) not in kinds:
            return {}
        kind, fields = kinds[type(module)]
        return {"kind": kind, **{name: getattr(module, name) for name in fields}}

    def check(self, horizon: int | None = None) -> None:
        """Raise InputError for fields, or a horizon, that the network cannot have."""
        if self.kind == "mlp":
            return
        if self.dim % 8:
            raise InputError(f"network.dim must be a multiple of 8, not {self.dim}")
        if not self.multipliers:
            raise InputError("network.multipliers must be one number or more")
        part = 2 ** (len(self.multipliers) - 1)
        if horizon is not None and horizon % part:
            raise InputError(
                f"horizon must be a multiple of {part} for the {len(self.multipliers)} levels of "
                f"network.multipliers, not {horizon}"
            )


@dataclasses.dataclass(frozen=True)
class AdamOptions:
    """Adam, for a number of steps.

    Args:
        steps: optimizer steps.
        learning_rate: of Adam.
        decay: whether the learning rate decays to 2% along a cosine.
        weight_decay: decoupled from the gradient (AdamW); its share of a weight goes with each
            step, times the learning rate.
    """

    steps: PositiveInt
    learning_rate: PositiveFloat = 1e-3
    decay: bool = True
    weight_decay: NonNegativeFloat = 0.0


@dataclasses.dataclass(frozen=True)
class Training(TrainingOptions, AdamOptions):
    """How a denoiser of trajectories is trained.

    Args:
        clip: largest norm of a gradient; 0 for none.
        action_weight: weight of the first action in the loss (actions only).
    """

    steps: PositiveInt = 8000
    clip: NonNegativeFloat = 1.0
    action_weight: NonNegativeFloat = 1.0


S = TypeVar("S", bound=Space)
_S = TypeVar("_S", bound=Space, contravariant=True)
_DROPPED = 0.1  # share of rows that are trained on without their condition


class Network(Protocol[_S]):
    """Options of a network, such as `NetworkOptions`; `RewardOptions` are some of a reward's."""

    def make(self, space: _S, /) -> Any:
        """The module, for samples of that space."""
        ...


@dataclasses.dataclass(frozen=True)
class Untrained(Generic[S]):
    """A denoiser to be trained from nothing. clip_x0: bound of its estimates of x_0, or None."""

    schedule: Schedule
    network: Network[S]
    clip_x0: float | None = 1.2


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Progress, checkpoints and devices of a training run.

    on_step: called with (steps done, metrics) after each compiled call. checkpoints: folder of
    checkpoints, from which a run resumes exactly; one every `save_every` steps (None: at the end
    alone). mesh: batches are sharded over its data and fsdp axes.
    """

    on_step: OnStep | None = None
    checkpoints: pathlib.Path | None = None
    save_every: int | None = None
    mesh: Mesh | None = None


_FREE = ("out", "resume", "save_every", "mesh")  # settings that may change when a run goes on


@contextlib.contextmanager
def open_run(
    folder: pathlib.Path,
    settings: Mapping[str, Any],
    what: str,
    steps: int,
    *,
    save_every: int | None = None,
    mesh: Mesh | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Iterator[RunContext]:
    """A training of `steps` steps in a run's directory, which it holds alone.

    It goes on from its checkpoints, each call's means are logged, a bar named `what` is shown. Its
    files are written from the first call on: where `run_loop` refuses to go on, none is touched.
    settings: kept there; InputError where the run there began with others. inputs: checksums of
    what the settings name by a path alone, and `run_loop` does not compare; likewise.
    """
    checkpoints = folder / "checkpoints"
    run: Run | None = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(resume.hold(folder, {**settings, "inputs": inputs or {}}, free=_FREE))
        start = steps_done(checkpoints)
        shown = stack.enter_context(bar(what, steps, start=start))

        def on_step(done: int, metrics: dict[str, np.ndarray]) -> None:
            nonlocal run
            run = run or stack.enter_context(Run(folder, settings, start=start))
            means = {name: float(np.mean(value)) for name, value in metrics.items()}
            shown.update(done, f"loss {means['loss']:.4g}")
            if shown.speed:
                means["steps_per_second"] = shown.speed
            run.log(done, means)

        yield RunContext(on_step, checkpoints, save_every, mesh)


def optimizer(options: AdamOptions, *, clip: float = 0.0) -> optax.GradientTransformation:
    """Adam. clip: largest norm of a gradient; 0 for none.

    The number of steps, the learning rate and the weights' decay stand in its state, so that
    others compile no step anew: `update` is one function for all.
    """
    return _adam(options.steps, options.learning_rate, options.decay, options.weight_decay, clip)


@functools.cache
def _adam(
    steps: int, learning_rate: float, decay: bool, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    rule = _rule(clip)

    def init(params: PyTree[Float[Array, "..."]]) -> "_AdamState":
        rate, total = jnp.float32(learning_rate), jnp.float32(steps if decay else jnp.inf)
        shrink = jnp.float32(weight_decay)
        return _AdamState(rate, total, shrink, jnp.int32(0), rule.inner.init(params))

    return optax.GradientTransformation(init, rule.update)


class _AdamState(NamedTuple):
    """How far it is.

    rate: at the first step. total: steps until it has decayed, inf for never. shrink: the decay of
    weights. count: of steps so far.
    """

    rate: Float[Array, ""]
    total: Float[Array, ""]
    shrink: Float[Array, ""]
    count: Int[Array, ""]
    inner: Any


class _Rule(NamedTuple):
    inner: optax.GradientTransformation
    update: Any


@functools.cache  # compiled steps are cached by it: one object for each setting
def _rule(clip: float) -> _Rule:
    adam = optax.scale_by_adam()
    inner = optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam

    def update(updates: Any, state: _AdamState, params: Any) -> tuple[Any, _AdamState]:
        updates, moments = inner.update(updates, state.inner, params)
        done = jnp.minimum(state.count.astype(jnp.float32) / state.total, 1.0)
        rate = state.rate * (0.98 * 0.5 * (1 + jnp.cos(jnp.pi * done)) + 0.02)

        def move(x: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
            return -rate.astype(x.dtype) * (x + state.shrink.astype(x.dtype) * weight)

        updates = jax.tree.map(move, updates, params)
        return updates, state._replace(count=state.count + 1, inner=moments)

    return _Rule(inner, update)


def space_of(
    episodes: Episodes,
    *,
    horizon: int,
    stride: int,
    actions: bool,
    normaliser: str = "limits",
) -> TrajectorySpace:
    """The space of windows of these episodes, the normaliser fitted to all of their rows."""
    rows = transitions(episodes, actions=actions)
    make = {"limits": normalisers.limits, "gaussian": normalisers.gaussian}[normaliser]
    count = episodes.actions.shape[1] if actions else 0
    return TrajectorySpace(horizon, stride, count, make(rows), dict(episodes.about))


def window_source(
    episodes: Episodes, space: TrajectorySpace, padding: Padding = "none"
) -> Strided:
    """The windows of episodes in a model's space, as a source on the device.

    padding: see `windows`. Raises InputError for data of another task than the model's.
    """
    own, theirs = (about.get("task") for about in (episodes.about, space.about))
    if None not in (own, theirs) and own != theirs:
        raise InputError(f"the data are of {own}, the model is of {theirs}: give its own data")
    found = windows(
        episodes,
        space.normaliser,
        horizon=space.horizon,
        stride=space.stride,
        actions=space.actions > 0,
        padding=padding,
    )
    return Strided(jnp.asarray(found.flat), jnp.asarray(found.starts), found.horizon, found.stride)


def fit(
    source: Source,
    space: S,
    begin: Untrained[S] | SpaceModel[S],
    training: Training,
    *,
    seed: int,
    context: RunContext | None = None,
) -> SpaceModel[S]:
    """Train a denoiser on samples of `space`, from nothing or from another model.

    source: of x_0, of any space, as training needs no more of it than shape and pin; or of x_0 and
    a condition, which a tenth of the rows go without, for a network that says what stands for none
    (`null`, as `UNet2D`'s). begin: a model's network, schedule, clip and parameters are those to
    begin with. Raises InputError when the loss is no longer finite, naming the step.
    """
    context = context or RunContext()
    if isinstance(begin, Untrained):
        model, schedule = begin.network.make(space), begin.schedule
        clip_x0, params = begin.clip_x0, None
    else:
        check_prediction(training, begin)
        old = begin.denoiser
        model, schedule, clip_x0, params = old.model, old.schedule, old.clip, old.params
    adam = optimizer(training, clip=training.clip)
    rows, null = jnp.zeros((1, *space.shape)), None
    if (cond := split_batch(example(source))[1]) is not None:
        rows, null = (rows, jax.tree.map(lambda x: x[:1], cond)), jnp.asarray(model.null)
    state = init_state(model, adam, rows, jax.random.key(seed), params=params)
    weights = 1.0
    if isinstance(space, TrajectorySpace) and space.actions:
        weights = action_weights(*space.shape, space.actions, training.action_weight)
    state, _ = train_denoiser(
        model,
        state,
        source,
        schedule,
        adam,
        steps=training.steps,
        key=jax.random.key(seed + 1),
        options=training,
        weights=weights,
        drop_condition=0.0 if null is None else _DROPPED,
        null=null,
        pin=space.pin,
        on_step=context.on_step,
        checkpoints=context.checkpoints,
        save_every=context.save_every,
        mesh=context.mesh,
    )
    average = fetch(state.average)
    denoiser = score_from(model, average, training.prediction, schedule, clip=clip_x0)
    return SpaceModel(denoiser, space, null)


def check_prediction(training: Training, like: SpaceModel[Any]) -> None:
    """Raise InputError where the model to begin with predicts something else."""
    if like.denoiser.prediction != training.prediction:
        raise InputError(
            f"training.prediction is {training.prediction}, but the denoiser to begin with "
            f"predicts {like.denoiser.prediction}: give that"
        )
