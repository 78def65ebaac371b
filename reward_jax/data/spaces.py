"""The spaces that files can hold: a name for each class.

A file stores a space as {"kind": name, ...}, the rest as the space describes itself. To store
models of another world, write a class as `Space` asks, and add its line to `SPACES`.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from common_jax.errors import InputError
from reward_jax.data.images.pixels import ImageSpace
from reward_jax.data.latents import LatentSpace
from reward_jax.data.model import Space
from reward_jax.data.trajectory.space import TrajectorySpace

__all__ = ["SPACES", "describe", "make"]

S = TypeVar("S", bound=Space)

SPACES: Mapping[str, type[Space]] = {
    "trajectories": TrajectorySpace,
    "images": ImageSpace,
    "latents": LatentSpace,
}


def describe(space: Space) -> dict[str, Any]:
    """A space as plain JSON; raises InputError for one that the catalogue does not have."""
    return {"kind": _name(type(space))} | space.describe()


def make(described: Mapping[str, Any], wanted: type[S], source: Any) -> S:
    """The space of a description.

    Raises InputError naming `source`, its file, where it is another space than `wanted`, and
    ValueError, KeyError, TypeError or AttributeError for what describes none.
    """
    name = _name(wanted)
    if (found := described["kind"]) != name:
        raise InputError(f"{source}: is a model of {found}, where one of {name} is wanted")
    return wanted.make({k: v for k, v in described.items() if k != "kind"})


def _name(kind: type[Space]) -> str:
    for name, known in SPACES.items():
        if kind is known:
            return name
    raise InputError(
        f"a model of {kind.__name__} cannot be written to a file, or read, which can hold "
        f"{', '.join(SPACES)}: add a line for it to reward_jax/data/spaces.py"
    )
