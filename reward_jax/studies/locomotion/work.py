"""What the locomotion study measures of one robot's models; see `run`."""

import functools
import json
import math
import pathlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.distributed import there
from common_jax.errors import InputError
from common_jax.io.files import read_json, write_arrays, write_json
from common_jax.mesh import fetch
from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel
from reward_jax.diffusion.sources import Mixed
from reward_jax.planning.extract import diagnose
from reward_jax.reward.diagnostics import explained_of
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.paths import draw_path_targets
from reward_jax.reward.relative import SeedBlocks
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
from reward_jax.studies.locomotion.models import Models, slug
from reward_jax.studies.workshop import Clock
from reward_jax.tasks.base import Outcome

__all__ = ["ARM", "PLAIN", "Work"]

_GUIDED = ("discriminator", "raw_difference", "reward", "ensemble", "distilled")
PLAIN = ("unsteered", "discriminator")  # what every arm is compared to, besides temperatures
ARM = dict.fromkeys(
    ("mean", "standard_error", "seed_standard_error", "normalized", "episodes", "returns")
) | {"settings": dict.fromkeys(("scale", "t_stopgrad")), "seconds": {}}


class Work:
    """The results of one robot, or of an ablation of it, made where they are not there."""

    def __init__(self, models: Models) -> None:
        self.models, self.config = models, models.config

    def run(self) -> None:
        """Train, choose, roll out, write."""
        path = self.models.shop.folder / "result.json"
        if there(path):
            return
        clock, models = Clock(path.with_name("seconds.json")), self.models
        found: dict[str, Any] = {"data": models.facts()}
        for name in ("base", "expert"):
            getattr(models, name)
            clock.lap(name)
        found["gap"] = self._gap()
        for name in ("reward", "distilled", "judge"):
            getattr(models, name)
            clock.lap(name)
        found["arms"] = self._measured(models.base, "arms")
        clock.lap("rollouts")
        if "unseen" in models.sources:
            found["unseen"] = self._measured(models.unseen, "unseen_arms")
            clock.lap("unseen base")
        found["diagnostics"] = self._diagnostics(found["arms"])
        clock.lap("diagnostics")
        found["seconds"] = clock.seconds
        write_json(path, found)
        self._say(json.dumps(clock.seconds))

    def run_ablation(self) -> None:
        """The reward and its bounds with one thing changed, of a robot whose own work is done."""
        path = self.models.shop.folder / "result.json"
        if there(path):
            return
        clock = Clock(path.with_name("seconds.json"))
        found: dict[str, Any] = {"arms": self._measured(self.models.base, "arms")}
        clock.lap("all")
        found["diagnostics"] = self._diagnostics(found["arms"])
        clock.lap("diagnostics")
        write_json(path, found | {"seconds": clock.seconds})

    def _arms(self) -> list[str]:
        """The names of all arms, in the order of tables."""
        temperatures = self._temperatures()
        cheap = ["ensemble", "distilled"] if self.models.own.distilled else []
        guided = ["discriminator", "raw_difference", "reward", *cheap]
        return ["unsteered", *temperatures, *guided, "expert"]

    def _temperatures(self) -> dict[str, float]:
        """None where the sampler draws no noise: each would be the unsteered base once more."""
        if not self.models.sampling.made_sampler().draws_noise:
            return {}
        return {f"temperature {t:g}": t for t in self.config.temperatures}

    def _arm(self, name: str, base: TrajectoryModel) -> Arm:
        """An arm, of a base: the one that the reward is of, or another."""
        models = self.models
        if name == "discriminator":
            return Arm(base, models.judge.guide)
        if name == "raw_difference":
            return Arm(base, ScoreDifference(models.base.denoiser, models.expert.denoiser))
        if name == "ensemble":  # the mean over seeds, which `distilled` learns
            return Arm(base, models.reward)
        if name in ("reward", "distilled"):
            reward = models.reward if name == "reward" else models.distilled
            assert reward is not None
            return Arm(base, SeedBlocks(reward), reward.seeds or 1)
        return Arm(models.expert if name == "expert" else base)

    def _measured(self, base: TrajectoryModel, where: str) -> dict[str, Any]:
        """All arms' returns on the test seeds; each is made once, a file of `where`."""
        found = {name: self._measure(name, base, where) for name in self._arms()}
        controls = [name for name in found if name in PLAIN or name in self._temperatures()]
        error = self.models.task.robot.normalized_error
        for one in found.values():
            one["normalized_standard_error"] = error(one["standard_error"])
            one["normalized_seed_standard_error"] = error(one["seed_standard_error"])
            one["over"] = {other: compared(one, found[other]) for other in controls}
        return found

    def _folder(self, name: str, where: str) -> pathlib.Path:
        """Where an arm stands."""
        if self._unmoved and name != "reward":
            return self._unmoved
        if name == "expert":  # whose plans are of no base
            where = "arms"
        return self.models.shop.folder / where

    @functools.cached_property
    def _unmoved(self) -> pathlib.Path | None:
        """The robot's arms, of an ablation that changes neither their models nor how they act."""
        models, whole = self.models, self.models.whole
        if whole is None or "base" not in models.untouched:
            return None

        def acts(models: Models) -> tuple[Any, ...]:
            return models.sampling, models.config.rollout, models.config.scales

        return whole.shop.folder / "arms" if acts(models) == acts(whole) else None

    def _measure(self, name: str, base: TrajectoryModel, where: str) -> dict[str, Any]:
        """One arm: NAME.json; beside it frames of three of its episodes, and what was swept."""
        path = self._folder(name, where) / f"{slug(name)}.json"
        if there(path):
            return read_json(path, ARM)
        path.parent.mkdir(parents=True, exist_ok=True)
        c, models = self.config, self.models
        test, validation = models.world("test"), models.world("validation")
        arm, options, rows = self._arm(name, base), models.sampling, []
        if name in _GUIDED:
            say = functools.partial(self._say_of, name)
            # As many episodes of each guide: one of several seeds has `validation` for each.
            count = c.validation * (models.reward.seeds or 1) // arm.seeds
            swept = options, c.scales, c.t_stopgrads, path.with_suffix(".sweep.json")
            options, rows = choose(arm, validation, count, *swept, say)
        elif name in self._temperatures():
            options = replace(options, temperature=self._temperatures()[name])
        outcome, options = self._tested(arm, test, options, rows)
        found = summary(arm, outcome, models.task, options)
        if rows:
            found["validation"] = rows
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
        count, models, options = self.config.validation, self.models, GuidanceOptions()
        world = models.world("validation")
        base, expert = (
            summary(arm, returns(arm, world, count, options), models.task, options)
            for arm in (Arm(models.base), Arm(models.expert))
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
        models, matching = self.models, self.models.own.matching
        reward, base, expert = models.reward, models.base.denoiser, models.expert.denoiser
        held = Mixed(tuple(models.windows(models.held_out(one)) for one in ("base", "expert")))
        rows = held.sample(jax.random.key(models.seed("held-out rows")), 256)
        guide = TrajectoryGuide(reward, models.expert.space, base.schedule)
        held_out = diagnose(guide, base, expert, jnp.asarray(rows), matching=matching)
        found: dict[str, Any] = dict(held_out)
        pin = models.base.space.pin if matching.pin else None
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
                count=matching.batch_size * base.schedule.steps,
                key=jax.random.key(models.seed("paths")),
                target=reward.target,
                guidance=replace(
                    models.sampling,
                    scale=arms[arm]["settings"]["scale"],
                    t_stopgrad=arms[arm]["settings"]["t_stopgrad"],
                    skip=0,  # chains are from noise, not from what is left of a plan
                ),
                options=matching,  # whose programs are compiled
                pin=pin,
                mesh=models.mesh,
            )
            on_paths = explained_of(reward, targets, base.schedule, pin=pin)
            by_t = np.asarray(fetch(on_paths), np.float64).tolist()
            found[f"explained_on_{name}_paths"] = [None if math.isnan(x) else x for x in by_t]
        return found

    def _say_of(self, arm: str, line: str) -> None:
        self._say(f"{arm}, on validation seeds: {line}")

    def _say(self, line: str) -> None:
        print(f"{self.models.part}: {line}", flush=True)
