"""What the maze study makes for one maze; see `run`."""

import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from common_jax.distributed import there
from common_jax.io.files import write_arrays, write_json
from common_jax.mesh import mesh_for
from reward_jax.data.episodes import Episodes
from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel, TrajectorySpace
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Mixed, Strided
from reward_jax.planning.extract import diagnose, fit_reward
from reward_jax.planning.fit import (
    RunContext,
    Untrained,
    fit,
    space_of,
    window_source,
)
from reward_jax.planning.maps import each_seed, map_of
from reward_jax.studies.maze.measure import peak_at, steered
from reward_jax.studies.maze.settings import STRIDES, Config
from reward_jax.studies.workshop import Clock, Workshop
from reward_jax.tasks.maze.task import MazeTask
from reward_jax.tasks.plane import HeatMap

__all__ = ["MazeWork"]


class MazeWork:
    """The models and results of one maze, made where they are not there."""

    def __init__(self, config: Config, task: MazeTask) -> None:
        self.config, self.task = config, task
        self.mesh = mesh_for(dataclasses.asdict(config.mesh))
        self.shop = Workshop(
            config.out, task.name, TrajectorySpace, save_every=config.save_every, mesh=self.mesh
        )
        self.stride = STRIDES[task.name]

    def record(self, goal: Any, count: int, seed: int) -> Episodes:
        """Walks to a goal, or to random ones."""
        span = (self.config.horizon - 1) * self.stride + 1
        return self.task.record(episodes=count, span=span, seed=seed, goal=goal)

    @functools.cached_property
    def base(self) -> tuple[TrajectoryModel, Strided, Float[np.ndarray, "N H D"]]:
        """The base, the windows of its data, and N held-out windows (H steps, D wide)."""
        c = self.config
        episodes = self.record(None, c.base_episodes, c.seed)
        space = space_of(episodes, horizon=c.horizon, stride=self.stride, actions=False)
        source = window_source(episodes, space)
        training = dataclasses.replace(
            c.base, steps=c.base_steps.get(self.task.name, c.base.steps)
        )

        def train_base(context: RunContext) -> TrajectoryModel:
            begun = time.perf_counter()
            untrained = Untrained(cosine_schedule(c.diffusion_steps), c.network)
            model = fit(source, space, untrained, training, seed=c.seed, context=context)
            _say(f"{self.task.name}: base, {time.perf_counter() - begun:.0f} s")
            return model

        base = self.shop.model("base", training.steps, train_base)
        held = window_source(self.record(None, c.base_episodes, c.seed + 1), space)
        rows = np.asarray(held.sample(jax.random.key(c.seed), c.map_windows))
        return base, source, rows

    def null(self) -> None:
        """Two checkpoints of one base: where does the map of their "reward" peak?"""
        path = self.shop.folder / "null.json"
        if there(path):
            return
        c = self.config
        base, source, rows = self.base

        def train_further(context: RunContext) -> TrajectoryModel:
            seed = c.seed + 500
            return fit(source, base.space, base, c.expert, seed=seed, context=context)

        other = self.shop.model("null_base", c.expert.steps, train_further)
        both = Mixed((source, source))
        guide = self._reward("null_reward", base, other, both, c.seed + 501)
        maps = self._maps(rows, guide, *each_seed(guide))
        peaks = [found.peak for found in maps]
        held = jnp.asarray(rows[:256])
        found = diagnose(guide, base.denoiser, other.denoiser, held, matching=c.matching)
        write_json(path, {"peaks": np.stack(peaks).tolist(), "diagnostics": found})

    def goal(self, index: int) -> None:
        """Expert, reward, map, steering and the discriminator of one goal."""
        name = f"goal_{index}"
        folder = self.shop.folder / name
        if there(folder / "result.json"):
            return
        c, task, place = self.config, self.task, self.task.goals()[index]
        base, base_source, rows = self.base
        clock = Clock(folder / "seconds.json")

        seed = c.seed + 1000 + 10 * index
        episodes = self.record(place, c.expert_episodes, seed)
        space = dataclasses.replace(base.space, about=dict(episodes.about))
        source = window_source(episodes, space)
        clock.lap("data")

        def train_expert(context: RunContext) -> TrajectoryModel:
            return fit(source, space, base, c.expert, seed=seed, context=context)

        expert = self.shop.model(f"{name}/expert", c.expert.steps, train_expert)
        clock.lap("expert")
        mixed = Mixed((base_source, source))
        guide = self._reward(f"{name}/reward", base, expert, mixed, seed + 1)
        clock.lap("reward")
        judge = self.shop.discriminator(
            f"{name}/discriminator",
            guide,
            (base_source, source),
            c.reward,
            c.matching,
            seed=seed + 2,
        )
        clock.lap("discriminator")
        # Walks that no model has seen.
        fresh = self.record(place, max(8, c.expert_episodes // 20), seed + 3)
        apart = window_source(fresh, space).sample(jax.random.key(seed), 256)
        held = jnp.concatenate([rows[:256], apart])
        diagnostics = diagnose(guide, base.denoiser, expert.denoiser, held, matching=c.matching)
        maps = self._maps(rows, guide, judge, *each_seed(guide))
        peak, judged, *seeds = (peak_at(task, found, place) for found in maps)
        clock.lap("maps")
        steering = steered(
            task,
            (base, expert),
            (guide, judge),
            place,
            c.scales,
            plans=c.plans,
            seed=seed,
            mesh=self.mesh,
        )
        clock.lap("steering")
        write_arrays(folder / "maps.npz", reward=maps[0].values, discriminator=maps[1].values)
        write_json(
            folder / "result.json",
            {
                "maze": task.name,
                "goal": place,
                "peak": peak,
                "seed_peaks": seeds,
                "discriminator_peak": judged,
                "free_cells": len(task.layout.free),
                "diagnostics": diagnostics,
                "steering": steering,
                "seconds": clock.seconds,
            },
        )
        _say(
            f"{task.name} goal {index}: peak {peak['metres']:.2f} m off; {json.dumps(steering)}; "
            f"{json.dumps(clock.seconds)}"
        )

    def _maps(self, rows: Float[np.ndarray, "N H D"], *guides: TrajectoryGuide) -> list[HeatMap]:
        """Their maps over the same N windows."""
        how: dict[str, Any] = dict(bins=self.config.bins, mesh=self.mesh)
        return [map_of(self.task.plane, one, rows, **how) for one in guides]

    def _reward(
        self,
        name: str,
        base: TrajectoryModel,
        expert: TrajectoryModel,
        source: Mixed,
        seed: int,
    ) -> TrajectoryGuide:
        c = self.config

        def extract(context: RunContext) -> TrajectoryGuide:
            how = expert.space, c.reward, c.matching
            return fit_reward(base, expert.denoiser, source, *how, seed=seed, context=context)

        return self.shop.guide(name, c.matching.steps, extract)


def _say(line: str) -> None:
    print(line, flush=True)
