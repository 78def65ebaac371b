"""Options with a range: one clear line from the command line and from Python; plain numbers."""

import dataclasses
import typing
from typing import Any, Literal

import pytest
import yaml

from common_jax.cli.command_line import parse
from common_jax.cli.ranges import (
    AboveZeroToOne,
    BelowOne,
    HalfAtMost,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    TwoOrMore,
    UnitInterval,
    check_ranges,
)
from common_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Inner:
    count: PositiveInt = 3
    rate: PositiveFloat = 1.0
    widths: tuple[PositiveInt, ...] = (1,)
    decay: BelowOne = 0.5


@dataclasses.dataclass
class Options:
    inner: Inner = dataclasses.field(default_factory=Inner)
    begin: NonNegativeInt = 0
    clip: NonNegativeFloat = 1.0
    share: HalfAtMost = 0.1
    final: UnitInterval = 0.0
    most: PositiveInt | None = None
    steps: dict[str, PositiveInt] = dataclasses.field(default_factory=dict)
    seed: Seed = 0
    folds: TwoOrMore = 2
    top: AboveZeroToOne = 1.0
    norm: Literal[1, 2] = 1
    name: str = "x"


BEYOND = [
    ("inner.count", 0, "1 or more"),
    ("inner.count", "1.5", "1 or more"),
    ("inner.rate", 0.0, "above 0"),
    ("inner.rate", float("nan"), "above 0"),
    ("inner.rate", float("inf"), "above 0"),
    ("inner.rate", "fast", "above 0"),
    ("inner.decay", 1.0, "0 or more and below 1"),
    ("begin", -1, "0 or more"),
    ("clip", float("inf"), "0 or more"),
    ("share", 0.6, "0 to 0.5"),
    ("final", 1.5, "0 to 1"),
    ("most", 0, "1 or more"),
    ("folds", 1, "2 or more"),
    ("top", 0.0, "above 0 and at most 1"),
    ("top", 1.5, "above 0 and at most 1"),
    ("seed", 2**32, "0 to 4294967295"),
    ("seed", -1, "0 to 4294967295"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), BEYOND)
def test_a_number_beyond_its_range(name, value, wanted):
    with pytest.raises(InputError) as error:
        parse("program command", "", Options, [f"--{name}={value}"])
    line = f"option --{name} must be {wanted}, not {value} (see program command --help)"
    assert str(error.value) == line
    group, _, field = name.rpartition(".")
    changed = dataclasses.replace(Inner() if group else Options(), **{field: value})
    options = Options(inner=changed) if isinstance(changed, Inner) else changed
    with pytest.raises(InputError) as error:
        check_ranges(options)
    assert str(error.value) == f"{name} must be {wanted}, not {value}"


def test_numbers_within_others():
    cases = [
        (Options(Inner(widths=(2, 0))), "inner.widths must be 1 or more, not 0"),
        (Options(steps={"a": 1, "b": 0}), "steps: b must be 1 or more, not 0"),
        (Options(most=0), "most must be 1 or more, not 0"),
        (Options(norm=typing.cast(Any, 3)), "norm must be 1 or 2, not 3"),
    ]
    for options, said in cases:
        with pytest.raises(InputError, match=said):
            check_ranges(options)
    with pytest.raises(InputError, match="--inner.widths must be 1 or more, not 0"):
        parse("program", "", Options, ["--inner.widths=[2, 0]"])


def test_what_is_read_is_plain():
    argv = ["--inner.widths=[2, 3]", "--inner.count=4", "--steps={a: 5}", "--clip=2", "--seed=7"]
    options = parse("program", "", Options, argv)
    assert options == Options(Inner(4, widths=(2, 3)), clip=2.0, steps={"a": 5}, seed=7)
    check_ranges(options)
    stored = dataclasses.asdict(options)
    stored["inner"]["widths"] = list(stored["inner"]["widths"])
    assert yaml.safe_load(yaml.safe_dump(stored)) == stored


@dataclasses.dataclass(frozen=True)
class Choices:
    which: Literal["all"] | list[str] = "all"
    some: list[PositiveInt] | None = None
    size: Literal["auto"] | PositiveInt = "auto"


def test_alternatives():
    for good in (Choices(which=["q", "v"], some=[1], size=3), Choices()):
        check_ranges(good)
    for bad, message in (
        (Choices(which="some"), "which must be all, not 'some'"),  # pyright: ignore[reportArgumentType]
        (Choices(some=[2, 0]), "some must be 1 or more, not 0"),
        (Choices(size=0), "size must be auto, not 0"),
    ):
        with pytest.raises(InputError, match=message):
            check_ranges(bad)
