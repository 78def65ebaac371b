"""Which models a command reads, and how it holds them; imports little, so that --help is quick."""

import dataclasses
import pathlib
import re
from typing import Literal, get_args

from common_jax.cli.options import DeviceOption
from common_jax.errors import InputError

__all__ = [
    "AdapterOptions",
    "AskedPrecision",
    "BaseOptions",
    "PairOptions",
    "PrecisionOption",
    "WeightOptions",
    "check_pair",
    "check_precision",
    "check_source",
    "check_sources",
]

AskedPrecision = Literal["auto", "float32", "bfloat16x3", "bfloat16x2", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightOptions(DeviceOption):
    """How weights are held.

    Args:
        dtype: what weights are held in; sums are float32. int8: each layer's matrices, rounded,
            with a scale for each output; the rest as it is stored, in bfloat16 or float32.
    """

    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseOptions(WeightOptions):
    """A pre-trained model.

    Args:
        base: the pre-trained model: a Hugging Face directory, a hub id, a .gguf file or a store.
    """

    base: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Which of several adapters is meant.

    Args:
        adapter: name of one of the adapters that the tuned folder holds, each in a folder of its
            own; by default the one that lies in the folder itself, or the only one.
    """

    adapter: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionOption:
    """How weights meet activations.

    Args:
        precision: how products take activations: in float32, or in three, two or one bfloat16
            parts; weights that are stored in bfloat16 then stay so. Three are as exact as float32,
            two nearly (TuCo to 1e-5), one is not (1e-3). auto: three where they are quicker.
    """

    precision: AskedPrecision = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairOptions(PrecisionOption, AdapterOptions, BaseOptions):
    """A base and what tuning made of it.

    Args:
        tuned: the tuned model, likewise; or the directory of a PEFT adapter over the base.
    """

    tuned: str


def check_source(source: str) -> None:
    """Raise InputError for what names no model here or on the hub; looks at the name alone.

    What reads models says the same, after seconds of imports.
    """
    path = pathlib.Path(source).expanduser()
    if path.exists():
        return
    if path.suffix == ".gguf":
        raise InputError(f"{source}: no such file; name a .gguf file that is there")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        raise InputError(f"{source}: no such directory, nor is it a hub id (owner/name)")


def check_sources(*sources: str | None) -> None:
    """`check_source` of each that is given."""
    for source in sources:
        if source is not None:
            check_source(source)


def check_precision(dtype: str, precision: AskedPrecision) -> None:
    """Raise InputError for a precision that there is not, or none of weights of that dtype."""
    if precision not in get_args(AskedPrecision):
        raise InputError(
            f"precision {precision!r} is not one of {', '.join(get_args(AskedPrecision))}"
        )
    if dtype == "float16" and precision not in ("auto", "float32"):
        raise InputError(
            f"--precision {precision} multiplies bfloat16, not weights of --dtype float16: give "
            "--dtype bfloat16, or --precision float32"
        )


def check_pair(options: PairOptions) -> None:
    """`check_source` of both models, and `check_precision`."""
    check_precision(options.dtype, options.precision)
    check_sources(options.base, options.tuned)
