"""Parameters that an adapter replaces: whole, or edited from the base's.

Legend: L layers, V vocabulary, D residual width.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from common_jax.errors import InputError
from common_jax.mesh import fetch
from tuco_jax.weights import int8
from tuco_jax.weights.assemble import TensorSource
from tuco_jax.weights.peft.places import EMBED, HEAD, Place, Places

__all__ = ["Edit", "Tuned"]

# The path of a stacked parameter -> numbers of one of its layers.
Read = Callable[[str], Float[np.ndarray, "..."]]
# Of a weight as Hugging Face stores it, float32, which it leaves as it is.
Edit = Callable[[np.ndarray], np.ndarray]


class Tuned:
    """What replaces parameters of the base: tensors, edits of what was there, or both.

    saved: paths of ends that have copies of their own and are never tied. keeps_ties: a tied head
    follows the embedding whatever is done to that. Raises InputError, naming file and tensor, for
    what does not fit the base or is not finite.
    """

    def __init__(self, tensors: TensorSource, places: Places, *, keeps_ties: bool) -> None:
        self._tensors, self._places, self._keeps_ties = tensors, places, keeps_ties
        self._whole: dict[Place, str] = {}
        self._edits: dict[Place, list[Edit]] = {}
        self._saved: set[str] = set()
        self._breaks_ties = False

    def add_whole(self, place: Place, tensor: str, *, saved: bool) -> None:
        """A tensor that replaces a parameter; an end brings its number of rows along."""
        self._whole[place] = tensor
        shape = self._tensors.shapes()[tensor]
        if place.is_end and len(shape) == 2:
            self._places.rows = shape[0]
        if saved and place.is_end and not self._keeps_ties:
            self._saved.add(place.row.paths[0])

    def add_edit(self, place: Place, edit: Edit, *, both_ends: bool = False) -> None:
        """A change of a weight. both_ends: of an end, that a tied one shares."""
        self._edits.setdefault(place, []).append(edit)
        self._breaks_ties |= place.is_end and not both_ends and not self._keeps_ties

    @functools.cached_property
    def _places_changed(self) -> list[Place]:
        return list(dict.fromkeys([*self._whole, *self._edits]))

    @functools.cached_property
    def _layered(self) -> dict[tuple[str, ...], list[Place]]:
        """Places in layers that are changed, by the paths that one tensor holds there."""
        out: dict[tuple[str, ...], list[Place]] = {}
        for place in self._places_changed:
            if place.at:
                out.setdefault(place.row.paths, []).append(place)
        return out

    @property
    def stacked(self) -> list[tuple[str, ...]]:
        """Paths of the base's stacked parameters that are replaced, in whichever layers.

        Those that one tensor holds stand together.
        """
        return sorted(self._layered)

    def at(
        self, paths: tuple[str, ...], layer: int, read: Read, dtype: Any
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """One layer of what replaces parameters of `stacked`, by path.

        read: that layer of the base's parameters, which stay where nothing replaces them.
        """
        old = {path: read(path) for path in paths}
        out = dict(old)
        for place in self._layered[paths]:
            inside = place.at[1:]  # an expert's
            if place.at[0] != layer:
                continue
            if inside and out[paths[0]] is old[paths[0]]:
                out = {path: np.array(value, dtype) for path, value in old.items()}
            held = {path: value[inside] for path, value in old.items()}
            for path, part in self._parts(place, held):
                if inside:
                    out[path][inside] = part
                else:
                    out[path] = part
        return {path: np.asarray(value, dtype, order="C") for path, value in out.items()}

    def layer(
        self, base: Mapping[str, Any], index: int, dtype: Any
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """One layer of all stacked parameters that are replaced, by their paths in it.

        base: that layer of the base.
        """

        def read(path: str) -> np.ndarray:
            return int8.numbers(base, path.removeprefix("layers/"))

        return {
            path.removeprefix("layers/"): value
            for paths in self.stacked
            for path, value in self.at(paths, index, read, dtype).items()
        }

    def outside(self, base: Mapping[str, Any], dtype: Any) -> dict[str, Float[np.ndarray, "..."]]:
        """Replaced parameters outside the layers, by path.

        base: the base's parameters by path, of type dtype. Embedding and head may have another
        number of rows than the base's; a tied head is there once it differs from the embedding.
        """
        out: dict[str, np.ndarray] = {}
        for place in self._places_changed:
            if not place.is_end and not place.at:
                old = {path: np.asarray(fetch(base[path]), dtype) for path in place.row.paths}
                out |= {path: part.astype(dtype) for path, part in self._parts(place, old)}
        return out | self._ends(base, dtype)

    def _error(self, message: str) -> InputError:
        return InputError(f"{self._tensors.name}: {message}")

    def read(self, tensor: str) -> Float[np.ndarray, "..."]:
        """A tensor in float32."""
        value = self._tensors.read(tensor).astype(np.float32)
        if not np.isfinite(value).all():
            raise self._error(f"tensor {tensor} holds NaN or infinity")
        return value

    def _edited(self, place: Place, old: np.ndarray) -> np.ndarray:
        """A weight as Hugging Face stores it, after all edits."""
        value = old
        for edit in self._edits.get(place, ()):
            value = value.astype(np.float32, copy=False)
            try:
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # seen below
                    new = edit(value)
            except (ValueError, IndexError, KeyError):
                new = None
            if new is None or new.shape != value.shape:
                raise self._error(
                    f"what it holds for {place.name} does not fit the base, which has "
                    f"{list(old.shape)} there; is this the right base?"
                )
            if not np.isfinite(new).all():
                raise self._error(f"put into {place.name}, it gives NaN or infinity")
            value = new
        return value

    def _parts(
        self, place: Place, old: Mapping[str, np.ndarray]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The new values of a tensor's parameters, from their old ones."""
        row, tensor = place.row, self._whole.get(place)
        if tensor is None:
            value = row.layout.join([old[path] for path in row.paths], self._places.model)
        else:
            value = self.read(tensor)
        try:
            parts = row.layout.split(self._edited(place, value), self._places.model)
        except ValueError:
            raise self._misshaped(place, value) from None
        for path, part in zip(row.paths, parts, strict=True):
            if part.shape != self._places.shape(path):
                raise self._misshaped(place, value)
            yield path, part

    def _misshaped(self, place: Place, value: np.ndarray) -> InputError:
        shapes = ", ".join(f"{p} {list(self._places.shape(p))}" for p in place.row.paths)
        return self._error(
            f"tensor {self._whole.get(place, place.name)} has shape {list(value.shape)}, which "
            f"does not give {shapes} of the base; is this the right base?"
        )

    def _ends(self, base: Mapping[str, Any], dtype: Any) -> dict[str, Float[np.ndarray, "..."]]:
        """Embedding and head: replaced, resized or edited; tied until they differ.

        PEFT also stores embeddings that it has not trained; where they equal the base's, nothing
        is kept. Otherwise they stand for the base's own table, and so for a tied head, too.
        """
        places = {place.row.paths[0]: place for place in self._places_changed if place.is_end}
        if not places:
            return {}
        stored = {
            path: self._stored_end(place, self._whole[place])
            for path, place in places.items()
            if place in self._whole
        }
        tied = self._places.model.tied_head
        old = np.asarray(fetch(base[EMBED]))
        old_head = old if tied else np.asarray(fetch(base[HEAD])).T
        own = stored
        if tied:
            unsaved = (value for path, value in stored.items() if path not in self._saved)
            old_head = shared = next(unsaved, old)
            own = {EMBED: shared} | {path: stored[path] for path in self._saved & stored.keys()}
        table, head = own.get(EMBED, old), own.get(HEAD, old_head)
        if tied and not self._saved and not self._breaks_ties:
            for place in places.values():
                table = self._edited(place, table)
            table = table.astype(dtype)
            return {} if np.array_equal(table, old) else {EMBED: table}
        if EMBED in places:
            table = self._edited(places[EMBED], table)
        if HEAD in places:
            head = self._edited(places[HEAD], head)
        if len(table) != len(head):
            raise self._error(
                f"makes an embedding of {len(table)} rows and a head of {len(head)}: one of the "
                "two is not in the file; save the adapter with save_embedding_layers=True"
            )
        table, head = table.astype(dtype), head.astype(dtype)
        out = {}
        if not np.array_equal(table, old):
            out[EMBED] = table
        if tied or not np.array_equal(head, old_head):
            out[HEAD] = np.ascontiguousarray(head.T)
        return out

    def _stored_end(self, place: Place, tensor: str) -> np.ndarray:
        """The embedding or head [V, D] that comes with the adapter."""
        value = self.read(tensor)
        if value.ndim != 2 or value.shape[1] != self._places.model.width:
            raise self._misshaped(place, value)
        return value
