"""What the locomotion study makes for one robot; see `run`."""

import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.distributed import there
from common_jax.errors import InputError
from common_jax.io.files import read_arrays, read_json, write_arrays, write_json
from common_jax.mesh import fetch, mesh_for
from reward_jax.data.episodes import Episodes
from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel, TrajectorySpace
from reward_jax.diffusion.denoiser import Score
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Mixed, Rows, Strided
from reward_jax.planning.extract import Noised, diagnose, fit_reward
from reward_jax.planning.fit import RunContext, Untrained, fit, space_of, window_source
from reward_jax.planning.plan import Watched, planner, start_rows
from reward_jax.reward.diagnostics import explained_of
from reward_jax.reward.gradients import ScoreDifference, SteeredScore
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.paths import draw_path_targets
from reward_jax.reward.relative import RelativeReward, SeedBlocks
from reward_jax.studies.locomotion.arms import (
    Arm,
    World,
    best_of,
    choose,
    compared,
    exceeds,
    returns,
    summary,
)
from reward_jax.studies.locomotion.data import (
    NOTES,
    PADDING,
    facts_of,
    is_recorded,
    limits_of,
    read_data,
)
from reward_jax.studies.locomotion.settings import Config, Rounds, ablated, given, sources
from reward_jax.studies.workshop import Clock, Workshop
from reward_jax.tasks.base import Outcome
from reward_jax.tasks.locomotion.task import LocomotionTask

__all__ = ["ARM", "PLAIN", "RobotWork", "ablation_part", "slug"]

_GUIDED = ("discriminator", "raw_difference", "reward", "ensemble", "distilled")
PLAIN = ("unsteered", "discriminator")  # what every arm is compared to, besides temperatures
ARM = dict.fromkeys(
    ("mean", "standard_error", "seed_standard_error", "normalized", "episodes", "returns")
) | {"settings": dict.fromkeys(("scale", "t_stopgrad")), "seconds": {}}


class RobotWork:
    """The models and results of one robot, made where they are not there."""

    def __init__(self, config: Config, name: str, part: str = "") -> None:
        self.config, self.own, self.task = config, config.robots[name], LocomotionTask(name)
        self.part, self.world_seed = part or name, config.seed
        self.sampling = GuidanceOptions()  # but for what an arm sets
        self.sources = sources(config, name)
        self.limits: dict[str, int] = {}  # episodes of data of others, where not all
        self.measured: pathlib.Path | None = None  # where arms stand that no reward moves
        self.mesh = mesh_for(asdict(config.mesh))
        self.shop = Workshop(
            config.out, self.part, TrajectorySpace, save_every=config.save_every, mesh=self.mesh
        )

    def run(self) -> None:
        """Train, choose, roll out, write."""
        path = self.shop.folder / "result.json"
        if there(path):
            return
        clock, found = Clock(path.with_name("seconds.json")), {"data": self._facts()}
        for name in ("base", "expert"):
            getattr(self, name)
            clock.lap(name)
        found["gap"] = self._gap()
        for name in ("reward", "distilled", "judge"):
            getattr(self, name)
            clock.lap(name)
        found["arms"] = self._measured(self._arms(), self.base, "arms")
        clock.lap("rollouts")
        if "unseen" in self.sources:
            found["unseen"] = self._measured(self._arms(), self.unseen, "unseen_arms")
            clock.lap("unseen base")
        found["diagnostics"] = self._diagnostics(found["arms"])
        clock.lap("diagnostics")
        found["seconds"] = clock.seconds
        write_json(path, found)
        self._say(json.dumps(clock.seconds))

    def run_ablation(self, name: str) -> None:
        """The reward and its bounds with one thing changed, of a robot whose own work is done."""
        path = self.config.out / ablation_part(name) / "result.json"
        if there(path):
            return
        work, untouched = self._ablated(name)
        # `cached_property` takes what stands in the object already.
        vars(work).update({one: getattr(self, one) for one in untouched})
        clock = Clock(path.with_name("seconds.json"))
        found = {"arms": work._measured(work._arms(), work.base, "arms")}
        clock.lap("all")
        found["diagnostics"] = work._diagnostics(found["arms"])
        clock.lap("diagnostics")
        write_json(path, found | {"seconds": clock.seconds})

    def _ablated(self, name: str) -> tuple["RobotWork", list[str]]:
        """The work of an ablation, and this one's models that its change does not touch.

        Where it touches none, nor how robots act, arms are this one's, too.
        """
        a, config = self.config.ablations[name], ablated(self.config, name)
        work = RobotWork(config, self.task.name, ablation_part(name))
        work.limits = limits_of(a)
        if a.sampling_steps:
            work.sampling = replace(
                work.sampling,
                sampler="ddim",
                sampling_steps=a.sampling_steps,
                **given(skip=a.skip),
            )
        work.world_seed = self.world_seed  # returns are of the same starts and noise
        models = ("base_episodes", "expert_episodes", "seed")
        untouched = []
        if all(getattr(config, name) == getattr(self.config, name) for name in models):
            untouched = ["base", "expert", "judge"]
            acts = "rollout", "scales"
            if work.sampling == self.sampling and all(
                getattr(config, name) == getattr(self.config, name) for name in acts
            ):
                work.measured = self.shop.folder / "arms"
            if replace(work.own, distilled=None) == replace(self.own, distilled=None):
                untouched += ["reward"]
        return work, untouched

    @functools.cached_property
    def base_data(self) -> Episodes:
        return self._learned("base")

    @functools.cached_property
    def expert_data(self) -> Episodes:
        return self._learned("expert")

    @functools.cached_property
    def base(self) -> TrajectoryModel:
        """The base, in a space of its own: a Gaussian normaliser, nothing clipped."""
        own, seed = self.own, self._seed("base")

        def make(context: RunContext) -> TrajectoryModel:
            data = self.base_data
            space = space_of(
                data, horizon=own.horizon, stride=1, actions=True, normaliser="gaussian"
            )
            source = window_source(data, space, PADDING)
            begin = Untrained(cosine_schedule(own.diffusion_steps), own.network, None)
            return fit(source, space, begin, own.base_training, seed=seed, context=context)

        return self.shop.model("base", own.base_training.steps, make)

    @functools.cached_property
    def expert(self) -> TrajectoryModel:
        """The base, trained further on the expert's data, in the base's space."""
        training = self.own.expert_training

        def make(context: RunContext) -> TrajectoryModel:
            source = self._windows(self.expert_data)
            space = replace(self.base.space, about=dict(self.expert_data.about))
            seed = self._seed("expert")
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
            source = self._windows(episodes)
            return fit(source, space, begin, training, seed=self._seed("unseen"), context=context)

        return self.shop.model("unseen", training.steps, make)

    @functools.cached_property
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
                    self._noised(how.matching.x_t),
                    self.expert.space,
                    how.reward,
                    how.matching,
                    seed=self._seed(f"{name} {index}"),
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
        world = self._world("where paths begin")
        options = replace(self.sampling, scale=how.matching.path_scale)
        acts = Watched(planner(self.base, guide=by, options=options, mesh=self.mesh))
        starts, key = self.task.starts(self.config.validation, world.seed), world.seed
        self.task.execute(acts, starts, key=jax.random.key(key), goal=None, rollout=world.rollout)
        write_arrays(path, observations=acts.met)
        return Rows(start_rows(self.base.space, acts.met))

    @functools.cached_property
    def judge(self) -> TrajectoryGuide:
        """The discriminator: the reward's network, trained for as many steps in all.

        An energy begins as the denoisers are; beside it stands the cheap network that it is
        distilled into, or a window's.
        """
        like = TrajectoryGuide(self.reward, self.expert.space, self.base.denoiser.schedule)
        own: Rounds = self.own
        if own.reward.kind == "energy":
            own = self.own.distilled or replace(own, reward=replace(own.reward, kind="window"))
        sources = self._windows(self.base_data), self._windows(self.expert_data)
        seed = self._seed("discriminator")
        return self.shop.discriminator(
            "discriminator", like, sources, own.reward, own.matching, seed=seed, rounds=own.rounds
        )

    def _seed(self, purpose: str, seed: int | None = None) -> int:
        """A seed of its own for each purpose, of the study's: no two share random numbers."""
        entropy = [self.config.seed if seed is None else seed, *purpose.encode()]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1

    def _learned(self, which: str) -> Episodes:
        """What a model is trained on, "base", "expert" or "unseen"."""
        source = self.sources[which]
        if is_recorded(source):
            return self._record(source, self._amount(which), f"{which} data")
        return read_data(self.config, self.task.name, which, self.limits.get(which))[0]

    def _held_out(self, which: str) -> Episodes:
        """Other episodes of the same, of which no model has seen one."""
        source = self.sources[which]
        if is_recorded(source):
            return self._record(source, self._spare(which), f"held-out {source} data")
        return read_data(self.config, self.task.name, which)[1]

    def _record(self, source: str, count: int, purpose: str) -> Episodes:
        seed = self._seed(purpose)
        return self.task.record(episodes=count, span=self.own.horizon, seed=seed, goal=source)

    def _amount(self, which: str) -> int:
        """Episodes of a set that are recorded to train on."""
        return self.config.expert_episodes if which == "expert" else self.config.base_episodes

    def _spare(self, which: str) -> int:
        """Those that are recorded to be held out."""
        return 0 if which == "unseen" else max(4, self._amount(which) // 10)

    def _facts(self) -> dict[str, Any]:
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

    def _windows(self, episodes: Episodes) -> Strided:
        return window_source(episodes, self.base.space, PADDING)

    def _noised(self, whose: Noised) -> Mixed:
        """Windows of the base's data, of the expert's, or equally many of both."""
        names = ("base", "expert") if whose == "mixed" else (whose,)
        return Mixed(tuple(self._windows(getattr(self, f"{name}_data")) for name in names))

    def _arms(self) -> list[str]:
        """The names of all arms, in the order of tables."""
        temperatures = self._temperatures()
        cheap = ["ensemble", "distilled"] if self.own.distilled else []
        guided = ["discriminator", "raw_difference", "reward", *cheap]
        return ["unsteered", *temperatures, *guided, "expert"]

    def _temperatures(self) -> dict[str, float]:
        """None where the sampler draws no noise: each would be the unsteered base once more."""
        if not self.sampling.made_sampler().draws_noise:
            return {}
        return {f"temperature {t:g}": t for t in self.config.temperatures}

    def _arm(self, name: str, base: TrajectoryModel) -> Arm:
        """An arm, of a base: the one that the reward is of, or another."""
        if name == "discriminator":
            return Arm(base, self.judge.guide)
        if name == "raw_difference":
            return Arm(base, ScoreDifference(self.base.denoiser, self.expert.denoiser))
        if name == "ensemble":  # the mean over seeds, which `distilled` learns
            return Arm(base, self.reward)
        if name in ("reward", "distilled"):
            reward = self.reward if name == "reward" else self.distilled
            assert reward is not None
            return Arm(base, SeedBlocks(reward), reward.seeds or 1)
        return Arm(self.expert if name == "expert" else base)

    def _measured(self, names: Iterable[str], base: TrajectoryModel, where: str) -> dict[str, Any]:
        """Arms' returns on the test seeds; each stands in a file of `where`, and is made once."""
        found = {name: self._measure(name, base, self.shop.folder / where) for name in names}
        controls = [name for name in found if name in PLAIN or name in self._temperatures()]
        error = self.task.robot.normalized_error
        for one in found.values():
            one["normalized_standard_error"] = error(one["standard_error"])
            one["normalized_seed_standard_error"] = error(one["seed_standard_error"])
            one["over"] = {other: compared(one, found[other]) for other in controls}
        return found

    def _measure(self, name: str, base: TrajectoryModel, folder: pathlib.Path) -> dict[str, Any]:
        """One arm: NAME.json; beside it frames of three of its episodes, and what was swept."""
        if self.measured and name != "reward":
            folder = self.measured
        elif name == "expert":  # whose plans are of no base
            folder = self.shop.folder / "arms"
        path = folder / f"{slug(name)}.json"
        if there(path):
            return read_json(path, ARM)
        folder.mkdir(parents=True, exist_ok=True)
        c = self.config
        test = self._world("test")
        validation = self._world("validation")
        arm, options, rows = self._arm(name, base), self.sampling, []
        if name in _GUIDED:
            say = functools.partial(self._say_of, name)
            # As many episodes of each guide: one of several seeds has `validation` for each.
            count = c.validation * (self.reward.seeds or 1) // arm.seeds
            swept = self.sampling, c.scales, c.t_stopgrads, path.with_suffix(".sweep.json")
            options, rows = choose(arm, validation, count, *swept, say)
        elif name in self._temperatures():
            options = replace(options, temperature=self._temperatures()[name])
        outcome, options = self._tested(arm, test, options, rows)
        found = summary(arm, outcome, self.task, options) | ({"validation": rows} if rows else {})
        self._say(f"{name}: {found['mean']:.1f} ({found['standard_error']:.1f})")
        write_arrays(path.with_suffix(".npz"), frames=outcome.shown[:3])
        write_json(path, found)
        return found

    def _tested(
        self, arm: Arm, test: World, options: GuidanceOptions, rows: list[dict[str, Any]]
    ) -> tuple[Outcome, GuidanceOptions]:
        """Test episodes with the guidance that was chosen, or the next best where that fails."""
        while True:
            try:
                return returns(arm, test, self.config.environments, options), options
            except InputError as error:  # plans that are not finite, of a start not seen before
                for row in rows:
                    if (row["scale"], row["t_stopgrad"]) == (options.scale, options.t_stopgrad):
                        row |= {"return": None, "failed": f"on test seeds: {error}"}
                        self._say(
                            f"scale {row['scale']:g} {row['failed']}; the next best is taken"
                        )
                if (another := best_of(rows, options)) is None:
                    raise
                options = another

    def _gap(self) -> dict[str, Any]:
        """Whether the expert's plans beat the base's by two standard errors."""
        c = self.config
        world = self._world("validation")
        options = GuidanceOptions()
        base, expert = (
            summary(arm, returns(arm, world, c.validation, options), self.task, options)
            for arm in (Arm(self.base), Arm(self.expert))
        )
        gap = compared(expert, base)
        beats = exceeds(gap)
        if not beats:
            self._say(
                f"the expert's plans return {gap['mean']:.1f} ({gap['standard_error']:.1f}) more "
                "than the base's: there is no reward to learn"
            )
        return gap | {"expert_beats_base": beats}

    def _diagnostics(self, arms: Mapping[str, Any]) -> dict[str, Any]:
        """What the reward explains of held-out data and on the paths of two arms, by t.

        On paths None where the sampler leaves a t out.
        """
        reward = self.reward
        base, expert = self.base.denoiser, self.expert.denoiser
        held = Mixed(tuple(self._windows(self._held_out(which)) for which in ("base", "expert")))
        rows = held.sample(jax.random.key(self._seed("held-out rows")), 256)
        guide = TrajectoryGuide(reward, self.expert.space, base.schedule)
        held_out = diagnose(guide, base, expert, jnp.asarray(rows), matching=self.own.matching)
        found: dict[str, Any] = dict(held_out)
        pin = self.base.space.pin if self.own.matching.pin else None
        for name, arm, by in (
            ("raw", "raw_difference", ScoreDifference(base, expert)),
            ("own", "reward", reward),
        ):
            targets = draw_path_targets(
                base,
                expert,
                held,
                base.schedule,
                guide=by,
                count=self.own.matching.batch_size * base.schedule.steps,
                key=jax.random.key(self._seed("paths")),
                target=reward.target,
                guidance=replace(
                    self.sampling,
                    scale=arms[arm]["settings"]["scale"],
                    t_stopgrad=arms[arm]["settings"]["t_stopgrad"],
                    skip=0,  # chains are from noise, not from what is left of a plan
                ),
                options=self.own.matching,  # whose programs are compiled
                pin=pin,
                mesh=self.mesh,
            )
            on_paths = explained_of(reward, targets, base.schedule, pin=pin)
            by_t = np.asarray(fetch(on_paths), np.float64).tolist()
            found[f"explained_on_{name}_paths"] = [None if math.isnan(x) else x for x in by_t]
        return found

    def _world(self, purpose: str) -> World:
        seed = self._seed(purpose, self.world_seed)
        return World(self.task, self.config.rollout, seed, self.mesh)

    def _say_of(self, arm: str, line: str) -> None:
        self._say(f"{arm}, on validation seeds: {line}")

    def _say(self, line: str) -> None:
        print(f"{self.part}: {line}", flush=True)


def ablation_part(name: str) -> str:
    """The part of the study that an ablation is."""
    return f"ablations/{slug(name)}"


def slug(name: str) -> str:
    """A name as files have it."""
    return name.replace(" ", "-")
