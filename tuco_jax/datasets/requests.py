"""Harmful requests, read from a prompts file of any layout or taken from a public set by name."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from common_jax.errors import InputError
from tuco_jax.datasets import prompt_sources as sources
from tuco_jax.datasets.refusal_data import (
    SplitOptions,
    harmful_split,
    near_duplicates,
    without_duplicates_of,
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
    """A request; target: how an attack wants the answer to begin, where the file says it."""

    text: str
    target: str | None = None


def _held_out() -> list[str]:
    """The part of AdvBench that the shipped adapter was not trained on."""
    return harmful_split(SplitOptions()).evaluation


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
SAME = 0.8  # cosine of TF-IDF vectors above which two jailbreaks count as one


def untrained(texts: list[str]) -> list[str]:
    """Those that are no near-duplicate of a text that the shipped adapter was trained on."""
    return without_duplicates_of(texts, harmful_split(SplitOptions()).train)


def shared_jailbreaks() -> dict[str, str]:
    """`prompt_sources.wild_jailbreaks` without near-duplicates: the first of each is kept."""
    found = sources.wild_jailbreaks()
    groups = near_duplicates(list(found.values()), SAME)
    first = np.unique(groups, return_index=True)[1]
    return {name: found[name] for i, name in enumerate(found) if i in first}


def read_requests(source: str | pathlib.Path) -> list[Request]:
    """All requests of one of `SETS`, or of a file, whose rows may have a `target`.

    Raises InputError naming the file and line, or listing the sets.
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
