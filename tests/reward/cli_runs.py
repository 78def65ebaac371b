"""Tiny models and data on disk, and ways to run the command line on them."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.io import compile_cache
from reward_jax.cli import main
from reward_jax.data import hdf5
from reward_jax.data.checkpoint import save_guide, save_model
from reward_jax.data.episodes import Episodes
from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel, TrajectorySpace
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.schedule import make_schedule
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.reward.relative import RelativeReward

ROOT = pathlib.Path(__file__).parents[2]

STEPS = ["--training.steps", 20, "--training.steps_per_call", 10, "--training.batch_size", 8]
SMALL = ["--network.dim", 8, "--network.multipliers", "[1]"]
SMALL += ["--horizon", 8, "--diffusion_steps", 8, *STEPS]
MATCHING = ["--reward.widths", "[8]", "--matching.steps", 20, "--matching.steps_per_call", 10]
MATCHING += [
    "--matching.batch_size",
    8,
    "--matching.draws",
    64,
    "--matching.seeds",
    2,
    "--held_out",
    0.25,
]


def run(*argv: Any) -> int:
    """`main(argv)` in this process, which keeps its own compilation cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_cache, "enable", lambda: None)
        return main([str(a) for a in argv])


def printed_by(*argv: Any) -> str:
    """What a command that succeeds prints."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, **_: lines.append(" ".join(map(str, a))))
        assert run(*argv) == 0, lines
    return "\n".join(lines)


def start(*argv: Any) -> subprocess.Popen:
    """The command line in a process of its own, with the flags of this one."""
    return subprocess.Popen(
        [sys.executable, "-m", "reward_jax.cli", *map(str, argv)],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_jsonl(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def parameters(network: Any, shape: tuple[int, ...], seed: int, seeds: int | None = None) -> Any:
    """Random ones, without compiling an initialiser."""
    x, t = jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, t)["params"]
    rng = np.random.default_rng(seed)
    first = () if seeds is None else (seeds,)
    return jax.tree.map(
        lambda s: jnp.asarray(0.3 * rng.normal(size=first + s.shape), jnp.float32), shapes
    )


def space(**changes: Any) -> TrajectorySpace:
    """Of random walks in UMaze, H 8, D 4."""
    normaliser = Normaliser(np.zeros(4, np.float32), np.array([1.3, 1.3, 2, 2], np.float32))
    about = {"task": "umaze", "goal": [-1.2, 1.2]}
    return dataclasses.replace(TrajectorySpace(8, 10, 0, normaliser, about), **changes)


def model(
    seed: int = 0, *, schedule: str = "cosine", steps: int = 8, **changes: Any
) -> TrajectoryModel:
    """A denoiser with random parameters; changes: of its space."""
    found = space(**changes)
    network = TemporalUnet(found.width, 8, (1,))
    params = parameters(network, found.shape, seed)
    made = score_from(network, params, "v", make_schedule(schedule, steps), clip=1.2)
    return TrajectoryModel(made, found)


def reward(seed: int = 0, seeds: int | None = 2, **changes: Any) -> TrajectoryGuide:
    """A reward with random parameters; changes: of its space."""
    found, schedule = space(**changes), make_schedule("cosine", 8)
    network = WindowMLP(found.horizon, (8,))
    params = parameters(network, found.shape, seed, seeds)
    return TrajectoryGuide(
        RelativeReward(params, schedule, network, "score", seeds), found, schedule
    )


def episodes(seed: int = 0, *, count: int = 3, steps: int = 90, width: int = 4) -> Episodes:
    """Random rows, not walks."""
    rng = np.random.default_rng(seed)
    rows = rng.uniform(-1.3, 1.3, (count * steps, width)).astype(np.float32)
    acts = rng.uniform(-1, 1, (count * steps, 2)).astype(np.float32)
    about = {"task": "umaze", "goal": None}
    return Episodes(rows, acts, np.full(count, steps), about)


def save_all(folder: pathlib.Path) -> pathlib.Path:
    """base, expert, reward (.safetensors) and data.hdf5."""
    save_model(folder / "base.safetensors", model(0))
    save_model(folder / "expert.safetensors", model(1))
    save_guide(folder / "reward.safetensors", reward())
    hdf5.write(folder / "data.hdf5", episodes())
    return folder
