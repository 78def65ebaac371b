"""The Maze2D study: four mazes, eight goals each, a reward for every goal.

For each maze a base model of walks to random goals; for each goal an expert, the base trained
further on walks to that goal alone; the reward of the two, with its heat map; and plans of the
base steered by it. Beside them: the discriminator, and a null control, the reward of two
checkpoints of one base.

    out/MAZE/{base,null_base,null_reward}.safetensors, null.json
    out/MAZE/goal_K/{expert,reward,discriminator}.safetensors, result.json, maps.npz
    out/MAZE/base/, out/MAZE/goal_K/expert/, ...   metrics of each model's training
    out/results.json, out/report/

What is there is not made again, and a training goes on from its last checkpoint, so that a study
that was stopped goes on where it stood; several processes may take a maze each.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common_jax.cli.options import check_seed
from common_jax.errors import InputError
from common_jax.io.files import write_json
from common_jax.run import Run, check_directory, note_run
from reward_jax.commands import extract, train
from reward_jax.commands.extract import (
    ExtractConfig,
    Matching,
    RewardOptions,
    diagnose,
    fit_reward,
)
from reward_jax.commands.kept import read_kept
from reward_jax.commands.progress import check_resumed, reporter
from reward_jax.commands.steer import ends, plan, plan_sweep, positions, starts_in
from reward_jax.commands.train import (
    NetworkOptions,
    TrainConfig,
    Training,
    fit,
    optimiser,
    space_of,
    window_source,
)
from reward_jax.data.trajectory.checkpoint import (
    TrajectoryGuide,
    TrajectoryModel,
    load_guide,
    load_model,
    save_guide,
    save_model,
)
from reward_jax.diffusion.loop import steps_done
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Mixed, Strided
from reward_jax.reward.discriminator import DiscriminatorGuide, train_discriminator
from reward_jax.reward.extract import RelativeReward
from reward_jax.studies.maze_report import write_report
from reward_jax.tasks.maze.collect import collect, steps_for
from reward_jax.tasks.maze.heatmap import HeatMap, heat_map, score_windows
from reward_jax.tasks.maze.mazes import Maze, goals, maze

__all__ = ["MazeStudyConfig", "STRIDES", "run_maze_study"]

# Environment steps between rows: the longest walks of a maze fit into 32 rows.
STRIDES = {"open": 10, "umaze": 10, "medium": 16, "large": 28}
_GUIDES = ("reward", "logit", "sigmoid")  # that plans are steered by; a discriminator's last two


@dataclasses.dataclass
class MazeStudyConfig:
    """Extract a reward for every goal of every maze.

    Args:
        out: folder of the study; what is there already is kept.
        mazes: of open, umaze, medium, large.
        goals: how many of each maze's eight.
        horizon: rows of a trajectory.
        diffusion_steps: T.
        network: of the denoisers.
        base: training of the bases.
        base_steps: steps of a maze's base, where they are not base.steps: long walks through
            narrow halls take longer to learn.
        expert: training of the experts, which begin as their base.
        reward: the reward network.
        matching: its training.
        base_episodes: of the base's data.
        expert_episodes: of an expert's data.
        map_windows: windows of the base's held-out data that make a heat map.
        bins: of a heat map, to the side of a cell.
        plans: steered plans for each goal.
        scales: guidance scales that are tried.
        headline_scale: the one that the summary tells of.
        seed: of everything.
        save_every: steps between checkpoints of a model in training.
    """

    out: pathlib.Path = pathlib.Path("runs/maze-study")
    mazes: tuple[str, ...] = ("open", "umaze", "medium", "large")
    goals: int = 8
    horizon: int = 32
    diffusion_steps: int = 50
    network: NetworkOptions = dataclasses.field(default_factory=NetworkOptions)
    base: Training = dataclasses.field(default_factory=Training)
    base_steps: dict[str, int] = dataclasses.field(
        default_factory=lambda: {"medium": 24000, "large": 24000}
    )
    expert: Training = dataclasses.field(
        default_factory=lambda: Training(
            steps=1500, learning_rate=5e-4, ema_decay=0.99, ema_every=1, ema_begin=0
        )
    )
    reward: RewardOptions = dataclasses.field(default_factory=RewardOptions)
    matching: Matching = dataclasses.field(default_factory=Matching)
    base_episodes: int = 2000
    expert_episodes: int = 600
    map_windows: int = 10000
    bins: int = 10
    plans: int = 256
    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    headline_scale: float = 2.0
    seed: int = 0
    save_every: int = 1000


def run_maze_study(config: MazeStudyConfig) -> dict[str, Any]:
    """Do what is not done yet; writes and returns the summary (results.json)."""
    if not 1 <= config.goals <= 8:
        raise InputError(f"goals is {config.goals}: give 1 to 8")
    if config.headline_scale not in config.scales:
        raise InputError(f"headline_scale {config.headline_scale} is none of the scales")
    for name in config.base_steps:
        if name not in STRIDES:
            raise InputError(f"base_steps: {name!r} is no maze; there are {', '.join(STRIDES)}")
    _check(config)
    layouts = [maze(name) for name in config.mazes]
    settings = _plain(config)
    check_directory(config.out, resume=True)
    free = ("mazes", "goals", "out", "save_every")  # may change from start to start
    check_resumed(config.out, settings, free)
    _read_results(config.out, config.scales)  # hours before `summarise` does
    note_run(config.out, settings)
    for layout in layouts:
        work = _Work(config, layout)
        work.null()
        for index in range(config.goals):
            work.goal(index)
    summary = summarise(config.out, config.scales)
    page = write_report(config.out, summary, config.headline_scale)
    _say(f"report: {page.resolve()}")
    return summary


def _plain(config: MazeStudyConfig) -> dict[str, Any]:
    """Settings as a YAML file holds them."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _check(config: MazeStudyConfig) -> None:
    """InputError for what would fail after hours of training."""
    if not config.mazes:
        raise InputError("mazes is empty: give one of " + ", ".join(STRIDES))
    for name in ("plans", "map_windows", "bins", "base_episodes", "expert_episodes", "save_every"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} must be 1 or more, not {getattr(config, name)}")
    files: dict[str, Any] = dict(data="-", out="-", network=config.network, seed=config.seed)
    files |= dict(horizon=config.horizon, diffusion_steps=config.diffusion_steps)
    for name, training in (("base", config.base), ("expert", config.expert)):
        with prefixed(name, "training"):
            train.check(TrainConfig(**files, training=training))
    if config.expert.prediction != config.base.prediction:
        raise InputError("expert.prediction must be base.prediction: experts begin as their base")
    for name, steps in config.base_steps.items():
        if steps < 1:
            raise InputError(f"base_steps: {name} must be 1 or more, not {steps}")
    check_seed(config.seed)
    if config.matching.x_t != "mixed":
        raise InputError(
            f"matching.x_t is {config.matching.x_t}, but the study matches on walks of both "
            "models: leave it out, or set mixed"
        )
    both: dict[str, Any] = dict(base="-", expert="-", data="-", out="-", expert_data="-")
    extract.check(ExtractConfig(**both, reward=config.reward, matching=config.matching))


@contextlib.contextmanager
def prefixed(name: str, instead_of: str) -> Iterator[None]:
    """Errors of another command's options in the terms of this one's."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(f"{instead_of}.", f"{name}.")) from None


class _Work:
    """What is made for one maze."""

    def __init__(self, config: MazeStudyConfig, layout: Maze) -> None:
        self.config, self.maze = config, layout
        self.folder = config.out / layout.name
        self.stride = STRIDES[layout.name]
        self._base: tuple[TrajectoryModel, Strided, np.ndarray] | None = None

    def _episodes(self, goal: Any, count: int, seed: int) -> Any:
        steps = steps_for(self.maze, self.config.horizon, self.stride)
        return collect(self.maze, goal=goal, episodes=count, steps=steps, seed=seed)

    def base(self) -> tuple[TrajectoryModel, Strided, np.ndarray]:
        """The base, the windows of its data, and held-out windows [N, H, D]."""
        if self._base:
            return self._base
        c = self.config
        episodes = self._episodes(None, c.base_episodes, c.seed)
        space = space_of(episodes, horizon=c.horizon, stride=self.stride, actions=False)
        source = window_source(episodes, space)
        steps = c.base_steps.get(self.maze.name, c.base.steps)

        def train_base(**noted: Any) -> TrajectoryModel:
            begun = time.perf_counter()
            model = fit(
                source,
                None,
                space,
                dataclasses.replace(c.base, steps=steps),
                seed=c.seed,
                network=c.network,
                schedule=cosine_schedule(c.diffusion_steps),
                clip_x0=1.2,
                **noted,
            )
            _say(f"{self.maze.name}: base, {time.perf_counter() - begun:.0f} s")
            return model

        base = self._model(self.folder / "base.safetensors", steps, train_base)
        held = window_source(self._episodes(None, c.base_episodes, c.seed + 1), space)
        rows = np.asarray(held.sample(jax.random.key(c.seed), c.map_windows))
        self._base = base, source, rows
        return self._base

    def _model(
        self, path: pathlib.Path, steps: int, make: Callable[..., TrajectoryModel]
    ) -> TrajectoryModel:
        """The denoiser at `path`, made where it is not there; see `_training`."""
        with self._training(path, steps) as noted:
            if noted:
                save_model(path, make(**noted))
        return load_model(path)

    def _guide(self, path: pathlib.Path, make: Callable[..., TrajectoryGuide]) -> TrajectoryGuide:
        """The reward or discriminator at `path`, likewise."""
        with self._training(path, self.config.matching.steps) as noted:
            if noted:
                save_guide(path, make(**noted))
        return load_guide(path)

    @contextlib.contextmanager
    def _training(self, path: pathlib.Path, steps: int) -> Iterator[dict[str, Any]]:
        """What a training of the model to be at `path` is given; {} where the model is there.

        A training is logged in a run's directory beside the model and, after a kill, goes on from
        its last checkpoint; these are gone once the model is there.
        """
        folder = path.with_suffix("")
        kept = folder / "checkpoints"
        if path.exists():
            yield {}
        else:
            name, done = f"{self.maze.name} {path.stem}", steps_done(kept)
            about = {"study": str(self.config.out), "model": name}
            every = self.config.save_every
            with (
                Run(folder, about, start=done) as run,
                reporter(name, steps, run, done) as on_step,
            ):
                yield {"on_step": on_step, "checkpoints": kept, "save_every": every}
        # A start that was killed between the model's writing and here left them, too.
        shutil.rmtree(kept, ignore_errors=True)

    def null(self) -> None:
        """Two checkpoints of one base: where does the map of their "reward" peak?"""
        path = self.folder / "null.json"
        if path.exists():
            return
        c = self.config
        base, source, rows = self.base()
        other = self._model(
            self.folder / "null_base.safetensors",
            c.expert.steps,
            lambda **noted: fit(source, base, base.space, c.expert, seed=c.seed + 500, **noted),
        )
        both = Mixed((source, source))
        guide = self._guide(
            self.folder / "null_reward.safetensors",
            lambda **noted: self._reward(base, other, both, c.seed + 501, noted),
        )
        peaks = [self._map(g, rows).peak for g in self._seeds(guide)]
        held = jnp.asarray(rows[:256])
        found = diagnose(guide, base.denoiser, other.denoiser, held, matching=c.matching)
        write_json(path, {"peaks": np.stack(peaks).tolist(), "diagnostics": found})

    def goal(self, index: int) -> None:
        """Expert, reward, map, steering and the discriminator of one goal."""
        folder = self.folder / f"goal_{index}"
        if (folder / "result.json").exists():
            return
        c, place = self.config, goals(self.maze)[index]
        base, base_source, rows = self.base()
        begun, seconds = time.perf_counter(), {}

        def lap(name: str) -> None:
            nonlocal begun
            now = time.perf_counter()
            seconds[name], begun = round(now - begun, 1), now

        seed = c.seed + 1000 + 10 * index
        episodes = self._episodes(place, c.expert_episodes, seed)
        space = dataclasses.replace(base.space, about=dict(episodes.about))
        source = window_source(episodes, space)
        lap("data")
        expert = self._model(
            folder / "expert.safetensors",
            c.expert.steps,
            lambda **noted: fit(source, base, space, c.expert, seed=seed, **noted),
        )
        lap("expert")
        mixed = Mixed((base_source, source))
        guide = self._guide(
            folder / "reward.safetensors",
            lambda **noted: self._reward(base, expert, mixed, seed + 1, noted),
        )
        lap("reward")
        judge = self._guide(
            folder / "discriminator.safetensors",
            lambda **noted: self._discriminator(guide, base_source, source, seed + 2, noted),
        )
        lap("discriminator")
        # Walks that no model has seen.
        fresh = self._episodes(place, max(8, c.expert_episodes // 20), seed + 3)
        apart = window_source(fresh, space).sample(jax.random.key(seed), 256)
        held = jnp.concatenate([rows[:256], apart])
        diagnostics = diagnose(guide, base.denoiser, expert.denoiser, held, matching=c.matching)
        maps = {"reward": self._map(guide, rows), "discriminator": self._map(judge, rows)}
        seeds = [self._map(g, rows) for g in self._seeds(guide)[1:]]
        lap("maps")
        steering = self._steer(base, expert, guide, judge, place, seed)
        lap("steering")
        found = {name: m.values for name, m in maps.items()}
        np.savez_compressed(folder / "maps.npz", allow_pickle=False, **found)
        write_json(
            folder / "result.json",
            {
                "maze": self.maze.name,
                "goal": place.tolist(),
                "peak": self._peak(maps["reward"], place),
                "seed_peaks": [self._peak(m, place) for m in seeds],
                "discriminator_peak": self._peak(maps["discriminator"], place),
                "free_cells": len(self.maze.free),
                "diagnostics": diagnostics,
                "steering": steering,
                "seconds": seconds,
            },
        )
        off = self._peak(maps["reward"], place)["metres"]
        _say(
            f"{self.maze.name} goal {index}: peak {off:.2f} m off; {json.dumps(steering)}; "
            f"{json.dumps(seconds)}"
        )

    def _reward(
        self,
        base: TrajectoryModel,
        expert: TrajectoryModel,
        source: Mixed,
        seed: int,
        noted: Mapping[str, Any],
    ) -> TrajectoryGuide:
        c, d, e = self.config, base.denoiser, expert.denoiser
        terms = expert.space, d.schedule, c.reward, c.matching
        return fit_reward(d, e, source, *terms, seed=seed, **noted)

    def _discriminator(
        self,
        guide: TrajectoryGuide,
        base: Strided,
        expert: Strided,
        seed: int,
        noted: Mapping[str, Any],
    ) -> TrajectoryGuide:
        """The reward's network, trained as long and on as many rows, to tell the data apart."""
        c, space = self.config, guide.space
        model, key = c.reward.make(space), jax.random.key(seed)
        rows = jnp.zeros((1, *space.shape)), jnp.zeros(1, jnp.int32)
        params, _ = train_discriminator(
            model,
            model.init(key, *rows)["params"],
            base,
            expert,
            guide.schedule,
            optimiser(c.matching.learning_rate, c.matching.steps, decay=True, clip=0.0),
            steps=c.matching.steps,
            key=key,
            batch_size=c.matching.batch,
            pin=space.pin,
            steps_per_call=c.matching.steps_per_call,
            **noted,
        )
        return TrajectoryGuide(DiscriminatorGuide(params, model), space, guide.schedule)

    def _seeds(self, guide: TrajectoryGuide) -> list[TrajectoryGuide]:
        """The mean of the seeds, then each seed."""
        reward = guide.guide
        assert isinstance(reward, RelativeReward) and reward.seeds
        each = [dataclasses.replace(guide, guide=reward.seed(i)) for i in range(reward.seeds)]
        return [guide, *each]

    def _map(self, guide: TrajectoryGuide, rows: np.ndarray) -> HeatMap:
        places = positions(rows, guide.space)
        scores = score_windows(guide.guide, rows)
        return heat_map(
            places, scores, self.maze.extent, bins=self.config.bins, cell=self.maze.size
        )

    def _peak(self, found: HeatMap, goal: np.ndarray) -> dict[str, Any]:
        return {
            "metres": float(np.linalg.norm(found.peak - goal)),
            "in_cell": bool((self.maze.cell_of(found.peak) == self.maze.cell_of(goal)).all()),
            "at": found.peak.tolist(),
        }

    def _steer(
        self,
        base: TrajectoryModel,
        expert: TrajectoryModel,
        guide: TrajectoryGuide,
        judge: TrajectoryGuide,
        goal: np.ndarray,
        seed: int,
    ) -> dict[str, dict[str, Any]]:
        c = self.config
        starts, key = starts_in(self.maze, c.plans, seed), jax.random.key(seed)

        def measure(x: jax.Array) -> dict[str, Any]:
            found = ends(self.maze, goal, positions(x, base.space), starts, self.stride)
            return {k: round(v, 4) for k, v in dataclasses.asdict(found).items()}

        found = {
            "unsteered": measure(plan(base, starts, key=key)),
            "expert": measure(plan(expert, starts, key=key)),
        }
        assert isinstance(judge.guide, DiscriminatorGuide)
        sigmoid = judge.guide.replace(output="sigmoid")  # pyright: ignore[reportAttributeAccessIssue]
        for name, one in zip(_GUIDES, (guide.guide, judge.guide, sigmoid), strict=True):
            swept = plan_sweep(base, starts, key=key, reward=one, scales=c.scales, t_stopgrads=[0])
            for scale, x in zip(c.scales, swept[:, 0], strict=True):
                found[f"{name} {scale:g}"] = measure(x)
        return found


def _read_results(
    out: pathlib.Path, scales: Sequence[float]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Results of the goals and, by maze, of the null control; InputError for a damaged file."""
    peak = dict.fromkeys(("metres", "in_cell", "at"))
    guides = [f"{name} {scale:g}" for name in _GUIDES for scale in scales]
    shares = dict.fromkeys(("planned", "executed", "inside"))
    wanted = {
        **{"maze": None, "goal": [None], "free_cells": None, "diagnostics": {}, "seconds": {}},
        **{"peak": peak, "seed_peaks": [peak], "discriminator_peak": peak},
        "steering": dict.fromkeys(("unsteered", "expert", *guides), shares),
    }
    results = [read_kept(p, wanted) for p in sorted(out.glob("*/goal_*/result.json"))]
    nulls = {
        p.parent.name: read_kept(p, {"peaks": [None], "diagnostics": None})
        for p in sorted(out.glob("*/null.json"))
    }
    return results, nulls


def summarise(out: pathlib.Path, scales: Sequence[float]) -> dict[str, Any]:
    """The study's figures from what is there; also written to results.json.

    scales: those of the study. Raises InputError naming a result that is damaged.
    """
    results, nulls = _read_results(out, scales)
    if not results:
        raise InputError(f"{out}: holds no result yet")

    def share(values: Any) -> float:
        return float(np.mean(list(values)))

    steering = {
        name: {
            key: round(share(r["steering"][name][key] for r in results), 4)
            for key in ("planned", "executed", "inside")
        }
        for name in results[0]["steering"]
    }
    null_hits = []
    for r in results:
        layout = maze(r["maze"])
        cell = layout.cell_of(r["goal"])
        peaks = nulls.get(r["maze"], {}).get("peaks", [])[:1]
        null_hits += [bool((layout.cell_of(p) == cell).all()) for p in peaks]
    summary = {
        "goals": len(results),
        "peaks_in_goal_cell": sum(r["peak"]["in_cell"] for r in results),
        "share_in_goal_cell": share(r["peak"]["in_cell"] for r in results),
        "seed_share_in_goal_cell": share(p["in_cell"] for r in results for p in r["seed_peaks"]),
        "median_metres": float(np.median([r["peak"]["metres"] for r in results])),
        "discriminator_share_in_goal_cell": share(
            r["discriminator_peak"]["in_cell"] for r in results
        ),
        "null_share_in_goal_cell": share(null_hits) if null_hits else None,
        "chance_share_in_goal_cell": share(1 / r["free_cells"] for r in results),
        "steering": steering,
        "seconds": sum(sum(r["seconds"].values()) for r in results),
        "results": results,
        "null": nulls,
    }
    write_json(out / "results.json", summary)
    return summary


def _say(line: str) -> None:
    print(line, flush=True)
