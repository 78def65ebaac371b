"""Options that several studies share, beside those of every study."""

import dataclasses
import itertools

from common_jax.cli.ranges import NonNegativeInt, TwoOrMore
from common_jax.errors import InputError
from tuco_jax.core.alpha_grid import PAPER_GRID
from tuco_jax.studies.base import StudyOptions

__all__ = ["AlphaOptions", "GroupOptions", "RequestOptions", "ShotOptions", "Shots", "check_shots"]

Shots = tuple[NonNegativeInt, ...]  # numbers of earlier exchanges


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlphaOptions(StudyOptions):
    """Multiple-choice questions, and the alphas of which one is chosen.

    Args:
        tasks: names of tasks; all by default. A behaviour is a task, named as its file.
        limit: at most this many questions a task, the first; 0 for all.
        alphas: the grid; 1 must be in it.
        folds: of the cross-validation.
        chat: put the question through the chat template.
    """

    tasks: tuple[str, ...] = ()
    limit: NonNegativeInt = 0
    alphas: tuple[float, ...] = PAPER_GRID
    folds: TwoOrMore = 5
    chat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupOptions(StudyOptions):
    """Five kinds of prompts.

    Args:
        prompts: in each of the five groups.
    """

    prompts: TwoOrMore = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOptions(StudyOptions):
    """Harmful requests that TuCo is measured on.

    Args:
        prompts: file of requests (`prompt`, or AdvBench's `goal`, with its `target`), or a set:
            advbench (held out), strongreject, harmbench, do-not-answer.
        count: requests that are measured, the same ones in every form and at every point.
    """

    prompts: str = "advbench"
    count: TwoOrMore = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShotOptions(RequestOptions):
    """Requests after earlier turns.

    Args:
        shots: numbers of earlier exchanges, rising; 0 for none.
    """

    shots: Shots = (0, 1, 2, 4, 8)


def check_shots(shots: Shots, *, least: int = 2, first: int | None = None) -> Shots:
    """The numbers; InputError unless they are `least` or more, rise, and begin with `first`."""
    rising = all(a < b for a, b in itertools.pairwise(shots))
    if len(shots) < least or not rising or first not in (None, shots[0]):
        start = "" if first is None else f" from {first}"
        raise InputError(f"shots is {list(shots)}: give {least} or more numbers that rise{start}")
    return shots
