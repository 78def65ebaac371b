"""The networks that files can hold: a name for each module, and which fields are not stored.

A file stores a network as {"network": name, "fields": {field: value}}. A value is a number, a
text, true, false or null, a list of values (a tuple of the module, to any depth), or a network
again: a module or a dataclass of the catalogue. To store another network, add its line to
`CATALOG`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from common_jax.errors import InputError
from reward_jax.models.energy import EnergyDifference
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.models.temporal.mlp import ResidualMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.models.unet2d.unet import UNet2D

__all__ = ["CATALOG", "Entry", "describe", "make"]


class Entry(NamedTuple):
    """module: its class. unstored: fields that belong to the running backend, not to a file."""

    module: Any
    unstored: tuple[str, ...] = ()


CATALOG: Mapping[str, Entry] = {
    "temporal_unet": Entry(TemporalUnet, unstored=("method",)),
    "residual_mlp": Entry(ResidualMLP),
    "half_unet": Entry(HalfUnet, unstored=("method",)),
    "window_mlp": Entry(WindowMLP),
    "unet_2d": Entry(UNet2D),
    "half_unet_2d": Entry(HalfUNet2D),
    "energy_difference": Entry(EnergyDifference),
}

_OF_FLAX = ("parent", "name")  # fields of every module, which do not describe the network


def describe(module: Any) -> dict[str, Any]:
    """A network as plain JSON; raises InputError naming a module or value that is not one."""
    for name, entry in CATALOG.items():
        if type(module) is entry.module:  # a subclass may compute something else
            left_out = (*_OF_FLAX, *entry.unstored)
            fields = {
                f.name: _stored(getattr(module, f.name), f"{type(module).__name__}.{f.name}")
                for f in dataclasses.fields(module)
                if f.name not in left_out
            }
            return {"network": name, "fields": fields}
    raise InputError(
        f"a model of {type(module).__name__} cannot be written to a file, which can hold "
        f"{', '.join(CATALOG)}: add a line for it to reward_jax/models/catalog.py"
    )


def make(described: Mapping[str, Any], source: Any) -> Any:
    """The module of a description; fields that are not stored have their defaults.

    Raises InputError naming `source`, its file, for a network that the catalogue does not have,
    and KeyError or AttributeError for a mapping that is not a description.
    """
    name, stored = described["network"], described["fields"].items()
    try:
        return CATALOG[name].module(**{field: _made(value, source) for field, value in stored})
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{source}: its network is none of this version's ({error}); train it again"
        ) from None


def _stored(value: Any, field: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_stored(part, field) for part in value]
    if dataclasses.is_dataclass(value):
        return describe(value)
    raise InputError(
        f"{field} is a {type(value).__name__}, which cannot be written to a file: numbers, texts, "
        "tuples and networks of the catalogue can"
    )


def _made(value: Any, source: Any) -> Any:
    if isinstance(value, list):
        return tuple(_made(part, source) for part in value)
    return make(value, source) if isinstance(value, dict) else value
