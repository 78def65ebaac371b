"""The demo: the shipped base and expert, their reward, its map, steered plans, a report.

It runs what a user would: `reward-jax data`, `extract` and `report`, and says so.
"""

import dataclasses
import pathlib
import shutil
import time
from typing import Any

from common_jax.cli.ranges import PositiveInt, Seed, check_ranges
from common_jax.errors import InputError
from common_jax.io.files import make_folder
from reward_jax.commands import data, extract, report
from reward_jax.commands.steering import STEERED
from reward_jax.data.trajectory.checkpoint import load_model
from reward_jax.planning.extract import Matching
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.shipped import PAIR

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Extract a reward from the shipped models and write a report; their files name the task.

    Args:
        out: folder of the demo; an earlier demo there is replaced, nothing else is touched.
        episodes: how many are recorded for the base; a third as many for the expert.
        matching: how the reward is trained.
        guidance: how plans are drawn and steered.
        plans: steered plans.
        seed: of everything.
    """

    out: pathlib.Path = pathlib.Path("runs/demo-reward")
    episodes: PositiveInt = 900
    matching: Matching = Matching()
    guidance: GuidanceOptions = STEERED
    plans: PositiveInt = report.Config.plans
    seed: Seed = 0


def run(config: Config) -> pathlib.Path:
    """Record, extract, report; returns the path of the page."""
    check_ranges(config)
    begun = time.perf_counter()
    if config.episodes < 3:
        raise InputError(f"episodes must be 3 or more, not {config.episodes}")
    out = make_folder(config.out)
    marker = out / "demo.txt"
    if not marker.exists() and any(out.iterdir()):
        raise InputError(f"{out}: holds files that are no demo's; name another folder")
    marker.write_text("Made by `reward-jax demo`, which makes it anew each time.\n", "utf-8")
    base, expert = PAIR / "base.safetensors", PAIR / "expert.safetensors"
    space = load_model(expert).space
    shared: dict[str, Any] = dict(
        env=space.about["task"], horizon=space.horizon, stride=space.stride
    )
    recorded = {
        "base": data.Config(
            out=str(out / "base.hdf5"), episodes=config.episodes, seed=config.seed + 100, **shared
        ),
        "expert": data.Config(
            out=str(out / "expert.hdf5"),
            episodes=config.episodes // 3,
            goal=space.about["goal"],
            seed=config.seed + 101,
            **shared,
        ),
    }
    for one in recorded.values():
        data.run(one)
    shutil.rmtree(out / "reward", ignore_errors=True)
    extract.run(
        extract.Config(
            base=str(base),
            expert=str(expert),
            data=None if config.matching.x_t == "expert" else recorded["base"].out,
            expert_data=None if config.matching.x_t == "base" else recorded["expert"].out,
            out=str(out / "reward"),
            matching=config.matching,
            seed=config.seed,
        )
    )
    path = report.run(
        report.Config(
            base=str(base),
            expert=str(expert),
            reward=str(out / "reward"),
            data=recorded["base"].out,
            out=out,
            guidance=config.guidance,
            plans=config.plans,
            seed=config.seed,
        )
    )
    print(f"{time.perf_counter() - begun:.0f} s in all")
    return path
