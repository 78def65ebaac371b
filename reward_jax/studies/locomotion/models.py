"""What the locomotion study trains for one robot: made where it is not there.

An ablation of a robot has models of its own where its change touches them. All others are the
robot's: `Models.untouched` says which, and `_shareable` takes them from there.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

import jax
import numpy as np

from common_jax.distributed import there
from common_jax.io.files import read_arrays, read_json, write_arrays, write_json
from common_jax.mesh import mesh_for
from reward_jax.data.episodes import Episodes
from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel, TrajectorySpace
from reward_jax.diffusion.denoiser import Score
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Mixed, Rows, Strided
from reward_jax.planning.extract import Noised, fit_reward
from reward_jax.planning.fit import RunContext, Untrained, fit, space_of, window_source
from reward_jax.planning.plan import Watched, planner, start_rows
from reward_jax.reward.gradients import SteeredScore
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.relative import RelativeReward
from reward_jax.studies.locomotion.arms import World
from reward_jax.studies.locomotion.data import (
    NOTES,
    PADDING,
    facts_of,
    is_recorded,
    limits_of,
    read_data,
)
from reward_jax.studies.locomotion.settings import Config, Rounds, ablated, given, sources
from reward_jax.studies.workshop import Workshop
from reward_jax.tasks.locomotion.task import LocomotionTask

__all__ = ["Models", "ablation_part", "slug"]

Made = TypeVar("Made")


def _shareable(make: Callable[["Models"], Made]) -> functools.cached_property[Made]:
    """A model that is made or read once; the robot's own where an ablation does not touch it."""

    @functools.wraps(make)
    def take(models: "Models") -> Made:
        if models.whole and make.__name__ in models.untouched:
            return getattr(models.whole, make.__name__)
        return make(models)

    return functools.cached_property(take)


class Models:
    """The data and the models of one robot, or of an ablation of it.

    name: of the robot. part: of the study, whose folder they stand in; None for the robot's.
    sampling: how plans are drawn, but for what an arm sets. limits: "base" or "expert" -> episodes
    of data of others, where not all are learned from. whole: the robot's own, of an ablation.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        *,
        part: str | None = None,
        sampling: GuidanceOptions | None = None,
        limits: Mapping[str, int] | None = None,
        whole: "Models | None" = None,
    ) -> None:
        self.config, self.own, self.task = config, config.robots[name], LocomotionTask(name)
        self.part, self.whole = part or name, whole
        self.sampling, self.limits = sampling or GuidanceOptions(), limits or {}
        self.sources = sources(config, name)
        self.mesh = mesh_for(asdict(config.mesh))
        self.shop = Workshop(
            config.out, self.part, TrajectorySpace, save_every=config.save_every, mesh=self.mesh
        )

    # Ablations.

    def ablation(self, name: str) -> "Models":
        """Those of an ablation of this robot."""
        change, sampling = self.config.ablations[name], self.sampling
        if steps := change.sampling_steps:
            skip = given(skip=change.skip)
            sampling = replace(sampling, sampler="ddim", sampling_steps=steps, **skip)
        return Models(
            ablated(self.config, name),
            self.task.name,
            part=ablation_part(name),
            sampling=sampling,
            limits=limits_of(change),
            whole=self,
        )

    @functools.cached_property
    def untouched(self) -> frozenset[str]:
        """The models that an ablation's change does not touch.

        Where it is of the reward alone the judge is one of them: its arm is a bound, which stays.
        """

        def learned(models: Models) -> tuple[int, ...]:
            config = models.config
            return config.base_episodes, config.expert_episodes, config.seed

        whole = self.whole
        if whole is None or learned(self) != learned(whole):
            return frozenset()
        same_reward = replace(self.own, distilled=None) == replace(whole.own, distilled=None)
        return frozenset({"base", "expert", "judge", *(["reward"] if same_reward else [])})

    # Models.

    @_shareable
    def base(self) -> TrajectoryModel:
        """The base, in a space of its own: a Gaussian normaliser, nothing clipped."""
        own, seed = self.own, self.seed("base")

        def make(context: RunContext) -> TrajectoryModel:
            data = self.base_data
            space = space_of(
                data, horizon=own.horizon, stride=1, actions=True, normaliser="gaussian"
            )
            source = window_source(data, space, PADDING)
            begin = Untrained(cosine_schedule(own.diffusion_steps), own.network, None)
            return fit(source, space, begin, own.base_training, seed=seed, context=context)

        return self.shop.model("base", own.base_training.steps, make)

    @_shareable
    def expert(self) -> TrajectoryModel:
        """The base, trained further on the expert's data, in the base's space."""
        training = self.own.expert_training

        def make(context: RunContext) -> TrajectoryModel:
            source = self.windows(self.expert_data)
            space = replace(self.base.space, about=dict(self.expert_data.about))
            seed = self.seed("expert")
            return fit(source, space, self.base, training, seed=seed, context=context)

        return self.shop.model("expert", training.steps, make)

    @functools.cached_property
    def unseen(self) -> TrajectoryModel:
        """A base of other data, from nothing, under the first one's normaliser."""
        training, old = self.own.base_training, self.base.denoiser

        def make(context: RunContext) -> TrajectoryModel:
            episodes = self._learned("unseen")
            space = replace(self.base.space, about=dict(episodes.about))
            begin = Untrained(old.schedule, self.own.network, old.clip)
            source = self.windows(episodes)
            return fit(source, space, begin, training, seed=self.seed("unseen"), context=context)

        return self.shop.model("unseen", training.steps, make)

    @_shareable
    def reward(self) -> RelativeReward:
        """The reward of the last round."""
        return self._matched("reward", self.expert.denoiser, self.own)

    @functools.cached_property
    def distilled(self) -> RelativeReward | None:
        """The reward in a cheap network; None where the settings have none."""
        if self.own.distilled is None:
            return None
        steered = SteeredScore(self.base.denoiser, self.reward)
        return self._matched("distilled", steered, self.own.distilled)

    def _matched(self, name: str, expert: Score, how: Rounds) -> RelativeReward:
        """A reward relative to the base; a round is on the paths of the one before it."""
        found = None
        for index in range(how.rounds):
            begin = found

            def make(
                context: RunContext, index: int = index, begin: RelativeReward | None = begin
            ) -> TrajectoryGuide:
                return fit_reward(
                    self.base,
                    expert,
                    self.noised(how.matching.x_t),
                    self.expert.space,
                    how.reward,
                    how.matching,
                    seed=self.seed(f"{name} {index}"),
                    begin=begin,
                    paths=self._met(f"{name}_{index}", begin, how) if how.met and begin else None,
                    context=context,
                )

            guide = self.shop.guide(f"{name}_{index}", how.matching.steps, make).guide
            assert isinstance(guide, RelativeReward)
            found = guide
        assert found is not None
        return found

    def _met(self, name: str, by: RelativeReward, how: Rounds) -> Rows:
        """Where the base comes by, steered by a reward; kept in NAME.met.npz, so that it stays."""
        path = self.shop.folder / f"{name}.met.npz"
        if there(path):
            met = read_arrays(path, ("observations",))["observations"]
            return Rows(start_rows(self.base.space, met))
        world = self.world("where paths begin")
        options = replace(self.sampling, scale=how.matching.path_scale)
        acts = Watched(planner(self.base, guide=by, options=options, mesh=self.mesh))
        starts, key = self.task.starts(self.config.validation, world.seed), world.seed
        self.task.execute(acts, starts, key=jax.random.key(key), goal=None, rollout=world.rollout)
        write_arrays(path, observations=acts.met)
        return Rows(start_rows(self.base.space, acts.met))

    @_shareable
    def judge(self) -> TrajectoryGuide:
        """The discriminator: the reward's network, trained for as many steps in all.

        An energy begins as the denoisers are; beside it stands the cheap network that it is
        distilled into, or a window's.
        """
        like = TrajectoryGuide(self.reward, self.expert.space, self.base.denoiser.schedule)
        own: Rounds = self.own
        if own.reward.kind == "energy":
            own = self.own.distilled or replace(own, reward=replace(own.reward, kind="window"))
        sources = self.windows(self.base_data), self.windows(self.expert_data)
        seed = self.seed("discriminator")
        return self.shop.discriminator(
            "discriminator", like, sources, own.reward, own.matching, seed=seed, rounds=own.rounds
        )

    # Data and seeds.

    @functools.cached_property
    def base_data(self) -> Episodes:
        """What the base is trained on."""
        return self._learned("base")

    @functools.cached_property
    def expert_data(self) -> Episodes:
        """What the expert is."""
        return self._learned("expert")

    def _learned(self, which: str) -> Episodes:
        """What a model is trained on, "base", "expert" or "unseen"."""
        source = self.sources[which]
        if is_recorded(source):
            return self._record(source, self._amount(which), f"{which} data")
        return read_data(self.config, self.task.name, which, self.limits.get(which))[0]

    def held_out(self, which: str) -> Episodes:
        """Other episodes of the same, of which no model has seen one."""
        source = self.sources[which]
        if is_recorded(source):
            return self._record(source, self._spare(which), f"held-out {source} data")
        return read_data(self.config, self.task.name, which)[1]

    def _record(self, source: str, count: int, purpose: str) -> Episodes:
        seed = self.seed(purpose)
        return self.task.record(episodes=count, span=self.own.horizon, seed=seed, goal=source)

    def _amount(self, which: str) -> int:
        """Episodes of a set that are recorded to train on."""
        return self.config.expert_episodes if which == "expert" else self.config.base_episodes

    def _spare(self, which: str) -> int:
        """Those that are recorded to be held out."""
        return 0 if which == "unseen" else max(4, self._amount(which) // 10)

    def facts(self) -> dict[str, Any]:
        """What the models learn from, for results; noted once, for later starts to be held to."""
        path = self.shop.folder / NOTES
        if there(path):
            return read_json(path, dict.fromkeys(self.sources))
        found = {}
        for which, source in self.sources.items():
            if is_recorded(source):
                amounts = {"episodes": self._amount(which), "held_out": self._spare(which)}
                found[which] = {"source": source} | amounts
            else:
                both = read_data(self.config, self.task.name, which)
                found[which] = facts_of(source, *both)
        write_json(path, found)
        return found

    def windows(self, episodes: Episodes) -> Strided:
        """Windows of episodes as the base sees them."""
        return window_source(episodes, self.base.space, PADDING)

    def noised(self, whose: Noised) -> Mixed:
        """Windows of the base's data, of the expert's, or equally many of both."""
        names = ("base", "expert") if whose == "mixed" else (whose,)
        return Mixed(tuple(self.windows(getattr(self, f"{name}_data")) for name in names))

    def seed(self, purpose: str) -> int:
        """A seed of its own for each purpose, of the study's: no two share random numbers."""
        entropy = [self.config.seed, *purpose.encode()]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1

    def world(self, purpose: str) -> World:
        """Where arms act for a purpose; an ablation's starts and noise are its robot's."""
        seed = (self.whole or self).seed(purpose)
        return World(self.task, self.config.rollout, seed, self.mesh)


def ablation_part(name: str) -> str:
    """The part of the study that an ablation is."""
    return f"ablations/{slug(name)}"


def slug(name: str) -> str:
    """A name as files have it."""
    return name.replace(" ", "-")
