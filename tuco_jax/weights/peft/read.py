"""LoRA adapters in the layout of the `peft` library, in and out, kept as low-rank factors.

PEFT stores A [r, in] and B [out, r] of each adapted module under its Hugging Face name; the module
then computes W x + s B A x, s = alpha / r, or alpha / sqrt(r) with rsLoRA. Here a module is a pair
"a" [L, in, r], "b" [L, r, out], with s folded into b, ranks padded to the largest of that module's
layers, zeros for untouched layers. A module that Hugging Face fuses (q, k and v of Phi-3, GPT-2,
GPT-NeoX) shares its A between our parts, and B's rows go to the parts that they feed.

Which modules are adapted follows from the tensors in the file; `target_modules`,
`layers_to_transform` and the like only said so when it was trained.

Legend: L layers, r rank, V vocabulary, D residual width.
"""

import json
import math
import pathlib
import re
from collections.abc import Mapping
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

__all__ = ["check", "is_adapter", "load", "read_chat_template", "read_config", "save"]

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


def check(directory: str | pathlib.Path, base: ModelConfig) -> None:
    """Raise InputError if an adapter does not fit a base; reads its config and header only."""
    _Adapter(pathlib.Path(directory), base)


def load(
    directory: str | pathlib.Path,
    base: Model,
    *,
    dtype: str = "float32",
    placement: Placement | None = None,
) -> tuple[Params, Params]:
    """Read an adapter over `base`: (lora, overrides), the `lora` and `tuned` of a `Pair`.

    lora: low-rank factors in place of {"kernel", "bias"}. overrides: parameters that the adapter
    replaces whole (`modules_to_save`, embeddings that were resized or adapted). A head that is
    tied in the base, and no longer equal to the embedding, is among them; both may have another
    number of rows than the base's. Raises InputError naming file and tensor or field.
    """
    adapter = _Adapter(pathlib.Path(directory), base.config)

    def put(prefix: str, path: str, value: np.ndarray) -> jax.Array:
        where = placement(f"{prefix}/{path}", value.shape) if placement else None
        return jax.device_put(value, where)

    kind = jax.numpy.dtype(dtype)
    lora = {
        path: put("lora", path, value.astype(kind)) for path, value in adapter.factors().items()
    }
    held: dict[str, Any] = flatten_dict(base.params, sep="/")  # pyright: ignore[reportAssignmentType]
    overrides = {
        path: put("tuned", path, value) for path, value in adapter.overrides(held, kind).items()
    }
    return unflatten_dict(lora, sep="/"), unflatten_dict(overrides, sep="/")


class _Adapter:
    """The tensors of one adapter, sorted by what they are: module -> tensor."""

    def __init__(self, directory: pathlib.Path, model: ModelConfig) -> None:
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

    def factors(self) -> dict[str, np.ndarray]:
        """All low-rank factors in float32: ".../a" [L, in, r] and ".../b" [L, r, out]."""
        parts: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        for module, tensor in self._a.items():
            a, b = self._read(tensor).T, self._read(self._b[module]).T
            row, layer = self._place(f"{module}.weight", tensor)
            inputs, outputs = a.shape[0], b.shape[1]
            b = b * self._scale(module, len(b))
            rows = fed_rows(row, self._model, inputs, outputs)
            for path, own in zip(row.paths, rows, strict=True):
                parts.setdefault(path.removesuffix("/kernel"), {})[layer] = a, b[:, own]
        factors = {}
        for path, layers in parts.items():
            for name, value in zip("ab", self._stack(path, layers), strict=True):
                factors[f"{path}/{name}"] = value
        return factors

    def _stack(
        self, path: str, layers: Mapping[int, tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        if not path.startswith("layers/"):
            return layers[0]
        (inputs, outputs), depth = self._shape(f"{path}/kernel"), self._model.depth
        rank = max(len(b) for _, b in layers.values())
        a = np.zeros((depth, inputs, rank), np.float32)
        b = np.zeros((depth, rank, outputs), np.float32)
        for layer, (own_a, own_b) in layers.items():
            a[layer, :, : len(own_b)] = own_a
            b[layer, : len(own_b)] = own_b
        return a, b

    def overrides(self, base: Mapping[str, jax.Array], dtype: Any) -> dict[str, np.ndarray]:
        """Parameters that are replaced whole, cast to `dtype`, layers stacked."""
        out: dict[str, np.ndarray] = {}
        whole: dict[str, Any] = {"embed/table": None, "head/kernel": None}
        for name, tensor in self._whole.items():
            row, layer = self._place(name, tensor)
            value = self._read(tensor)
            if row.paths[0] in whole:
                if value.ndim != 2 or value.shape[1] != self._model.width:
                    raise self._misshaped(tensor, value, row)
                whole[row.paths[0]] = value, self._is_saved(name)
                continue
            try:
                parts = row.layout.split(value, self._model)
            except ValueError:
                raise self._misshaped(tensor, value, row) from None
            for path, part in zip(row.paths, parts, strict=True):
                if part.shape != self._shape(path):
                    raise self._misshaped(tensor, value, row)
                if path not in out:  # layers that were not saved keep the base's values
                    out[path] = np.array(base[path], dtype)
                out[path][layer if path.startswith("layers/") else ...] = part
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
