"""What the maze study makes for one maze; see `run`."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from common_jax.io.files import write_arrays, write_json
from reward_jax.data.checkpoint import load_guide, load_model, save_guide, save_model
from reward_jax.data.episodes import Episodes
from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel, TrajectorySpace
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Mixed, Strided
from reward_jax.planning.extract import diagnose, fit_reward
from reward_jax.planning.fit import (
    RunContext,
    Untrained,
    fit,
    open_run,
    optimizer,
    space_of,
    window_source,
)
from reward_jax.planning.maps import each_seed, map_of
from reward_jax.reward.discriminator import DiscriminatorGuide, train_discriminator
from reward_jax.studies.maze.measure import peak_at, steered
from reward_jax.studies.maze.settings import STRIDES, Config
from reward_jax.tasks.maze.task import MazeTask
from reward_jax.tasks.plane import HeatMap

__all__ = ["MazeWork"]


class MazeWork:
    """The models and results of one maze, made where they are not there."""

    def __init__(self, config: Config, task: MazeTask) -> None:
        self.config, self.task = config, task
        self.folder = config.out / task.name
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

        base = self._model("base", training.steps, train_base)
        held = window_source(self.record(None, c.base_episodes, c.seed + 1), space)
        rows = np.asarray(held.sample(jax.random.key(c.seed), c.map_windows))
        return base, source, rows

    def null(self) -> None:
        """Two checkpoints of one base: where does the map of their "reward" peak?"""
        path = self.folder / "null.json"
        if path.exists():
            return
        c = self.config
        base, source, rows = self.base

        def train_further(context: RunContext) -> TrajectoryModel:
            seed = c.seed + 500
            return fit(source, base.space, base, c.expert, seed=seed, context=context)

        other = self._model("null_base", c.expert.steps, train_further)
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
        folder = self.folder / name
        if (folder / "result.json").exists():
            return
        c, task, place = self.config, self.task, self.task.goals()[index]
        base, base_source, rows = self.base
        clock = _Clock()

        seed = c.seed + 1000 + 10 * index
        episodes = self.record(place, c.expert_episodes, seed)
        space = dataclasses.replace(base.space, about=dict(episodes.about))
        source = window_source(episodes, space)
        clock.lap("data")

        def train_expert(context: RunContext) -> TrajectoryModel:
            return fit(source, space, base, c.expert, seed=seed, context=context)

        expert = self._model(f"{name}/expert", c.expert.steps, train_expert)
        clock.lap("expert")
        mixed = Mixed((base_source, source))
        guide = self._reward(f"{name}/reward", base, expert, mixed, seed + 1)
        clock.lap("reward")
        judge = self._discriminator(
            f"{name}/discriminator", guide, (base_source, source), seed + 2
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
            task, (base, expert), (guide, judge), place, c.scales, plans=c.plans, seed=seed
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
        return [map_of(self.task.plane, one, rows, bins=self.config.bins) for one in guides]

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

        return self._guide(name, extract)

    def _discriminator(
        self, name: str, guide: TrajectoryGuide, sources: tuple[Strided, Strided], seed: int
    ) -> TrajectoryGuide:
        """The reward's network, trained as long and on as many rows, to tell the data apart."""
        matching, space = self.config.matching, guide.space
        model, key = self.config.reward.make(space), jax.random.key(seed)
        rows = jnp.zeros((1, *space.shape)), jnp.zeros(1, jnp.int32)

        def discriminate(context: RunContext) -> TrajectoryGuide:
            params, _ = train_discriminator(
                model,
                model.init(key, *rows)["params"],
                *sources,
                guide.schedule,
                optimizer(matching),
                steps=matching.steps,
                key=key,
                options=matching,
                pin=space.pin,
                on_step=context.on_step,
                checkpoints=context.checkpoints,
                save_every=context.save_every,
            )
            return TrajectoryGuide(DiscriminatorGuide(params, model), space, guide.schedule)

        return self._guide(name, discriminate)

    def _model(
        self, name: str, steps: int, make: Callable[[RunContext], TrajectoryModel]
    ) -> TrajectoryModel:
        """The denoiser of a name, made where it is not there; see `_training`."""
        path = self.folder / f"{name}.safetensors"
        with self._training(path, steps) as context:
            if context:
                save_model(path, make(context))
        return load_model(path, TrajectorySpace)

    def _guide(self, name: str, make: Callable[[RunContext], TrajectoryGuide]) -> TrajectoryGuide:
        """The reward or discriminator of a name, likewise."""
        path = self.folder / f"{name}.safetensors"
        with self._training(path, self.config.matching.steps) as context:
            if context:
                save_guide(path, make(context))
        return load_guide(path, TrajectorySpace)

    @contextlib.contextmanager
    def _training(self, path: pathlib.Path, steps: int) -> Iterator[RunContext | None]:
        """What a training of the model to be at `path` is given; None where the model is there.

        A training is logged in a run's directory beside the model and, after a kill, goes on from
        its last checkpoint; these are gone once the model is there.
        """
        folder = path.with_suffix("")
        if path.exists():
            yield None
        else:
            name = f"{self.task.name} {path.stem}"
            about = {"out": str(self.config.out), "model": name}
            with open_run(folder, about, name, steps, save_every=self.config.save_every) as run:
                yield run
        # A start that was killed between the model's writing and here left them, too.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


class _Clock:
    """Seconds of each part of a goal's work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._begun = round(now - self._begun, 1), now


def _say(line: str) -> None:
    print(line, flush=True)
