"""The command line `reward-jax COMMAND`: its commands."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from common_jax.cli.command_line import Command, run
from reward_jax.studies.catalog import STUDIES

__all__ = ["COMMANDS", "main"]

_ABOUT = "What does an expert want that its base does not? Rewards from two diffusion models."
_Loaded = tuple[type, Callable[[Any], Any]]


def _data() -> _Loaded:
    from reward_jax.commands.data import DataConfig, run_data

    return DataConfig, run_data


def _train() -> _Loaded:
    from reward_jax.commands.train import TrainConfig, run_train

    return TrainConfig, run_train


def _extract() -> _Loaded:
    from reward_jax.commands.extract import ExtractConfig, run_extract

    return ExtractConfig, run_extract


def _heatmap() -> _Loaded:
    from reward_jax.commands.heatmap import HeatmapConfig, run_heatmap

    return HeatmapConfig, run_heatmap


def _steer() -> _Loaded:
    from reward_jax.commands.steer import SteerConfig, run_steer

    return SteerConfig, run_steer


def _sweep() -> _Loaded:
    from reward_jax.commands.steer import SweepConfig, run_sweep

    return SweepConfig, run_sweep


def _report() -> _Loaded:
    from reward_jax.commands.report import ReportConfig, run_report

    return ReportConfig, run_report


COMMANDS = {
    "data": Command("record data of a task: of a base, or of an expert", _data),
    "train": Command("train a diffusion model on recorded trajectories", _train),
    "extract": Command("learn the reward of an expert model relative to its base", _extract),
    "heatmap": Command("draw where a reward is high, and its peak against the goal", _heatmap),
    "steer": Command("plan with the base, steered by a reward, and execute", _steer),
    "sweep": Command("guidance scales and stop steps, all in one compiled call", _sweep),
    "report": Command("one HTML page of a base, an expert and their reward", _report),
    **STUDIES,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    return run("reward-jax", _ABOUT, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
