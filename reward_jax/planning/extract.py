"""The reward of one model relative to another, and diagnostics of it.

Legend: B batch, T diffusion steps; samples have any shape.
"""

import dataclasses
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from common_jax.cli.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from common_jax.errors import InputError
from common_jax.mesh import fetch
from reward_jax.data.episodes import Episodes
from reward_jax.data.model import Space, SpaceGuide, SpaceModel
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.data.trajectory.windows import Padding, begins
from reward_jax.diffusion.denoiser import Score
from reward_jax.diffusion.process import action_weights
from reward_jax.diffusion.schedule import Schedule
from reward_jax.diffusion.sources import Source
from reward_jax.models.energy import EnergyDifference, energy_of
from reward_jax.models.reward_nets import Cut, HalfUnet, Head, Reduce, WindowMLP
from reward_jax.models.temporal.layers import Activation
from reward_jax.planning.fit import AdamOptions, Network, RunContext, optimizer
from reward_jax.reward.diagnostics import antisymmetric_part, explained_fraction, seed_agreement
from reward_jax.reward.extract import extract_reward, init_params
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.paths import draw_path_targets, join_targets
from reward_jax.reward.relative import RelativeReward
from reward_jax.reward.targets import (
    Drawn,
    ExtractionOptions,
    Target,
    draw_targets,
    origin,
    unit,
)

__all__ = ["Matching", "Noised", "RewardOptions", "diagnose", "fit_reward", "hold_out"]

S = TypeVar("S", bound=Space)
Noised = Literal["mixed", "base", "expert"]  # whose data


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """The reward network: the fields of all kinds that a user chooses, with their defaults.

    Args:
        kind: window (a network over windows of the trajectory), half_unet, or energy (the
            difference of both denoisers' energies, which begins as they are: dear, and best).
        window: time steps of a window, a divisor of the horizon; 0 for the whole trajectory.
        widths: hidden layers of a window's network.
        act: activation. The gradient is what is trained: piecewise linear ones fail (the authors
            have leaky_relu).
        cut: windows of neighbouring steps, or strided as the authors cut them.
        reduce: how windows are combined.
        dim: half_unet: unit of the channels, and width of the time embedding.
        multipliers: half_unet: channels of each level, in units of dim.
        groups: half_unet: of the group norms; 0 for none (the authors').
        use_bias: half_unet: of the convolutions; the authors' have none.
        head: window: linear, or activated: one more activation and scale (the authors').
    """

    kind: Literal["window", "half_unet", "energy"] = "window"
    window: NonNegativeInt = 0
    widths: tuple[PositiveInt, ...] = WindowMLP.widths
    act: Activation = WindowMLP.act
    cut: Cut = WindowMLP.cut
    reduce: Reduce = WindowMLP.reduce
    dim: PositiveInt = HalfUnet.dim
    multipliers: tuple[PositiveInt, ...] = HalfUnet.multipliers
    groups: NonNegativeInt = HalfUnet.groups or 0
    use_bias: bool = HalfUnet.use_bias
    head: Head = WindowMLP.head

    def check(self, horizon: int) -> None:
        """InputError for options that do not fit one another, or windows of this length."""
        if self.kind == "half_unet":
            channels = [self.dim * m for m in self.multipliers]
            groups = self.groups or 1  # the last blocks have half and a quarter of the channels
            whole = channels and groups > 0 and not any(c % groups for c in channels)
            if not whole or channels[-1] % (4 * groups) or self.dim % 4:
                raise InputError(
                    "reward.dim must be a multiple of 4, reward.groups 0 or more, and dim times "
                    f"reward.multipliers multiples of {groups}, the last of {4 * groups}; not "
                    f"{channels}"
                )
        elif self.kind == "window" and horizon % (self.window or horizon):
            raise InputError(
                f"reward.window {self.window} does not divide the horizon {horizon}: choose one "
                "that does, or 0 for the whole trajectory"
            )

    def make(self, space: TrajectorySpace) -> Any:
        """The module, but for an energy; InputError for options that do not fit the space."""
        self.check(space.horizon)
        if self.kind == "half_unet":
            return HalfUnet(
                self.dim,
                tuple(self.multipliers),
                act=self.act,
                groups=self.groups or None,
                use_bias=self.use_bias,
            )
        return WindowMLP(
            self.window or space.horizon,
            tuple(self.widths),
            act=self.act,
            cut=self.cut,
            reduce=self.reduce,
            head=self.head,
        )


@dataclasses.dataclass(frozen=True)
class Matching(ExtractionOptions, AdamOptions):
    """How gradients of trajectories are matched.

    Args:
        target: epsilon, score or posterior_mean (the authors').
        weighting: "" for none, or standardise: one over the target's mean square at each t.
        t_weights: weights of the error by t, one for each step of diffusion, beside `weighting`'s
            unit; empty for 1.
        x_t: whose data are noised: mixed, base or expert. The expert's alone (the authors') leave
            out the places in which the two models differ.
        pin: impose the first state on x_t (the authors do not).
        draws: targets that are computed once, before training; 0: new ones at every step.
        seeds: rewards trained at once.
        action_weight: weight of the first action, which is executed, in the error.
        path_draws: targets on guided paths, besides: where samples go that a guide moves, and a
            reward of noised data alone may be wrong. The raw difference of the scores guides
            them, or the reward to begin with.
        path_scale: guidance scale of these paths.
    """

    steps: PositiveInt = 1500
    target: Target = "epsilon"
    weighting: Literal["", "standardise"] = ""
    t_weights: tuple[NonNegativeFloat, ...] = ()
    x_t: Noised = "mixed"
    pin: bool = True
    draws: NonNegativeInt = 20000
    seeds: PositiveInt = 3
    action_weight: NonNegativeFloat = 1.0
    path_draws: NonNegativeInt = 0
    path_scale: NonNegativeFloat = 1.0

    def check(self, steps: int) -> None:
        """Raise InputError for options that do not go together, for so many steps of diffusion."""
        if self.path_draws and not self.draws:
            raise InputError("matching.path_draws needs matching.draws, to which they are added")
        if self.t_weights and self.weighting:
            raise InputError("matching.t_weights and matching.weighting: give one of them")
        if self.t_weights and (len(self.t_weights) != steps or not any(self.t_weights)):
            raise InputError(
                f"matching.t_weights are {len(self.t_weights)}: give one for each of the {steps} "
                "steps of diffusion, some above 0"
            )


def fit_reward(
    base: SpaceModel[S],
    expert: Score,
    source: Source,
    space: S,
    options: Network[S],
    matching: Matching,
    *,
    seed: int,
    begin: RelativeReward | None = None,
    paths: Source | None = None,
    context: RunContext | None = None,
) -> SpaceGuide[S]:
    """Extract the reward of an expert relative to a base.

    expert: its score in the base's coordinates (`expert_in_base_coordinates`). source: of x_0.
    space: the base's, with the expert's `about` (its goal). options: of the reward network. begin:
    a reward to begin with, whose network, target and seeds are taken over. paths: of the rows that
    guided paths begin from, by default `source`. Raises InputError for options that do not fit one
    another, or these models.
    """
    context = context or RunContext()
    key, schedule = jax.random.key(seed), base.denoiser.schedule
    matching.check(schedule.steps)
    start = begin or _beginning(base, expert, space, options, matching, key)
    shared: dict[str, Any] = dict(
        target=start.target,
        pin=space.pin if matching.pin else None,
        options=dataclasses.replace(matching, apart=True) if _alike(start) else matching,
        mesh=context.mesh,
    )
    batches: Any = source
    both = base.denoiser, expert
    if matching.draws:
        batches = draw_targets(*both, source, schedule, count=matching.draws, key=key, **shared)
    if matching.path_draws:
        on_paths = draw_path_targets(
            *both,
            source if paths is None else paths,
            schedule,
            guide=begin or ScoreDifference(*both),
            count=matching.path_draws,
            key=jax.random.fold_in(key, 2),
            guidance=GuidanceOptions(scale=matching.path_scale),
            **shared,
        )
        batches = join_targets(batches, on_paths)
    if matching.draws and context.checkpoints:
        m = matching
        drawn = (key, begin, start.target, m.pin, m.apart, m.draws, m.path_draws, m.path_scale)
        drawn += () if paths is None else (paths,)
        of = origin(*both, source, schedule, options=matching, others=drawn)
        batches = Drawn(batches, of)
    params, _ = extract_reward(
        *both,
        start.reward,
        start.params,
        batches,
        schedule,
        optimizer(matching),
        steps=matching.steps,
        key=jax.random.fold_in(key, 1),
        weighting=_weighting(matching, start.target, schedule),
        entries=_entries(matching, space),
        seeds=start.seeds,
        on_step=context.on_step,
        checkpoints=context.checkpoints,
        save_every=context.save_every,
        **shared,
    )
    found = dataclasses.replace(start, params=fetch(params))
    return SpaceGuide(found, space, schedule)


def _beginning(
    base: SpaceModel[S],
    expert: Score,
    space: S,
    options: Network[S],
    matching: Matching,
    key: Array,
) -> RelativeReward:
    """A reward that is not yet trained: of random parameters, or an energy of the denoisers'."""
    schedule, seeds = base.denoiser.schedule, matching.seeds
    if getattr(options, "kind", None) == "energy":
        actions = None
        if isinstance(space, TrajectorySpace) and matching.pin:
            actions = space.actions
        network, own = energy_of(base.denoiser, expert, actions=actions)
        params = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * seeds), own)
        return RelativeReward(params, schedule, network, "score", seeds)
    network = options.make(space)
    params = init_params(network, key, jnp.zeros((1, *space.shape)), seeds)
    return RelativeReward(params, schedule, network, matching.target, seeds)


def _alike(start: RelativeReward) -> bool:
    """Whether seeds begin alike, so that nothing but the rows that they see sets them apart."""
    return (start.seeds or 1) > 1 and isinstance(start.reward, EnergyDifference)


def _weighting(matching: Matching, own: Target, schedule: Schedule) -> Any:
    """w(t), so that errors count in the unit of matching.target, whatever the network's own is."""
    if matching.weighting:
        return matching.weighting
    given = jnp.asarray(matching.t_weights) if matching.t_weights else None
    if own == matching.target:
        return given
    same = jnp.square(unit(schedule, matching.target) / unit(schedule, own))
    return same if given is None else same * given


def _entries(matching: Matching, space: Any) -> Float[np.ndarray, "H D"] | None:
    if matching.action_weight == 1:
        return None
    if not (isinstance(space, TrajectorySpace) and space.actions):
        raise InputError("matching.action_weight is of trajectories with actions: leave it out")
    return action_weights(*space.shape, space.actions, matching.action_weight)


def diagnose(
    guide: SpaceGuide[Any],
    base: Score,
    expert: Score,
    held_out: Float[Array, "B ..."],
    *,
    matching: Matching,
    seed: int = 0,
) -> dict[str, list[float]]:
    """The diagnostics at each t, over samples that were held out of training.

    matching: how the reward was trained; its pin and gradient_at are used here, too.
    """
    reward, schedule = guide.guide, guide.schedule
    assert isinstance(reward, RelativeReward)
    key, pinned = jax.random.key(seed), guide.space.pin if matching.pin else None
    found = {
        "explained": explained_fraction(
            reward,
            base,
            expert,
            held_out,
            schedule,
            key=key,
            pin=pinned,
            gradient_at=matching.gradient_at,
        ),
        "antisymmetric": antisymmetric_part(
            base, expert, held_out[:64], schedule, key=key, probes=2, pin=pinned
        ),
    }
    if reward.seeds and reward.seeds > 1:
        at = base if matching.gradient_at == "posterior_mean" else None
        found["seed_agreement"] = seed_agreement(
            reward, held_out, key=key, pin=pinned, base_score=at
        )
    return {name: np.asarray(value, np.float64).tolist() for name, value in fetch(found).items()}


def hold_out(
    episodes: Episodes, share: float, space: TrajectorySpace, padding: Padding = "none"
) -> tuple[Episodes, Episodes]:
    """Episodes to train on, and a `share` of them held out; both are all episodes if too few.

    Of those in which a window begins every (1 / share)-th is held out.
    """
    span = (space.horizon - 1) * space.stride + 1
    long = np.flatnonzero(begins(episodes, span, padding))
    every = round(1 / share) if share else len(long) + 1
    apart = np.zeros(len(episodes.lengths), bool)
    apart[long[every - 1 :: every]] = True
    if not apart.any():
        return episodes, episodes
    return episodes.choose(~apart), episodes.choose(apart)
