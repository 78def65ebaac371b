"""Models and guides, each with the space that it lives in.

A space says what a row of data is, and what belongs to it besides its numbers: the layout of a
trajectory and its normaliser, the size and value range of an image.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, Self, TypeVar

from jaxtyping import Array, PyTree, Shaped

from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.diffusion.process import Pinned
from reward_jax.diffusion.schedule import Schedule
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.relative import RelativeReward

__all__ = ["Space", "SpaceGuide", "SpaceModel"]


class Space(Protocol):
    """What a model lives in; a frozen dataclass."""

    @property
    def about(self) -> dict[str, Any]:
        """Where the data came from (task, goal, ...), plain JSON."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row of data, x_0[i]."""
        ...

    @property
    def pin(self) -> Callable[[Any], Pinned] | None:
        """x_0 -> the entries of it that are always given; None where there are none."""
        ...

    def describe(self) -> dict[str, Any]:
        """All of it as plain JSON, from which `make` makes it again."""
        ...

    @classmethod
    def make(cls, described: Mapping[str, Any]) -> Self:
        """The space of a description.

        Raises ValueError, KeyError or TypeError for a mapping that does not describe one.
        """
        ...


S = TypeVar("S", bound=Space)


@dataclasses.dataclass(frozen=True)
class SpaceModel(Generic[S]):
    """A denoiser and the space of its samples.

    null: of a conditional denoiser that was trained to do without, too, the condition that stands
    for none; `ClassifierFree(model.denoiser, model.null, scale)` guides by it. Else None.
    """

    denoiser: Denoiser
    space: S
    null: PyTree[Shaped[Array, "..."]] | None = None


@dataclasses.dataclass(frozen=True)
class SpaceGuide(Generic[S]):
    """A relative reward, or a discriminator, and the space of what it judges."""

    guide: RelativeReward | DiscriminatorGuide
    space: S
    schedule: Schedule
