"""An adapter over a base: low-rank factors, and tuned weights.

LoRA (and AdaLoRA, with E on its diagonal) stores A [r, in] and B [out, r] of each adapted module
under its Hugging Face name; the module then computes W x + s B A x. Here such a module is a pair
"a" [L, in, r], "b" [L, r, out], with s folded into b, ranks padded to the largest of that module's
layers, zeros for untouched layers; of the experts of a mixture "a" [L, E, in, r] and "b"
[L, E, r, out]. A module that Hugging Face fuses (q, k and v of Phi-3, GPT-2,
GPT-NeoX) shares its A between our parts, and B's rows go to the parts that they feed.

Whatever is no low-rank sum (`peft/merge.py`), and what the adapter replaces (`modules_to_save`,
trained biases, rows of the embedding, a resized vocabulary), becomes a tuned weight of the pair
(`peft/tuned.py`), which then holds that parameter twice, as a full fine-tune holds all of them.

Which modules are adapted follows from the tensors in the file; `target_modules`,
`layers_to_transform` and the like only mattered when it was trained.

Legend: L layers, E experts, r rank.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from common_jax.errors import InputError
from common_jax.mesh import put as on_shards
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.weights import int8
from tuco_jax.weights.arrays import Bounds, Fill, assemble, assemble_int8
from tuco_jax.weights.assemble import Placement, TensorSource
from tuco_jax.weights.peft import merge
from tuco_jax.weights.peft.config import AdapterConfig
from tuco_jax.weights.peft.layout import CONFIG, fed_rows, is_conv1d
from tuco_jax.weights.peft.places import EMBED, HEAD, Place, Places
from tuco_jax.weights.peft.tensors import sort
from tuco_jax.weights.peft.tuned import Edit, Tuned

__all__ = ["Adapter", "Found"]

_LINEAR, _TABLE = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_TOKENS = "trainable_tokens_delta"
_MAGNITUDE, _BIAS = "lora_magnitude_vector", "lora_B.bias"


class Found(NamedTuple):
    """An adapter that is yet to be put over a base.

    name: for messages. folder: where it lies, with what else is there; None in memory.
    """

    config: AdapterConfig
    tensors: TensorSource
    name: str
    folder: pathlib.Path | None


class Adapter:
    """An adapter over a base.

    Raises InputError, naming file and tensor or field, if it does not fit the base. Its tensors
    are read when asked for.
    """

    def __init__(self, found: Found, model: ModelConfig) -> None:
        self._config, self._tensors, self._model = found.config, found.tensors, model
        self._stored = found.tensors.shapes()
        self._places = Places(model)
        self._tuned = Tuned(self._tensors, self._places, keeps_ties=found.config.keeps_ties)
        self._parts, whole = sort(self._stored)
        for name, tensor in whole.items():
            saved = self._config.saves(name.rpartition(".")[0])
            self._tuned.add_whole(self._place(name, tensor), tensor, saved=saved)
        self._factored: dict[
            str, dict[tuple[int, ...], str]
        ] = {}  # low rank: path -> at -> module
        places = {
            module: self._place(f"{module}.weight", next(iter(parts.values())))
            for module, parts in self._parts.items()
        }
        follows = model.tied_head and found.config.keeps_ties
        follows &= EMBED in {place.row.paths[0] for place in places.values()}
        for module, place in places.items():
            if not (follows and place.row.paths[0] == HEAD):  # which PEFT wrote a second time
                self._add(module, self._parts[module], place)

    def load(
        self,
        base: Params,
        *,
        dtype: str = "float32",
        placement: Placement | None = None,
        layers: bool = True,
    ) -> tuple[Params, Params]:
        """(lora, tuned) of a `Pair`, from the base's parameters.

        lora: low-rank factors in place of {"kernel", "bias"}. tuned: parameters that the adapter
        replaces whole. A head that is tied in the base, and no longer equal to the embedding, is
        among them; both may have another number of rows than the base's. layers: else only what
        stands outside them.
        """
        kind = jax.numpy.dtype(dtype)
        held: dict[str, Any] = flatten_dict(base, sep="/")  # pyright: ignore[reportAssignmentType]

        def put(prefix: str, path: str, value: np.ndarray) -> jax.Array:
            where = placement(f"{prefix}/{path}", value.shape) if placement else None
            return jax.device_put(value) if where is None else on_shards(value, where)

        lora, tuned = {}, {}
        for path, modules in self._factored.items():
            if path.startswith("layers/"):
                lora |= self._stacked_factors(path, kind, placement) if layers else {}
                continue
            for letter, value in zip("ab", self._module_factors(modules[()], path), strict=True):
                name = f"{path}/{letter}"
                lora[name] = put("lora", name, self._cast(value, kind, path))
        for path, value in self._tuned.outside(held, kind).items():
            tuned[path] = put("tuned", path, value)
        for paths in self._tuned.stacked if layers else ():
            for path in paths:
                tuned |= self._stacked(path, paths, held, kind, placement)
        return unflatten_dict(lora, sep="/"), unflatten_dict(tuned, sep="/")

    def _stacked_factors(
        self, path: str, kind: Any, placement: Placement | None
    ) -> dict[str, jax.Array]:
        """A parameter's factors a [L, .., in, r] and b [L, .., r, out], a layer at a time."""
        out = {}
        for which, letter in enumerate("ab"):

            def factor(layer: int, which: int = which) -> np.ndarray:
                return self._cast(self._layer_factors(path, layer)[which], kind, path)

            name, shape = f"{path}/{letter}", (self._model.depth, *factor(0).shape)
            where = placement(f"lora/{name}", shape) if placement else None
            out[name] = assemble(shape, kind, where, _filled(factor), layered=True)
        return out

    def _stacked(
        self,
        path: str,
        together: tuple[str, ...],
        base: Mapping[str, Any],
        kind: Any,
        placement: Placement | None,
    ) -> dict[str, jax.Array]:
        """A stacked parameter that is replaced, a layer at a time; of int8 with its scales.

        together: paths of all that one tensor holds. Several processes read the base's layers,
        which each needs whole, in step.
        """

        def changed(layer: int) -> np.ndarray:
            read = functools.partial(int8.numbers, base, layer=layer)
            return self._tuned.at(together, layer, read, kind)[path]

        def where(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
            return placement(f"tuned/{path}", shape) if placement else None

        shape = base[path].shape
        if base[path].dtype == np.int8:  # which asks for some outputs of a layer after others
            once = functools.lru_cache(maxsize=1)(changed)
            return assemble_int8(path, shape, where, _filled(once))
        return {path: assemble(shape, kind, where(path, shape), _filled(changed), layered=True)}

    def layer(self, base: Params, index: int, *, dtype: str = "float32") -> tuple[Params, Params]:
        """One layer of what `load` returns, arrays of the host; base: that layer of the base."""
        kind = jax.numpy.dtype(dtype)
        held: dict[str, Any] = flatten_dict(base, sep="/")  # pyright: ignore[reportAssignmentType]
        lora = {}
        for path in self._factored:
            if path.startswith("layers/"):
                for name, value in zip("ab", self._layer_factors(path, index), strict=True):
                    lora[f"{path.removeprefix('layers/')}/{name}"] = self._cast(value, kind, path)
        tuned = _held_as(held, self._tuned.layer(held, index, kind))
        return unflatten_dict(lora, sep="/"), unflatten_dict(tuned, sep="/")

    def _cast(self, value: np.ndarray, kind: Any, path: str) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = value.astype(kind)
        if not np.isfinite(cast).all():
            raise self._error(f"its factors of {path} are, scaled, too large for {kind}")
        return cast

    def _error(self, message: str) -> InputError:
        return InputError(f"{self._tensors.name}: {message}")

    def _place(self, name: str, tensor: str) -> Place:
        """Where the parameter of that Hugging Face name belongs."""
        place = self._places.find(name)
        if place is None:
            raise self._error(
                f"tensor {tensor} is unknown to family {self._model.family!r} with "
                f"{self._model.depth} layers; is this the right base?"
            )
        return place

    def _part(self, module: str, part: str) -> np.ndarray:
        return self._tuned.read(self._parts[module][part])

    # What a module's parts are

    def _add(self, module: str, parts: Mapping[str, str], place: Place) -> None:
        """Take a module's parts: factors to keep, or an edit of its weight and bias."""
        first = next(iter(parts.values()))
        kind = place.row.paths[0].rpartition("/")[2]
        kinds = set(parts) - {"lora_E", _MAGNITUDE, _BIAS}
        if not _fits(kinds, kind, place):
            raise self._error(f"tensor {first} does not fit the kind of its module")
        if kinds & {*_LINEAR, *_TABLE}:
            if kinds not in ({*_LINEAR}, {*_TABLE}):
                raise self._error(f"{module} has only one of its two factors")
            self._add_low_rank(module, parts, place)
        elif kinds == {*_LOHA}:
            self._edit(place, functools.partial(self._loha, module))
        elif any(part.startswith("lokr_") for part in kinds):
            self._edit(place, functools.partial(self._lokr, module))
        elif kinds == {"ia3_l"}:
            self._add_ia3(module, parts["ia3_l"], place)
        elif kinds == {_TOKENS}:
            self._config.token_rows(module)  # an InputError where it does not say which
            edit = functools.partial(self._replace_rows, module)
            self._tuned.add_edit(place, edit, both_ends=True)
        else:
            raise self._error(f"{module} has {', '.join(parts)}, which make no whole adapter")

    def _add_low_rank(self, module: str, parts: Mapping[str, str], place: Place) -> None:
        self._check_factors(module, place)
        if _MAGNITUDE in parts or "lora_embedding_A" in parts:
            self._edit(place, functools.partial(self._low_rank, module))
        elif self._stored[parts["lora_A"]][0]:  # AdaLoRA prunes some modules to nothing
            for path in place.row.paths:
                self._factored.setdefault(path.removesuffix("/kernel"), {})[place.at] = module
        if _BIAS in parts:
            rank = self._stored[parts["lora_A"]][0]

            def add(old: np.ndarray) -> np.ndarray:
                return old + self._config.scale(module, rank) * self._part(module, _BIAS)

            self._tuned.add_edit(self._place(f"{module}.bias", parts[_BIAS]), add)

    def _add_ia3(self, module: str, tensor: str, place: Place) -> None:
        self._edit(place, lambda old: merge.scaled(old, self._part(module, "ia3_l")))
        bias = self._places.find(f"{module}.bias")
        if bias is not None and self._stored[tensor][:1] != (1,):  # else it scales what comes in
            self._tuned.add_edit(bias, lambda old: old * self._part(module, "ia3_l").reshape(-1))

    def _edit(self, place: Place, change: Edit) -> None:
        """Add a change of a weight [out, in], whichever way round Hugging Face stores it."""
        row, turned = place.row, place.row.paths[0].endswith("/table")
        if not turned and row.paths[0] != HEAD:
            sizes = [self._places.shape(path) for path in row.paths]
            turned = is_conv1d(row, self._model, sizes[0][0], sum(size[1] for size in sizes))
        edit = (lambda old: change(old.T).T) if turned else change
        self._tuned.add_edit(place, edit)

    # Low rank

    def _check_factors(self, module: str, place: Place) -> None:
        """The shapes of a module's two factors against the base's weight."""
        parts = self._parts[module]
        a, b = (self._stored[parts[name]] for name in (_LINEAR if "lora_A" in parts else _TABLE))
        sizes = [self._places.shape(path) for path in place.row.paths]
        inputs, outputs = sizes[0][0], sum(size[1] for size in sizes)
        if (len(a), len(b)) != (2, 2) or (a[1], b[0]) != (inputs, outputs):
            raise self._error(
                f"{module} has factors A {list(a)} and B {list(b)}, but the base has {inputs} "
                f"inputs and {outputs} outputs there; is this the right base?"
            )
        rank = self._config.rank(module)
        if (a[0], b[1]) != ((rank, rank) if rank is not None else (a[0], a[0])):
            raise self._error(
                f"{module} has factors A {list(a)} and B {list(b)}, but {CONFIG} gives it rank "
                f"{a[0] if rank is None else rank}: are the files of one adapter?"
            )

    def _layer_factors(self, path: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """One layer's factors in float32, a [.., in, r] and b [.., r, out].

        r is the largest of any layer.
        """
        modules = self._factored[path]
        rank = max(self._stored[self._parts[m]["lora_A"]][0] for m in modules.values())
        inputs, outputs = self._places.shape(f"{path}/kernel")
        experts = (self._model.experts,) * (len(next(iter(modules))) - 1)
        a = np.zeros((*experts, inputs, rank), np.float32)
        b = np.zeros((*experts, rank, outputs), np.float32)
        for at, module in modules.items():
            if at[0] == layer:
                own_a, own_b = self._module_factors(module, path)
                a[at[1:]][:, : len(own_b)] = own_a
                b[at[1:]][: len(own_b)] = own_b
        return a, b

    def _module_factors(self, module: str, path: str) -> tuple[np.ndarray, np.ndarray]:
        """A module's factors, of a fused one those that feed the parameter at `path`."""
        a, b = self._scaled_factors(module)
        row = self._place(f"{module}.weight", self._parts[module]["lora_A"]).row
        rows = fed_rows(row, self._model, a.shape[1], b.shape[0])
        return a.T, b.T[:, rows[row.paths.index(f"{path}/kernel")]]

    def _scaled_factors(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A [r, in] and B [out, r] of a module; the scale, and AdaLoRA's E, are in B."""
        parts = self._parts[module]
        a, b = (self._part(module, name) for name in (_LINEAR if "lora_A" in parts else _TABLE))
        if "lora_E" in parts:
            b = b * self._part(module, "lora_E").reshape(1, -1)
        with np.errstate(over="ignore", invalid="ignore"):  # seen where it is used
            return a, b * self._config.scale(module, len(a))

    # Weights [out, in] that are no low-rank sum

    def _low_rank(self, module: str, old: np.ndarray) -> np.ndarray:
        """LoRA of an embedding, and DoRA of any module."""
        a, b = self._scaled_factors(module)
        if _MAGNITUDE not in self._parts[module]:
            return old + b @ a
        return merge.dora(old, b @ a, self._part(module, _MAGNITUDE).reshape(-1))

    def _loha(self, module: str, old: np.ndarray) -> np.ndarray:
        factors = [self._part(module, part) for part in _LOHA]
        return old + self._config.scale(module, len(factors[1])) * merge.loha(*factors)

    def _lokr(self, module: str, old: np.ndarray) -> np.ndarray:
        parts = self._parts[module]

        def matrix(name: str) -> np.ndarray:
            if name in parts:
                return self._part(module, name)
            return self._part(module, f"{name}_a") @ self._part(module, f"{name}_b")

        w1, w2 = matrix("lokr_w1"), matrix("lokr_w2")
        if [m * n for m, n in zip(w1.shape, w2.shape, strict=True)] != list(old.shape):
            raise ValueError("Kronecker factors of another weight")
        return old + self._config.scale(module, 1) * merge.lokr(w1, w2)

    def _replace_rows(self, module: str, old: np.ndarray) -> np.ndarray:
        """An embedding with rows that were trained in place of its own."""
        rows, values = self._config.token_rows(module), self._part(module, _TOKENS)
        if max(rows, default=0) >= len(old) or values.shape != (len(rows), old.shape[1]):
            raise ValueError("rows of another embedding")
        new = old.copy()
        new[rows] = values
        return new


def _filled(at: Callable[[int], np.ndarray]) -> Fill:
    """What fills parts of a stacked parameter, whose layers `at` gives."""

    def fill(layer: int, parts: list[tuple[Bounds, np.ndarray]]) -> None:
        whole = at(layer)
        for bounds, part in parts:
            part[...] = whole[tuple(slice(*ends) for ends in bounds)]

    return fill


def _held_as(base: Mapping[str, Any], flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What replaces parameters of the base, by path, rounded to int8 where these are int8."""
    out = {}
    for path, value in flat.items():
        if path in base and base[path].dtype == np.int8:
            out[path], out[int8.scale_of(path)] = int8.rounded(value)
        else:
            out[path] = value
    return out


def _fits(parts: set[str], kind: str, place: Place) -> bool:
    """Whether parts can be of a parameter: a "kernel", a "table", or neither."""
    if parts == {_TOKENS}:
        return place.is_end
    return kind == ("table" if parts & {*_TABLE} else "kernel")
