"""Several processes of one run were given the same: options, files, versions.

Each computes its own share of one program, so that what is not the same in all ends in results
that are half another run's, or in processes that wait for one another.
"""

import json
from collections.abc import Mapping
from typing import Any

from common_jax.distributed import by_first, count, heard
from common_jax.errors import InputError

__all__ = ["agree", "flat", "plain"]

_LONGEST = 200  # characters of a value, in a message


def agree(facts: Mapping[str, Any], mend: str = "give all the same options and files") -> None:
    """Raise InputError, in all processes, where one's facts are not those of process 0.

    All call it at the same point of the program. facts: what JSON can hold, or has a text, by
    name; nested ones are named with dots. A checksum stands for what is long. mend: what a user
    should do. With one process it does nothing.
    """
    if count() == 1:
        return
    own = flat(plain(facts))
    first = by_first(lambda: own)
    if found := heard(_difference(first, own)):
        process, differs = found[0]
        raise InputError(f"process {process} was started {differs}: {mend}")


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON gives them back: tuples are lists, paths are texts."""
    return json.loads(json.dumps(dict(facts), default=str))


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested facts by names with dots, training.steps."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def _difference(first: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """The first fact that is another in process 0, as in "with norm 2, process 0 with norm 1"."""
    for name in {**own, **first}:
        mine, other = own.get(name), first.get(name)
        if json.dumps(mine) != json.dumps(other):  # as texts: NaN is NaN
            return f"{_with(name, mine)}, process 0 {_with(name, other)}"
    return None


def _with(name: str, value: Any) -> str:
    if value is None:
        return f"without {name}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"with {name} {text:.{_LONGEST}}"
