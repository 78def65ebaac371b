"""Harmful requests: of a file in any layout of prompts, or of a public set by its name."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from common_jax.errors import InputError
from tuco_jax.datasets import prompt_sources as sources
from tuco_jax.datasets.refusal_data import (
    RefusalDataConfig,
    harmful_split,
    near_duplicates,
    unlike,
)
from tuco_jax.prompts.read import read_prompts

__all__ = [
    "ORIGIN",
    "SETS",
    "Request",
    "read_file",
    "read_requests",
    "read_texts",
    "shared_jailbreaks",
]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked; target: what an attack wants the answer to begin with, where known."""

    text: str
    target: str | None = None


def _held_out() -> list[str]:
    """Of AdvBench, what the shipped adapter was not trained on."""
    return harmful_split(RefusalDataConfig()).evaluation


# What reports call the sets.
ORIGIN = {
    "advbench": "AdvBench, held out from the adapter's training",
    "strongreject": "StrongREJECT, without what it took from AdvBench",
    "harmbench": "HarmBench, standard behaviours",
    "do-not-answer": "Do-Not-Answer, malicious uses",
}
SETS: dict[str, Callable[[], list[str]]] = {
    "advbench": _held_out,
    "strongreject": lambda: untrained(sources.strongreject()),
    "harmbench": lambda: untrained(sources.harmbench()),
    "do-not-answer": lambda: untrained(sources.do_not_answer()),
}
SAME = 0.8  # cosine of TF-IDF vectors above which two jailbreaks are one with other commas


def untrained(texts: list[str]) -> list[str]:
    """Those that are no near-duplicates of what the shipped adapter was trained on."""
    return unlike(texts, harmful_split(RefusalDataConfig()).train)


def shared_jailbreaks() -> dict[str, str]:
    """`prompt_sources.wild_jailbreaks`, of those that are nearly one text the first."""
    found = sources.wild_jailbreaks()
    groups = near_duplicates(list(found.values()), SAME)
    first = np.unique(groups, return_index=True)[1]
    return {name: found[name] for i, name in enumerate(found) if i in first}


def read_requests(source: str | pathlib.Path) -> list[Request]:
    """All requests of a file, whose rows may have a `target`, or of one of `SETS`.

    Raises InputError naming the file and line, or the sets that there are.
    """
    if str(source) in SETS:
        return [Request(text) for text in SETS[str(source)]()]
    path = pathlib.Path(source)
    if not path.suffix and not path.exists():
        raise InputError(f"{source}: no such file, nor a set; sets are {', '.join(SETS)}")
    return read_file(path)


def read_file(path: str | pathlib.Path) -> list[Request]:
    """All requests of a file. Raises InputError naming the file and line."""
    found = []
    for p in read_prompts(path, layouts=True):
        if p.prompt is None:
            raise InputError(f"{path}:{p.line}: a request is `prompt`, not `messages`")
        found.append(Request(p.prompt, p.target))
    return found


def read_texts(source: str | pathlib.Path) -> list[str]:
    """The texts of `read_requests`."""
    return [request.text for request in read_requests(source)]
