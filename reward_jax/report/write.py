"""A report, from files of models and episodes to a page in a folder."""

import dataclasses
import pathlib

import jax
import numpy as np

from common_jax.cli.ranges import check_ranges
from common_jax.errors import InputError
from common_jax.io.files import write_text
from common_jax.run import check_run, held_run, read_metrics
from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.planning.kinds import check_own, kind_of_model
from reward_jax.planning.options import EpisodesOption, FolderOption, PairOption
from reward_jax.planning.reward_run import read_diagnostics
from reward_jax.report.measure import SHOWN, Measured, PageOptions, compare, measure
from reward_jax.report.page import render
from reward_jax.reward.discriminator import DiscriminatorGuide

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
    kind = kind_of_model(options.base)
    check_own(kind, f"{options.base} is", options)
    base, expert = (load_model(path, kind.space) for path in (options.base, options.expert))
    guide = load_guide(options.reward, kind.space)
    if isinstance(guide.guide, DiscriminatorGuide):
        raise InputError(f"{options.reward}: holds a discriminator; a reward is wanted")
    compared = compare(base, expert, guide)
    if compared.task.replans:
        options.rollout.check(base.space.shape[0], compared.task.name)
    metrics, diagnostics = read_metrics(options.reward), read_diagnostics(options.reward)
    source = kind.read(options.data, base.space, options).source(base.space)
    held_out = kind.held_out(options.data, expert.space)
    windows = options.windows if compared.task.plane else SHOWN
    with held_run(options.out, "report", dataclasses.asdict(options)):
        rows = np.asarray(source.sample(jax.random.key(options.seed), windows))
        measured = measure(
            compared, rows, options, held_out=held_out, metrics=metrics, diagnostics=diagnostics
        )
        path = options.out / "report.html"
        write_text(path, render(measured))
        return Written(path, measured)
