"""What a report shows of a base, an expert and the reward between them.

    compared = compare(base, expert, guide)
    measured = measure(compared, rows, PageOptions(plans=64))
    measured.lines()

Legend: N windows of H rows, D wide, or N images; S steps of the sampler; L looks.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from common_jax.cli.options import SeedOption
from common_jax.errors import InputError
from reward_jax.data.model import SpaceGuide, SpaceModel
from reward_jax.planning.kinds import HeldOut, Kind, kind_of_space
from reward_jax.planning.maps import each_seed, map_of
from reward_jax.planning.options import RolloutOption, SteeredOption
from reward_jax.planning.plan import plan, planner
from reward_jax.planning.steer import outcomes
from reward_jax.reward.measure import Looks, auc, scores
from reward_jax.reward.relative import RelativeReward
from reward_jax.tasks.base import Outcome, Planner, Task
from reward_jax.tasks.find import task_and_goal
from reward_jax.tasks.plane import HeatMap, MapOptions, Peak, Plane

__all__ = ["SHOWN", "Compared", "Maps", "Measured", "PageOptions", "Judged", "compare", "measure"]

SHOWN = 48  # trajectories or images of a figure
_LOOKS = 8  # diffusion steps at which a reward is asked about held-out images
_PLANNERS = ("base, unsteered", "base, steered by the reward", "expert")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageOptions(SeedOption, MapOptions, RolloutOption, SteeredOption):
    """What is measured: plans, and windows of a map."""


@dataclasses.dataclass(frozen=True)
class Compared:
    """A base, an expert and the reward between them, in their world."""

    base: SpaceModel[Any]
    expert: SpaceModel[Any]
    guide: SpaceGuide[Any]
    task: Task
    goal: Any

    @property
    def kind(self) -> Kind[Any]:
        """What their samples are."""
        return kind_of_space(self.base.space)

    @property
    def reward(self) -> RelativeReward:
        """The guide, which is one."""
        assert isinstance(self.guide.guide, RelativeReward)
        return self.guide.guide


def compare(base: SpaceModel[Any], expert: SpaceModel[Any], guide: SpaceGuide[Any]) -> Compared:
    """The three; raises InputError where they do not fit one another, or have no goal."""
    if not isinstance(guide.guide, RelativeReward):
        raise InputError("the guide is a discriminator; a reward is wanted")
    kind = kind_of_space(base.space)
    kind.check_steers("base and reward", base, guide)
    kind.check_same("base and expert", base.space, expert.space)
    return Compared(base, expert, guide, *task_and_goal(guide.space.about))


@dataclasses.dataclass(frozen=True, eq=False)
class Maps:
    """In the plane of a world: where the reward is high, and how one plan takes shape.

    seed_peaks: of each seed's map. chain: one plan's steered denoising, noise first. left:
    diffusion steps that are left at each.
    """

    map: HeatMap
    peak: Peak
    seed_peaks: Float[np.ndarray, "seeds 2"]
    chain: Float[np.ndarray, "S+1 H 2"]
    left: Int[np.ndarray, " S+1"]


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """The reward of held-out images, each noised at some diffusion steps.

    t: these. rewards: the network's own output. lacking: images of classes that the expert was
    tuned on without; None where that is not known, or there are none, or no others.
    """

    t: Int[np.ndarray, " L"]
    rewards: Float[np.ndarray, "L N"]
    lacking: Bool[np.ndarray, " N"] | None

    def aucs(self) -> list[float]:
        """At each step, the share of pairs in which an image that is lacking has the lower."""
        assert self.lacking is not None
        return [auc(one, self.lacking) for one in self.rewards]

    def __str__(self) -> str:
        if self.lacking is None:
            return f"reward of {self.rewards.shape[1]} images of the data"
        found = self.aucs()
        best = int(np.argmax(found))
        return (
            "images of classes that the expert was tuned on without have the lower reward: AUC "
            f"{found[best]:.3f} at t {self.t[best]}, the highest of {len(found)} steps"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """What a page shows.

    recorded: some of the base's data, as the task draws them. outcomes: by what was steered.
    maps: None without a plane. judged: None without held-out data. metrics, diagnostics: of the
    reward's training, where it kept any.
    """

    compared: Compared
    options: PageOptions
    recorded: Shaped[np.ndarray, "B ..."]
    outcomes: dict[str, Outcome]
    maps: Maps | None
    judged: Judged | None = None
    metrics: Sequence[Mapping[str, float]] = ()
    diagnostics: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """What was found, in words: the peak against the goal, and the outcomes."""
        summarise = self.compared.task.summarise
        found = [f"{name}: {summarise(one.means())}" for name, one in self.outcomes.items()]
        found += [str(self.judged)] if self.judged else []
        return [str(self.maps.peak), *found] if self.maps else found


def measure(
    compared: Compared,
    rows: Float[np.ndarray, "N ..."],
    options: PageOptions,
    *,
    held_out: HeldOut | None = None,
    metrics: Sequence[Mapping[str, float]] = (),
    diagnostics: Mapping[str, Any] | None = None,
) -> Measured:
    """Plan with base and expert, unsteered and steered, and map the reward over `rows`.

    rows: of the base's data, as its model sees them. held_out: what the reward is asked about.
    """
    c, key = compared, jax.random.key(options.seed + 1)
    starts = c.task.starts(options.plans, options.seed)
    how: dict[str, Any] = dict(options=options.guidance)
    planners = (
        planner(c.base, **how),
        planner(c.base, guide=c.reward, **how),
        planner(c.expert, **how),
    )
    named: dict[str, Planner] = dict(zip(_PLANNERS, planners, strict=True))
    found = outcomes(c.task, named, starts, key=key, goal=c.goal, rollout=options.rollout)
    maps = _maps(c, c.task.plane, rows, starts, options, key) if c.task.plane else None
    recorded = c.task.recorded(c.kind.observed(rows[:SHOWN], c.base.space))
    judged = _judged(c, held_out, key) if held_out else None
    return Measured(c, options, recorded, found, maps, judged, metrics, diagnostics or {})


def _judged(compared: Compared, held_out: HeldOut, key: Key[Array, ""]) -> Judged:
    """The reward at steps from the first to the last."""
    schedule = compared.guide.schedule
    t = np.unique(np.linspace(0, schedule.steps - 1, _LOOKS).round().astype(np.int32))
    found = scores(compared.reward, held_out.x_0, Looks(schedule, t, key))
    lacking = held_out.lacking
    both = lacking is not None and 0 < lacking.sum() < len(lacking)
    return Judged(t, found, lacking if both else None)


def _maps(
    compared: Compared,
    plane: Plane,
    rows: Float[np.ndarray, "N H D"],
    starts: Float[np.ndarray, "B O"],
    options: PageOptions,
    key: Array,
) -> Maps:
    """Maps of the reward and of each seed; the denoising of the plan that starts farthest off."""
    base, guide, guidance = compared.base, compared.guide, options.guidance
    away = np.linalg.norm(plane.positions(starts) - np.asarray(compared.goal), axis=1)
    farthest = np.argsort(-away)[:1]
    chain = plan(
        base,
        starts[farthest],
        key=key,
        chain=True,
        guide=compared.reward,
        options=guidance,
    )[:, 0]
    found, *seeds = (
        map_of(plane, one, rows, bins=options.bins) for one in (guide, *each_seed(guide))
    )
    steps = np.asarray(guidance.made_sampler().timesteps(base.denoiser.schedule))
    return Maps(
        map=found,
        peak=Peak.of(found, plane, compared.goal),
        seed_peaks=np.stack([seed.peak for seed in seeds]),
        chain=plane.positions(base.space.plans(chain).observations),
        left=np.append(steps + 1, 0),
    )
