"""A report, from files of models and episodes to a page in a folder."""

import dataclasses
import pathlib

import jax
import numpy as np

from common_jax.cli.ranges import check_ranges
from common_jax.errors import InputError
from common_jax.io.files import atomic
from common_jax.run import check_run, held_run, read_metrics
from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.trajectory.space import TrajectorySpace
from reward_jax.planning.fit import window_source
from reward_jax.planning.options import EpisodesOption, FolderOption, PairOption
from reward_jax.planning.reward_run import read_diagnostics
from reward_jax.report.measure import Measured, PageOptions, compare, measure
from reward_jax.report.page import render
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.tasks.find import read

__all__ = ["ReportOptions", "Written", "write_report"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions(PageOptions, FolderOption, EpisodesOption, PairOption):
    """Draw a base, an expert and their reward, steer the base, and write report.html.

    Args:
        reward: the run of `reward-jax extract`.
    """

    reward: str


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """A page, and what it shows."""

    path: pathlib.Path
    measured: Measured

    def __str__(self) -> str:
        return "\n".join([*self.measured.lines(), f"report: {self.path.resolve()}"])


def write_report(options: ReportOptions) -> Written:
    """Read, measure, write; raises InputError, before anything is written, for what cannot be."""
    check_ranges(options)
    options.guidance.made_sampler()
    check_run(options.out, "report", dataclasses.asdict(options))
    base, expert = (
        load_model(options.base, TrajectorySpace),
        load_model(options.expert, TrajectorySpace),
    )
    guide = load_guide(options.reward, TrajectorySpace)
    if isinstance(guide.guide, DiscriminatorGuide):
        raise InputError(f"{options.reward}: holds a discriminator; a reward is wanted")
    compared = compare(base, expert, guide)
    metrics, diagnostics = read_metrics(options.reward), read_diagnostics(options.reward)
    episodes = read(options.data, ends=options.cut.ends, env=options.env)
    source = window_source(episodes, base.space, options.cut.padding)
    with held_run(options.out, "report", dataclasses.asdict(options)):
        rows = np.asarray(source.sample(jax.random.key(options.seed), options.windows))
        measured = measure(compared, rows, options, metrics=metrics, diagnostics=diagnostics)
        path = options.out / "report.html"
        with atomic(path) as temporary:
            temporary.write_text(render(measured), "utf-8")
        return Written(path, measured)
