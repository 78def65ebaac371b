"""`tuco-jax demo`: the scores of five kinds of prompts on a real pair, as tables and a report."""

import dataclasses
import pathlib
import time

from rich.console import Console
from rich.table import Table

from common_jax import resume
from common_jax.cli.ranges import NonNegativeInt
from common_jax.errors import InputError
from tuco_jax.datasets.prompt_groups import prompt_groups
from tuco_jax.studies import demo
from tuco_jax.studies.base import load_studied_pair
from tuco_jax.studies.demo_report import Report, write
from tuco_jax.studies.options import GroupOptions
from tuco_jax.weights.options import check_pair

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True)
class Config(GroupOptions):
    """Score five groups of prompts on a pair, and report.

    Args:
        maps: prompts of each group that are shown token by token.
    """

    out: pathlib.Path = pathlib.Path("runs/demo")
    maps: NonNegativeInt = 2


def run(config: Config) -> pathlib.Path:
    """Load the pair, score, print the tables, write the report; returns the report's path.

    Raises InputError for a folder that holds anything but an earlier demo's report, and
    while another demo writes there.
    """
    started = time.perf_counter()
    resume.check_alone(config.out)
    if not {path.name for path in config.out.glob("*")} <= {"report.html", resume.LOCK}:
        raise InputError(f"{config.out}: holds files that are no demo's; name another folder")
    check_pair(config)
    groups = prompt_groups(config.prompts, config.seed)
    with resume.alone(config.out):
        pair, tokenizer, facts = load_studied_pair(config)
        facts["loading"] = f"{time.perf_counter() - started:.1f} s"
        report = demo.measure(
            pair,
            tokenizer,
            groups,
            maps=config.maps,
            seed=config.seed,
            facts=facts,
            progress=True,
        )
        path = config.out / "report.html"
        write(path, report)
    _print(report)
    print(f"{time.perf_counter() - started:.0f} s in all. Report: {path.resolve()}")
    return path


def _print(report: Report) -> None:
    console = Console()
    means = Table(title="TuCo by kind of prompt")
    for column in ("group", "prompts", "mean tokens", "mean TuCo", "95% interval"):
        means.add_column(column, justify="left" if column == "group" else "right")
    for g in report.groups:
        means.add_row(
            g.name,
            str(len(g.texts)),
            f"{g.tokens.mean():.0f}",
            f"{g.mean.value:.4f}",
            f"{g.mean.low:.4f} to {g.mean.high:.4f}",
        )
    aucs = Table(title="AUC: probability that the first has the higher TuCo (0.5 is chance)")
    for column in ("first > second", "AUC", "95% interval", "first higher?"):
        aucs.add_column(column, justify="left" if "first" in column else "right")
    for c in report.contrasts:
        interval = f"{c.auc.low:.3f} to {c.auc.high:.3f}"
        aucs.add_row(f"{c.higher} > {c.lower}", f"{c.auc.value:.3f}", interval, c.verdict)
    console.print(means)
    console.print(aucs)
