"""What a step of training or of extraction would take on devices that are not here.

Nothing is read but options: those of a paper's config, and the widths of its data. `reward-jax
plan train` and `reward-jax plan extract` run this.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, Literal

from common_jax.cli.ranges import NonNegativeInt, PositiveInt, check_ranges
from common_jax.errors import InputError
from reward_jax.planning.kinds import TRAJECTORIES, check_own
from reward_jax.planning.options import DiffusionOption, NetworkOption
from reward_jax.planning.reward_run import RewardRunOptions
from reward_jax.planning.train_run import TrainOptions

if TYPE_CHECKING:
    from common_jax.plan import Device, Plan

__all__ = [
    "DevicePlanOptions",
    "ExtractionPlanOptions",
    "PlanOptions",
    "TrainingPlanOptions",
    "plan_extraction",
    "plan_training",
    "sizes_of",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DevicePlanOptions:
    """On what it would run.

    Args:
        device: what each of the mesh's devices is.
        figures: a .json file for all figures.
    """

    device: Literal["tpu-v5e", "h100"] = "h100"
    figures: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(DevicePlanOptions):
    """What the data would be, too.

    Args:
        observation: numbers of an observation.
        action: numbers of an action, where trajectories have them.
        recorded: environment steps of the data.
    """

    observation: PositiveInt
    action: NonNegativeInt = 0
    recorded: PositiveInt = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlanOptions(PlanOptions, TrainOptions):
    """Plan `reward-jax train`: its config, of which no file is read."""

    data: str = ""
    out: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtractionPlanOptions(PlanOptions, NetworkOption, DiffusionOption, RewardRunOptions):
    """Plan `reward-jax extract`: its config, of which no file is read.

    Args:
        horizon: rows of a trajectory.
    """

    base: str = ""
    expert: str = ""
    out: str = ""
    horizon: PositiveInt = 32


_MOST_BLOCKS = 1_000  # each is compiled
_MOST_LEVELS = 1_000_000  # of noise, tables on the host


def plan_training(options: TrainingPlanOptions) -> "tuple[Plan, Device]":
    """Compile one step of training.

    Raises InputError for options that do not fit one another, and for sizes beyond counting.
    """
    check_ranges(options)
    check_own(TRAJECTORIES, "what is planned is", options)
    sizes = sizes_of(options)
    _check_sizes(options, options.training.batch_size)
    options.network.check(options.horizon)
    import jax
    import jax.numpy as jnp

    from common_jax import partition
    from common_jax.mesh import make_mesh
    from common_jax.plan import DEVICES, abstract, devices, plan
    from reward_jax.diffusion.schedule import make_schedule
    from reward_jax.diffusion.train import init_state, steps_of
    from reward_jax.planning.fit import optimizer
    from reward_jax.sharding import RULES

    with devices(math.prod(sizes.values())) as found:
        mesh = make_mesh(**sizes, devices=found)
        space = _space(options, options.action if options.actions else 0)
        network, adam = options.network.make(space), optimizer(options.training)
        schedule = make_schedule(options.schedule, options.diffusion_steps)
        key = jax.random.key(0)
        state = jax.eval_shape(
            lambda: init_state(network, adam, jnp.zeros((1, *space.shape)), key)
        )
        step = steps_of(network, adam, options.training, pin=space.pin, mesh=mesh)

        def train(**given: Any) -> Any:
            parts = (given[name] for name in ("params", "average", "optimizer"))
            first = jnp.arange(1)
            return step(
                type(state)(*parts), given["data"], schedule, jnp.ones(()), None, key, first
            )

        where = partition.placement(RULES, mesh)
        arguments = {name: abstract(tree, where) for name, tree in state._asdict().items()}
        arguments["data"] = abstract(_windows(options, space), where)
        return plan(
            train,
            arguments,
            mesh,
            "float32",
            weights=("params",),
            donated=("params", "average", "optimizer"),
        ), DEVICES[options.device]


def plan_extraction(options: ExtractionPlanOptions) -> "tuple[Plan, Device]":
    """Compile one step of extraction, the teachers asked. Raises InputError as `plan_training`."""
    check_ranges(options)
    sizes = sizes_of(options)
    _check_sizes(options, options.matching.batch_size)
    options.network.check(options.horizon)
    options.matching.check(options.diffusion_steps)
    if TRAJECTORIES.reward(options).kind == "energy":
        raise InputError("reward.kind energy is not planned for: give window or half_unet")
    import jax
    import jax.numpy as jnp

    from common_jax import partition
    from common_jax.mesh import make_mesh
    from common_jax.plan import DEVICES, abstract, devices, plan
    from reward_jax.diffusion.denoiser import score_from
    from reward_jax.diffusion.loop import begin
    from reward_jax.diffusion.schedule import cosine_schedule
    from reward_jax.planning.fit import optimizer
    from reward_jax.reward.extract import init_params, learn
    from reward_jax.reward.targets import TargetSettings, Teachers
    from reward_jax.sharding import RULES

    m = options.matching
    with devices(math.prod(sizes.values())) as found:
        mesh = make_mesh(**sizes, devices=found)
        space = _space(options, options.action)
        network, reward = options.network.make(space), options.reward.make(space)
        adam, schedule = optimizer(m), cosine_schedule(options.diffusion_steps)
        key, example = jax.random.key(0), jnp.zeros((1, *space.shape))
        pin = space.pin if m.pin else None
        settings = TargetSettings(m.target, m.gradient_at, pin, m.batch_size, mesh)

        def extract(**given: Any) -> Any:
            base, expert = (
                score_from(network, given[name], "x0", schedule) for name in ("base", "expert")
            )
            teachers = Teachers(base, expert, schedule, settings)
            targets = teachers.targets(key, given["data"], jnp.arange(1), None)
            state, weights = (given["reward"], given["optimizer"]), jnp.ones(schedule.steps)
            fixed: dict[str, Any] = dict(
                reward=reward, rule=adam.update, pin=pin, seeds=True, apart=False
            )
            return learn(state, weights, None, targets, **fixed, mesh=mesh)

        t = jnp.zeros(1, jnp.int32)
        model = jax.eval_shape(lambda: network.init(key, example, t)["params"])
        params = jax.eval_shape(lambda: init_params(reward, key, example, m.seeds))
        moments = jax.eval_shape(functools.partial(begin, optimizer=adam, seeds=True), params)
        where = partition.placement(RULES, mesh)
        trees = {"base": model, "expert": model, "reward": params, "optimizer": moments}
        trees["data"] = _windows(options, space)
        arguments = {name: abstract(tree, where) for name, tree in trees.items()}
        return plan(
            extract,
            arguments,
            mesh,
            "float32",
            weights=("base", "expert", "reward"),
            donated=("reward", "optimizer"),
        ), DEVICES[options.device]


def sizes_of(options: Any) -> dict[str, int]:
    """The mesh's sizes; InputError for one that only devices that are here could tell."""
    sizes = dataclasses.asdict(options.mesh)
    if -1 in sizes.values():
        raise InputError("mesh: -1 is for devices that are here; a plan wants each size")
    return sizes


def _check_sizes(options: Any, batch: int) -> None:
    """InputError for the first size that is too large; batch: windows of a step."""
    from common_jax.cost import LARGEST
    from common_jax.plan import check_sizes

    check_sizes(options)
    most = (("network.blocks", options.network.blocks, _MOST_BLOCKS),)
    most += (("diffusion_steps", options.diffusion_steps, _MOST_LEVELS),)
    for name, given, largest in most:
        if given > largest:
            raise InputError(f"{name} must be at most {largest} to be planned, not {given}")
    width = options.observation + options.action
    if (numbers := batch * options.horizon * width) > LARGEST:
        raise InputError(
            f"{batch} windows of horizon {options.horizon} and {width} numbers a row are "
            f"{numbers:.1e} numbers, and a compiler counts {LARGEST:.1e}: give fewer"
        )


def _space(options: Any, actions: int) -> Any:
    """The space of such trajectories."""
    import numpy as np

    from reward_jax.data.trajectory.normalisers import Normaliser
    from reward_jax.data.trajectory.space import TrajectorySpace

    width = options.observation + actions
    unit = Normaliser(np.zeros(width, np.float32), np.ones(width, np.float32))
    return TrajectorySpace(options.horizon, getattr(options, "stride", 1), actions, unit, {})


def _windows(options: Any, space: Any) -> Any:
    """The shapes of a source of that many steps of data, a window from each."""
    import jax
    import jax.numpy as jnp

    from reward_jax.diffusion.sources import Strided

    flat: Any = jax.ShapeDtypeStruct((options.recorded, space.width), jnp.float32)
    starts: Any = jax.ShapeDtypeStruct((options.recorded,), jnp.int32)
    return Strided(flat, starts, space.horizon, space.stride)
