"""What the spaces of pixels and of latents have in common: a size, and where they came from.

Legend: H, W, C height, width and channels.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

__all__ = ["GridSpace"]


@dataclasses.dataclass(frozen=True)
class GridSpace:
    """Arrays of one size (a `data.model.Space`). about: where they came from, plain JSON."""

    height: int
    width: int
    channels: int
    about: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.height, self.width, self.channels

    @property
    def pin(self) -> None:
        """Nothing is given."""
        return None

    def describe(self) -> dict[str, Any]:
        """As plain JSON, for files."""
        return dataclasses.asdict(self)

    @classmethod
    def make(cls, described: Mapping[str, Any]) -> Self:
        """The space of a description; raises ValueError, KeyError or TypeError for none."""
        for name in ("height", "width", "channels"):
            if type(value := described[name]) is not int or value < 1:
                raise ValueError(f"its {name} is {value!r}, not 1 or more")
        if not isinstance(described["about"], dict):
            raise ValueError("its about is no mapping")
        return cls(**described)
