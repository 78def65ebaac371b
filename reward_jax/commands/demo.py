"""The demo: the shipped base and expert, their reward, its map, steered plans, a report.

It does what a user would by `reward-jax data`, `extract` and `report`, whose functions it calls.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

from common_jax import resume
from common_jax.cli.options import SeedOption
from common_jax.cli.ranges import PositiveInt, check_ranges
from common_jax.errors import InputError
from common_jax.io.files import make_folder, write_text
from reward_jax.data.checkpoint import load_model
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.planning.options import MatchingOption, SteeredOption
from reward_jax.planning.record import RecordOptions, record
from reward_jax.planning.reward_run import RewardRunOptions, load_extraction, run_extraction
from reward_jax.report.write import ReportOptions, write_report
from reward_jax.shipped import PAIR

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(SeedOption, SteeredOption, MatchingOption):
    """Extract a reward from the shipped models and write a report; their files name the task.

    Args:
        out: folder of the demo; an earlier demo there is replaced, nothing else is touched.
        episodes: how many are recorded for the base; a third as many for the expert.
    """

    out: pathlib.Path = pathlib.Path("runs/demo-reward")
    episodes: PositiveInt = 900


def run(config: Config) -> None:
    """Record, extract, report; prints what each of them found."""
    check_ranges(config)
    begun = time.perf_counter()
    if config.episodes < 3:
        raise InputError(f"episodes must be 3 or more, not {config.episodes}")
    with _folder(config.out) as out:
        _run(config, out)
    print(f"{time.perf_counter() - begun:.0f} s in all")


def _run(config: Config, out: pathlib.Path) -> None:
    models: dict[str, Any] = {k: str(PAIR / f"{k}.safetensors") for k in ("base", "expert")}
    space = load_model(models["expert"], TrajectorySpace).space

    shared: dict[str, Any] = dict(
        env=space.about["task"], horizon=space.horizon, stride=space.stride
    )
    seed, path = config.seed + 100, str(out / "base.hdf5")
    base = RecordOptions(out=path, episodes=config.episodes, seed=seed, **shared)
    shared |= dict(goal=space.about["goal"], seed=seed + 1)
    path = str(out / "expert.hdf5")
    expert = RecordOptions(out=path, episodes=config.episodes // 3, **shared)
    for options in (base, expert):
        print(record(options))

    x_t = config.matching.x_t
    extraction = RewardRunOptions(
        **models,
        data=None if x_t == "expert" else base.out,
        expert_data=None if x_t == "base" else expert.out,
        out=str(out / "reward"),
        matching=config.matching,
        seed=config.seed,
    )
    loaded = load_extraction(extraction)
    for note in loaded.notes:
        print(f"note: {note}")
    print(run_extraction(loaded, extraction))

    page = ReportOptions(
        **models,
        reward=extraction.out,
        data=base.out,
        out=out,
        guidance=config.guidance,
        plans=config.plans,
        seed=config.seed,
    )
    print(write_report(page))


@contextlib.contextmanager
def _folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """The demo's folder, held alone, without what an earlier one left to go on with.

    Refused where it holds others' files.
    """
    out = make_folder(out)
    marker = out / "demo.txt"
    if not marker.exists() and any(out.iterdir()):
        raise InputError(f"{out}: holds files that are no demo's; name another folder")
    taken = f"{out}: another run is writing there; name another directory"
    with resume.lock(out / ".demo.lock", taken):  # the report has one of its own
        write_text(marker, "Made by `reward-jax demo`, which makes it anew each time.\n")
        (out / resume.SETTINGS).unlink(missing_ok=True)
        shutil.rmtree(out / "reward", ignore_errors=True)
        yield out
