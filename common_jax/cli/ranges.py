"""Numbers with a range, as types of options.

The command line checks options against their types as it reads them. `check_ranges` checks options
that were made in Python, where types are not enforced: numbers, and choices (`Literal`).
"""

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common_jax.errors import InputError

__all__ = [
    "BelowOne",
    "AboveZeroToOne",
    "HalfAtMost",
    "MeshSize",
    "NonNegativeFloat",
    "NonNegativeInt",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "TwoOrMore",
    "UnitInterval",
    "check_range",
    "check_ranges",
    "in_words",
    "plain",
]

_SEEDS = 2**32  # jax truncates a seed beyond 32 bits without a warning

if TYPE_CHECKING:
    PositiveInt = NonNegativeInt = TwoOrMore = Seed = MeshSize = int
    PositiveFloat = NonNegativeFloat = float
    BelowOne = HalfAtMost = UnitInterval = AboveZeroToOne = float
else:
    from jsonargparse.typing import ClosedUnitInterval as UnitInterval
    from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

    TwoOrMore = restricted_number_type("TwoOrMore", int, [(">=", 2)])
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", _SEEDS)])
    MeshSize = restricted_number_type("MeshSize", int, [("==", -1), (">=", 1)], join="or")
    PositiveFloat = restricted_number_type("PositiveFinite", float, [(">", 0.0), ("<", math.inf)])
    NonNegativeFloat = restricted_number_type(
        "NonNegativeFinite", float, [(">=", 0.0), ("<", math.inf)]
    )
    BelowOne = restricted_number_type("BelowOne", float, [(">=", 0.0), ("<", 1.0)])
    HalfAtMost = restricted_number_type("HalfAtMost", float, [(">=", 0.0), ("<=", 0.5)])
    AboveZeroToOne = restricted_number_type("AboveZeroToOne", float, [(">", 0.0), ("<=", 1.0)])

_IN_WORDS = {
    "PositiveInt": "1 or more",
    "NonNegativeInt": "0 or more",
    "TwoOrMore": "2 or more",
    "Seed": f"0 to {_SEEDS - 1}",
    "MeshSize": "1 or more, or -1 for all devices that are left",
    "PositiveFinite": "above 0",
    "NonNegativeFinite": "0 or more",
    "BelowOne": "0 or more and below 1",
    "HalfAtMost": "0 to 0.5",
    "AboveZeroToOne": "above 0 and at most 1",
    "ClosedUnitInterval": "0 to 1",
}


def in_words(name: str) -> str:
    """The range of a type, by its name: "1 or more"; its name where it is none of these."""
    return _IN_WORDS.get(name, name)


def check_ranges(options: Any, prefix: str = "") -> None:
    """Raise InputError naming the first option of a dataclass, also nested, beyond its range."""
    if not dataclasses.is_dataclass(options) or isinstance(options, type):
        raise InputError(f"options are {options!r}: give an object of the class of options")
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
        else:
            check_range(hints[field.name], value, name)


def check_range(hint: Any, value: Any, name: str) -> None:
    """Raise InputError naming a value beyond the range of its type, one of those above."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # of a Literal: the latter
        _check_some(arguments, value, name)
    elif typing.get_origin(hint) is typing.Literal:
        if value not in arguments:
            choices = " or ".join(map(str, arguments))
            raise InputError(f"{name} must be {choices}, not {value!r}")
    elif isinstance(value, dict):
        for key, one in value.items():
            check_range(arguments[1], one, f"{name}: {key}")
    elif isinstance(value, tuple | list):
        for one in value:
            check_range(arguments[0] if arguments else Any, one, name)
    elif (allowed := _IN_WORDS.get(getattr(hint, "__name__", ""))) is not None:
        try:
            typing.cast(type, hint)(value)
        except (ValueError, TypeError):
            raise InputError(f"{name} must be {allowed}, not {value}") from None


def _check_some(hints: Sequence[Any], value: Any, name: str) -> None:
    """InputError of the first of the hints, where the value is of none of them."""
    errors = []
    for hint in hints:
        kind = typing.get_origin(hint) or hint
        kind = tuple | list if kind in (tuple, list) else kind
        ranged = getattr(hint, "__name__", "") in _IN_WORDS or kind is typing.Literal
        if not ranged and kind is not Any and not isinstance(value, kind):
            continue
        try:
            return check_range(hint, value, name)
        except InputError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def plain(value: Any) -> Any:
    """Options with numbers of the types above as int and float, which YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([plain(one) for one in value])
    if isinstance(value, int | float) and type(value).__name__ in _IN_WORDS:
        return int(value) if isinstance(value, int) else float(value)
    return value
