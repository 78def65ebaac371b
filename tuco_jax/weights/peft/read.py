"""Reading LoRA adapters in the layout of the `peft` library, as low-rank factors.

PEFT stores A [r, in] and B [out, r] of each adapted module under its Hugging Face name; the module
then computes W x + s B A x, s = alpha / r, or alpha / sqrt(r) with rsLoRA. Here a module is a pair
"a" [L, in, r], "b" [L, r, out], with s folded into b, ranks padded to the largest of that module's
layers, zeros for untouched layers. A module that Hugging Face fuses (q, k and v of Phi-3, GPT-2,
GPT-NeoX) shares its A between our parts, and B's rows go to the parts that they feed.

Which modules are adapted follows from the tensors in the file; `target_modules`,
`layers_to_transform` and the like only mattered when it was trained.

Legend: L layers, r rank, V vocabulary, D residual width.
"""

import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from common_jax.errors import InputError
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, param_shapes
from tuco_jax.weights.assemble import Placement
from tuco_jax.weights.hf.safetensors_files import SafetensorsFile
from tuco_jax.weights.keys import FAMILIES, Stored
from tuco_jax.weights.model import Model
from tuco_jax.weights.peft.layout import CHAT_TEMPLATE, CONFIG, PREFIX, WEIGHTS, fed_rows
from tuco_jax.weights.peft.write import save

__all__ = ["Adapter", "is_adapter", "load", "read_chat_template", "read_config", "save"]

_PICKLE = "adapter_model.bin"
_MERGE = "merge it into its base with peft's merge_and_unload and give the merged model"

# Fields of a LoRA config that change what is computed in ways not offered here.
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a bias on B",
    "layer_replication": "layer replication",
    "target_parameters": "adapters of bare parameters",
    "trainable_token_indices": "trainable tokens",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "ensure_weight_tying": "tied adapters",
}
_REWRITES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # at initialisation


class _Place(NamedTuple):
    """The row of the family's key table that a module's weight has, and its layer."""

    row: Stored
    layer: int


def is_adapter(directory: str | pathlib.Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (pathlib.Path(directory) / CONFIG).is_file()


def read_config(directory: str | pathlib.Path) -> dict[str, Any]:
    """An adapter's configuration; InputError where this package cannot apply such an adapter."""
    path = pathlib.Path(directory) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{path}: adapters of type {kind} are not supported, only LORA; {_MERGE}")
    for field, name in _UNSUPPORTED.items():
        if config.get(field):
            raise InputError(f"{path}: {field}: {name} is not supported; {_MERGE}")
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{path}: bias: {config['bias']!r} (trained biases) is not supported, only 'none'; "
            f"{_MERGE}"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
        raise InputError(
            f"{path}: init_lora_weights: {start!r} changes the base's weights; save the adapter "
            "with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    _check_numbers(config, path)
    return config


def _check_numbers(config: Mapping[str, Any], path: pathlib.Path) -> None:
    """Ranks and alphas are numbers, patterns of them mappings to numbers."""
    found = {field: config[field] for field in ("r", "lora_alpha") if field in config}
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise InputError(f"{path}: {field}: must map names to numbers, not {patterns!r}")
        found |= {f"{field}: {name}": value for name, value in patterns.items()}
    for field, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: {field}: must be a number, not {value!r}")


def read_chat_template(directory: str | pathlib.Path) -> str | None:
    """The chat template beside an adapter; None where there is none."""
    path = pathlib.Path(directory) / CHAT_TEMPLATE
    if not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the chat template cannot be read ({error})") from None


def load(
    directory: str | pathlib.Path,
    base: Model,
    *,
    dtype: str = "float32",
    placement: Placement | None = None,
) -> tuple[Params, Params]:
    """`Adapter.load` over a model."""
    adapter = Adapter(directory, base.config)
    return adapter.load(base.params, dtype=dtype, placement=placement)


class Adapter:
    """The tensors of one adapter over a base, sorted by what they are: module -> tensor.

    Reads its config and header; raises InputError, naming file and tensor or field, if it does not
    fit the base. Its tensors are read when asked for.
    """

    def __init__(self, directory: str | pathlib.Path, model: ModelConfig) -> None:
        directory = pathlib.Path(directory)
        self._config, self._model = read_config(directory), model
        if not (directory / WEIGHTS).is_file():
            if (directory / _PICKLE).is_file():
                raise InputError(
                    f"{directory / _PICKLE}: pickled weights can run code when read, so they are "
                    "refused; where peft is installed, load the adapter and save_pretrained it "
                    "again"
                )
            raise InputError(f"{directory / WEIGHTS}: no such file")
        self._file = SafetensorsFile(directory / WEIGHTS)
        self._shapes: dict[str, Any] = flatten_dict(param_shapes(model), sep="/")  # pyright: ignore[reportAttributeAccessIssue]
        self._places = _places(model)
        self._a: dict[str, str] = {}
        self._b: dict[str, str] = {}
        self._embedding_a: dict[str, str] = {}
        self._embedding_b: dict[str, str] = {}
        self._whole: dict[str, str] = {}  # a parameter's Hugging Face name -> tensor
        for tensor in self._file.tensors:
            self._sort(tensor)
        for found, twin in ((self._a, self._b), (self._embedding_a, self._embedding_b)):
            for module in sorted(set(found) ^ set(twin)):
                raise self._error(f"{module} has only one of its two factors")
        for module in self._a.keys() | self._embedding_a.keys():
            self._check_factors(module)
        self._modules = self._by_parameter()

    def _sort(self, tensor: str) -> None:
        name = tensor.removeprefix(PREFIX)
        kinds = (
            (r"\.lora_A(\.default)?\.weight", self._a),
            (r"\.lora_B(\.default)?\.weight", self._b),
            (r"\.lora_embedding_A(\.default)?", self._embedding_a),
            (r"\.lora_embedding_B(\.default)?", self._embedding_b),
        )
        for pattern, found in kinds:
            if match := re.fullmatch(rf"(.+){pattern}", name):
                module = match[1]
                place = self._place(f"{module}.weight", tensor)
                kind = "/table" if "embedding" in pattern else "/kernel"
                if not place.row.paths[0].endswith(kind):
                    raise self._error(f"tensor {tensor} does not fit the kind of its module")
                found[module] = tensor
                return
        name = name.replace(".base_layer.", ".")
        self._place(name, tensor)
        self._whole[name] = tensor

    def _error(self, message: str) -> InputError:
        return InputError(f"{self._file.path}: {message}")

    def _place(self, name: str, tensor: str) -> _Place:
        """Where the parameter of that Hugging Face name belongs."""
        place = self._places.get(FAMILIES[self._model.family].bare(name))
        if place is None or not all(self._known(path) for path in place.row.paths):
            raise self._error(
                f"tensor {tensor} is unknown to family {self._model.family!r} with "
                f"{self._model.depth} layers; is this the right base?"
            )
        return place

    def _known(self, path: str) -> bool:
        return path in self._shapes or path == "head/kernel"

    def _shape(self, path: str) -> tuple[int, ...]:
        """One layer's shape of a parameter."""
        if path == "head/kernel":
            return self._model.width, self._model.vocab_size
        shape = self._shapes[path].shape
        return shape[1:] if path.startswith("layers/") else shape

    def _read(self, tensor: str) -> np.ndarray:
        value = self._file.read(tensor).astype(np.float32)
        if not np.isfinite(value).all():
            raise self._error(f"tensor {tensor} holds NaN or infinity")
        return value

    def _pattern(self, field: str, module: str, default: str) -> float:
        """A rank or alpha: the first pattern that matches the module's name, as in PEFT."""
        for pattern, value in (self._config.get(field) or {}).items():
            try:
                found = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise self._error(
                    f"{field}: {pattern!r} is no regular expression ({error})"
                ) from None
            if found:
                return value
        return self._config.get(default, 8)

    def _scale(self, module: str, rank: int) -> float:
        alpha = self._pattern("alpha_pattern", module, "lora_alpha")
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _check_factors(self, module: str) -> None:
        """The shapes of a module's two factors against the base's weight."""
        is_linear = module in self._a
        a = (self._a if is_linear else self._embedding_a)[module]
        b = (self._b if is_linear else self._embedding_b)[module]
        (*_, inputs), (outputs, *_) = shapes = [self._file.tensors[t].shape for t in (a, b)]
        sizes = [self._shape(path) for path in self._place(f"{module}.weight", a).row.paths]
        wanted = (sizes[0][0], sum(size[1] for size in sizes))
        if [len(s) for s in shapes] != [2, 2] or (inputs, outputs) != wanted:
            raise self._error(
                f"{module} has factors A {list(shapes[0])} and B {list(shapes[1])}, but the base "
                f"has {wanted[0]} inputs and {wanted[1]} outputs there; is this the right base?"
            )
        rank = self._pattern("rank_pattern", module, "r")
        if (shapes[0][0], shapes[1][1]) != (rank, rank):
            raise self._error(
                f"{module} has factors A {list(shapes[0])} and B {list(shapes[1])}, but {CONFIG} "
                f"gives it rank {rank}: are the files of one adapter?"
            )

    def load(
        self,
        base: Params,
        *,
        dtype: str = "float32",
        placement: Placement | None = None,
        layers: bool = True,
    ) -> tuple[Params, Params]:
        """(lora, overrides), the `lora` and `tuned` of a `Pair`, from the base's parameters.

        lora: low-rank factors in place of {"kernel", "bias"}. overrides: parameters that the
        adapter replaces whole (`modules_to_save`, embeddings that were resized or adapted). A head
        that is tied in the base, and no longer equal to the embedding, is among them; both may
        have another number of rows than the base's. layers: else only what stands outside them.
        """
        kind = jax.numpy.dtype(dtype)
        held: dict[str, Any] = flatten_dict(base, sep="/")  # pyright: ignore[reportAssignmentType]

        def put(prefix: str, path: str, value: np.ndarray) -> jax.Array:
            where = placement(f"{prefix}/{path}", value.shape) if placement else None
            return jax.device_put(value, where)

        lora = {}
        for path in self._modules:
            if layers or not path.startswith("layers/"):
                for name, value in zip("ab", self._factors(path), strict=True):
                    lora[f"{path}/{name}"] = put("lora", f"{path}/{name}", value.astype(kind))
        overrides = {
            path: put("tuned", path, value)
            for path, value in self._overrides(held, kind, layers).items()
        }
        return unflatten_dict(lora, sep="/"), unflatten_dict(overrides, sep="/")

    def layer(self, base: Params, index: int, *, dtype: str = "float32") -> tuple[Params, Params]:
        """One layer of what `load` returns, arrays of the host; base: that layer of the base."""
        kind = jax.numpy.dtype(dtype)
        held: dict[str, Any] = flatten_dict(base, sep="/")  # pyright: ignore[reportAssignmentType]
        lora, overrides = {}, {}
        for path in self._modules:
            if path.startswith("layers/"):
                for name, value in zip("ab", self._layer_factors(path, index), strict=True):
                    lora[f"{path.removeprefix('layers/')}/{name}"] = value.astype(kind)
        for path in self._layered:
            overrides[path] = np.array(held[path], kind)
        for path, value in self._saved(index):
            overrides[path][...] = value
        return unflatten_dict(lora, sep="/"), unflatten_dict(overrides, sep="/")

    def _by_parameter(self) -> dict[str, dict[int, str]]:
        """Which module adapts a parameter, of each layer: path -> layer -> module."""
        modules: dict[str, dict[int, str]] = {}
        for module, tensor in self._a.items():
            row, layer = self._place(f"{module}.weight", tensor)
            for path in row.paths:
                modules.setdefault(path.removesuffix("/kernel"), {})[layer] = module
        return modules

    def _factors(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """A parameter's factors in float32: a [L, in, r], b [L, r, out]; without L outside."""
        if not path.startswith("layers/"):
            return self._module_factors(self._modules[path][0], path)
        a, b = self._layer_factors(path, 0)
        stacked = tuple(np.empty((self._model.depth, *x.shape), x.dtype) for x in (a, b))
        for layer in range(self._model.depth):
            for whole, part in zip(stacked, self._layer_factors(path, layer), strict=True):
                whole[layer] = part
        return stacked[0], stacked[1]

    def _layer_factors(self, path: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """One layer's factors, a [in, r] and b [r, out]; r is the largest of any layer."""
        modules = self._modules[path]
        rank = max(self._file.tensors[self._a[module]].shape[0] for module in modules.values())
        inputs, outputs = self._shape(f"{path}/kernel")
        a = np.zeros((inputs, rank), np.float32)
        b = np.zeros((rank, outputs), np.float32)
        if layer in modules:
            own_a, own_b = self._module_factors(modules[layer], path)
            a[:, : len(own_b)] = own_a
            b[: len(own_b)] = own_b
        return a, b

    def _module_factors(self, module: str, path: str) -> tuple[np.ndarray, np.ndarray]:
        """A module's factors, of a fused one those that feed the parameter at `path`."""
        tensor = self._a[module]
        a, b = self._read(tensor).T, self._read(self._b[module]).T
        b = b * self._scale(module, len(b))
        row, _ = self._place(f"{module}.weight", tensor)
        rows = fed_rows(row, self._model, a.shape[0], b.shape[1])
        return a, b[:, rows[row.paths.index(f"{path}/kernel")]]

    @functools.cached_property
    def _layered(self) -> list[str]:
        """Paths in a layer of the parameters that some layer replaces."""
        places = [self._place(name, tensor) for name, tensor in self._whole.items()]
        paths = {path for row, _ in places for path in row.paths if path.startswith("layers/")}
        return sorted(path.removeprefix("layers/") for path in paths)

    def _saved(self, index: int) -> Iterator[tuple[str, np.ndarray]]:
        """What one layer replaces whole: its paths in the layer, and values."""
        for name, tensor in self._whole.items():
            row, layer = self._place(name, tensor)
            if row.paths[0].startswith("layers/") and layer == index:
                for path, part in self._parts(row, tensor):
                    yield path.removeprefix("layers/"), part

    def _parts(self, row: Stored, tensor: str) -> Iterator[tuple[str, np.ndarray]]:
        """The parameters that a tensor which replaces them whole holds."""
        value = self._read(tensor)
        try:
            parts = row.layout.split(value, self._model)
        except ValueError:
            raise self._misshaped(tensor, value, row) from None
        for path, part in zip(row.paths, parts, strict=True):
            if part.shape != self._shape(path):
                raise self._misshaped(tensor, value, row)
            yield path, part

    def _overrides(
        self, base: Mapping[str, jax.Array], dtype: Any, layers: bool
    ) -> dict[str, np.ndarray]:
        """Parameters that are replaced whole, cast to `dtype`, layers stacked."""
        out: dict[str, np.ndarray] = {}
        whole: dict[str, Any] = {"embed/table": None, "head/kernel": None}
        for name, tensor in self._whole.items():
            row, layer = self._place(name, tensor)
            if row.paths[0] in whole:
                value = self._read(tensor)
                if value.ndim != 2 or value.shape[1] != self._model.width:
                    raise self._misshaped(tensor, value, row)
                whole[row.paths[0]] = value, self._is_saved(name)
                continue
            stacked = row.paths[0].startswith("layers/")
            for path, part in self._parts(row, tensor) if layers or not stacked else ():
                if path not in out:  # layers that were not saved keep the base's values
                    out[path] = np.array(base[path], dtype)
                out[path][layer if stacked else ...] = part
        return out | self._ends(base, dtype, whole)

    def _misshaped(self, tensor: str, value: np.ndarray, row: Stored) -> InputError:
        shapes = ", ".join(f"{path} {list(self._shape(path))}" for path in row.paths)
        return self._error(
            f"tensor {tensor} has shape {list(value.shape)}, which does not give {shapes} of the "
            "base; is this the right base?"
        )

    def _is_saved(self, name: str) -> bool:
        """Whether a parameter stands in `modules_to_save`: a copy of its own, never tied."""
        module = name.rpartition(".")[0]
        return any(module.endswith(saved) for saved in self._config.get("modules_to_save") or ())

    def _ends(
        self, base: Mapping[str, jax.Array], dtype: Any, whole: Any
    ) -> dict[str, np.ndarray]:
        """Embedding and head: replaced, resized, or adapted by factors; tied until they differ.

        PEFT also stores embeddings that it has not trained; where they equal the base's, nothing
        is kept. Otherwise they stand for the base's own table, and so for a tied head, too.
        """
        delta = self._embedding_delta()
        table, is_saved = whole["embed/table"] or (None, False)
        head, head_is_saved = whole["head/kernel"] or (None, False)
        out = {}
        for path in delta.keys() - {"embed/table"}:
            out[path] = (np.asarray(base[path], np.float32) + delta[path]).astype(dtype)
        old = np.asarray(base["embed/table"])
        if table is not None:
            table = table.astype(dtype)
        if head is not None:
            head = head.astype(dtype)
        if not self._model.tied_head:
            if head is not None and not np.array_equal(head.T, base["head/kernel"]):
                out["head/kernel"] = np.ascontiguousarray(head.T)
        elif is_saved or head_is_saved or "embed/table" in delta:
            unsaved = [x for x, s in ((table, is_saved), (head, head_is_saved)) if not s]
            shared = next((x for x in unsaved if x is not None), old)
            table = shared if table is None else table
            head = shared if head is None else head
            out["head/kernel"] = np.ascontiguousarray(head.T)
        elif table is None:
            table = head
        table = old if table is None else table
        if "embed/table" in delta:
            table = (table.astype(np.float32) + delta["embed/table"]).astype(dtype)
        if not np.array_equal(table, old):
            out["embed/table"] = table
        return out

    def _embedding_delta(self) -> dict[str, np.ndarray]:
        """What each adapted embedding gains, s (B A)^T [V, D]."""
        delta = {}
        for module, tensor in self._embedding_a.items():
            a, b = self._read(tensor), self._read(self._embedding_b[module])
            path = self._place(f"{module}.weight", tensor).row.paths[0]
            delta[path] = self._scale(module, len(a)) * (a.T @ b.T)
        return delta


def _places(config: ModelConfig) -> dict[str, _Place]:
    """Every parameter's bare Hugging Face name, and where it belongs."""
    family = FAMILIES[config.family]
    return {
        family.bare(row.tensor.format(l=layer)): _Place(row, layer)
        for row in family.rows
        for layer in (range(config.depth) if row.paths[0].startswith("layers/") else (0,))
    }
