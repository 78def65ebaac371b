"""A checkpoint's tensors under the names that transformers writes, whatever wrapped the model.

Wrappers for training put their own parts into names: torch.compile `_orig_mod`, data-parallel
`module`, FSDP and checkpointing theirs, and a Lightning module the name of the attribute that
holds the model. None of them belongs to the model, so they are taken off.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

from common_jax.errors import InputError
from common_jax.io.wrapped_names import unwrapped
from tuco_jax.models.config import ModelConfig
from tuco_jax.weights.assemble import TensorSource
from tuco_jax.weights.keys import Family

__all__ = ["Renamed"]

_BLOCK = 512  # rows of an embedding and its head, compared at a time


class Renamed:
    """A `TensorSource` that gives another's tensors under a family's own names.

    Names that the family does not know stay as they are stored; what it ignores is left out. A
    tied model may hold its embedding under either of its two names, or twice, if both are equal.
    Raises InputError where two names are of one tensor.
    """

    def __init__(self, source: TensorSource, config: ModelConfig, family: Family) -> None:
        self.name, self._source, self._family = source.name, source, family
        self._stored: dict[str, str] = {}  # the family's name -> the stored one
        spelling = {
            family.bare(name): name for row in family.rows for name, _ in row.names(config)
        }
        plain = {stored: unwrapped(stored) for stored in source.shapes()}
        holder = self._holder(plain.values())
        for stored, name in plain.items():
            name = name.removeprefix(holder)
            if any(re.fullmatch(pattern, name) for pattern in family.ignore):
                continue
            name = spelling.get(family.bare(name), stored)
            if name in self._stored:
                twin = self._stored[name]
                raise InputError(
                    f"{source.file(stored)}: tensor {stored} is doubled: "
                    f"{pathlib.PurePath(source.file(twin)).name} holds it as {twin}; remove one"
                )
            self._stored[name] = stored
        if config.tied_head:
            self._tie()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = self._source.shapes()
        return {name: shapes[stored] for name, stored in self._stored.items()}

    def file(self, tensor: str) -> str:
        return self._source.file(self._stored[tensor])

    def stored(self, tensor: str) -> str:
        return self._source.stored(self._stored[tensor])

    def read(
        self, tensor: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Float[np.ndarray, "..."]:
        return self._source.read(self._stored[tensor], rows, columns)

    def _tensor(self, path: str) -> str:
        """The family's name of the tensor that holds one parameter alone."""
        return next(row.tensor for row in self._family.rows if row.paths == (path,))

    def _holder(self, names: Iterable[str]) -> str:
        """What stands before every name of the model, such as "model." of a Lightning module.

        Found by the embedding or, where a tied model has none, by the final norm.
        """
        names = list(names)
        for path in ("embed/table", "final_norm/scale"):
            wanted = self._family.bare(self._tensor(path))
            found: dict[str, str] = {}
            for name in names:
                parts = name.split(".")
                for count in range(len(parts)):
                    if self._family.bare(".".join(parts[count:])) == wanted:
                        found.setdefault("".join(f"{part}." for part in parts[:count]), name)
                        break
            if "" in found:
                return ""
            if len(found) > 1:
                raise InputError(
                    f"{self.name}: holds several models: {' and '.join(list(found.values())[:2])}"
                    "; keep the tensors of one"
                )
            if found:
                return next(iter(found))
        return ""

    def _tie(self) -> None:
        """One tensor for embedding and head, as the config says."""
        embedding, head = self._tensor("embed/table"), self._tensor("head/kernel")
        if head not in self._stored:
            return
        if embedding not in self._stored:
            self._stored[embedding] = self._stored.pop(head)
            return
        shape = self.shapes()[head]
        equal = shape == self.shapes()[embedding]
        for start in range(0, shape[0] if equal else 0, _BLOCK):
            rows = slice(start, start + _BLOCK)
            equal = equal and np.array_equal(self.read(head, rows), self.read(embedding, rows))
        if not equal:
            raise InputError(
                f"{self.file(head)}: tensor {self._stored[head]} differs from "
                f"{self._stored[embedding]}, but the config ties them; set tie_word_embeddings to "
                "false in config.json, or remove the tensor"
            )
        del self._stored[head]
