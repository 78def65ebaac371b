"""Where a base's parameters are, by their Hugging Face names, and the shapes of them."""

from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import param_shapes
from tuco_jax.weights.keys import FAMILIES, Stored

__all__ = ["EMBED", "HEAD", "Place", "Places"]

EMBED, HEAD = "embed/table", "head/kernel"


class Place(NamedTuple):
    """The row of the family's key table that a parameter has, and where in it.

    name: what transformers calls the tensor. at: (layer,), (layer, expert), or () outside layers.
    """

    row: Stored
    name: str
    at: tuple[int, ...]

    @property
    def is_end(self) -> bool:
        """Whether it is the embedding or the head."""
        return self.row.paths[0] in (EMBED, HEAD)


class Places:
    """A base's parameters: by name, and each one's shape.

    rows: of embedding and head; the base's vocabulary, unless an adapter brings another.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.model, self.rows = model, model.vocab_size
        self._family = FAMILIES[model.family]
        self._shapes: dict[str, Any] = flatten_dict(param_shapes(model), sep="/")  # pyright: ignore[reportAttributeAccessIssue]
        self._places = {
            self._family.bare(name): Place(row, name, at)
            for row in self._family.rows
            for name, at in row.names(model)
        }
        self._axes = {path: len(p.at) for p in self._places.values() for path in p.row.paths}

    def find(self, name: str) -> Place | None:
        """The place of a parameter of that Hugging Face name, if the base has it.

        A tied head counts as there: an adapter may give the model one of its own.
        """
        place = self._places.get(self._family.bare(name))
        if place is None or not all(p in self._shapes or p == HEAD for p in place.row.paths):
            return None
        return place

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of what one tensor holds of a parameter, by its path."""
        if path == HEAD:
            return self.model.width, self.rows
        if path == EMBED:
            return self.rows, self.model.width
        return self._shapes[path].shape[self._axes[path] :]
