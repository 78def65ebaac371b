"""The space of a latent diffusion model's latents, scaled as the model has them.

Legend: h, w, C height, width and channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from reward_jax.data.model import SpaceGuide

__all__ = ["LatentGuide", "LatentSpace"]


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """Latents of one size (a `data.model.Space`). about: where they came from, plain JSON."""

    height: int
    width: int
    channels: int
    about: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        return self.height, self.width, self.channels

    @property
    def pin(self) -> None:
        """Nothing is pinned."""
        return None

    def describe(self) -> dict[str, Any]:
        """As plain JSON, for files."""
        return dataclasses.asdict(self)

    @classmethod
    def make(cls, described: Mapping[str, Any]) -> "LatentSpace":
        """The space of a description; raises ValueError, KeyError or TypeError for none."""
        sizes = [described[name] for name in ("height", "width", "channels")]
        if any(type(size) is not int or size < 1 for size in sizes):
            raise ValueError(f"its latents' size is {sizes!r}, not three whole numbers above 0")
        if not isinstance(described["about"], dict):
            raise ValueError("its about is no mapping")
        height, width, channels = sizes
        return cls(height, width, channels, described["about"])


LatentGuide = SpaceGuide[LatentSpace]
