"""Models and pairs as orbax stores, which load straight to their shards under any mesh.

    STORE/store.json    what is held: the configs, names, notes
    STORE/params/       the arrays, as orbax writes them
    STORE/tokenizer/    tokenizer files and chat template, where there are any
    STORE/config.json   a model's Hugging Face config, where it is known: for an export

A store is written under another name and renamed when it is complete.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from common_jax.cli.ranges import check_ranges
from common_jax.distributed import by_first, is_first
from common_jax.errors import InputError
from common_jax.io.files import writing
from tuco_jax.models.config import ModelConfig, Rope
from tuco_jax.models.decoder import Params, param_shapes
from tuco_jax.models.families import check_supported, from_huggingface
from tuco_jax.models.pair import Notes, Pair
from tuco_jax.weights import arrays, int8
from tuco_jax.weights.assemble import DTYPES, PUBLISHED, Placement, held_dtype
from tuco_jax.weights.hf.model import read_config as read_huggingface
from tuco_jax.weights.hf.model import read_tokenizer
from tuco_jax.weights.model import Model, OpenModel
from tuco_jax.weights.orbax.target import DESCRIPTION, check_target

__all__ = [
    "OpenPair",
    "holds_pair",
    "is_store",
    "load",
    "load_pair",
    "open_model",
    "read_config",
    "save",
    "save_pair",
]

_FORMAT = "tuco_jax store, version 2"
# Of the first, layers do not lie in chunks of their own: one is read alone, but not as quickly.
_READ = (_FORMAT, "tuco_jax store, version 1")


def is_store(directory: str | pathlib.Path) -> bool:
    """Whether a directory is a store, of a model or of a pair."""
    return (pathlib.Path(directory) / DESCRIPTION).is_file()


def holds_pair(directory: str | pathlib.Path) -> bool:
    """Whether a store holds a pair rather than one model."""
    return "tuned_config" in _describe(directory)


def read_config(directory: str | pathlib.Path) -> ModelConfig:
    """The config of the model (of a pair: of its base) in a store; reads no array."""
    return _config(_describe(directory)["config"])


def save(directory: str | pathlib.Path, model: Model, *, overwrite: bool = False) -> None:
    """Write a model as a store. Raises InputError if `directory` exists, unless `overwrite`."""
    description = {"config": _fields(model.config), "name": model.name}
    _write(directory, description, model.params, model.tokenizer, overwrite, model.hf_config)


def save_pair(
    directory: str | pathlib.Path,
    pair: Pair,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a pair as a store: base, what tuning replaced, low-rank factors; as `save`."""
    description = {
        "config": _fields(pair.base_config),
        "tuned_config": _fields(pair.tuned_config),
        "notes": list(pair.notes),
    }
    tree = {"base": pair.base, "tuned": pair.tuned, "lora": pair.lora}
    _write(directory, description, _without_empty(tree), tokenizer, overwrite)


def load(
    directory: str | pathlib.Path,
    *,
    dtype: str = "float32",
    placement: Placement | None = None,
    tokenizer: bool = True,
) -> Model:
    """Read a model that `save` wrote, cast to `dtype`, each parameter to its `placement`."""
    return open_model(directory, dtype=dtype, tokenizer=tokenizer).load(placement)


def open_model(
    directory: str | pathlib.Path, *, dtype: str = "float32", tokenizer: bool = True
) -> OpenModel:
    """`load` before it reads the weights."""
    description = _describe(directory)
    if "tuned_config" in description:
        raise InputError(
            f"{directory}: the store holds a pair, not one model; give it as base and as tuned"
        )
    weights = _Arrays(directory, dtype, {"": _config(description["config"])})
    own_tokenizer = read_tokenizer(pathlib.Path(directory) / "tokenizer") if tokenizer else None
    config = _config(description["config"])
    hf_config = _known(directory, config)
    return OpenModel(config, weights, own_tokenizer, description["name"], hf_config)


def _known(directory: str | pathlib.Path, config: ModelConfig) -> PreTrainedConfig | None:
    """The Hugging Face config in the store, if it agrees with the store's own config."""
    try:
        found = read_huggingface(directory)
        return found if from_huggingface(found) == config else None
    except InputError:  # none there, or spoilt: only an export would ask for it
        return None


def load_pair(
    directory: str | pathlib.Path, *, dtype: str = "float32", placement: Placement | None = None
) -> tuple[Pair, PreTrainedTokenizerBase | None]:
    """Read a pair that `save_pair` wrote, and its tokenizer."""
    return OpenPair(directory, dtype=dtype).load(placement)


class OpenPair:
    """A pair that `save_pair` wrote, before its weights are read."""

    def __init__(self, directory: str | pathlib.Path, *, dtype: str = "float32") -> None:
        description = _describe(directory)
        if "tuned_config" not in description:
            raise InputError(
                f"{directory}: the store holds one model, not a pair; name its base, too"
            )
        self._directory, self._notes = pathlib.Path(directory), Notes(description["notes"])
        self._configs = _config(description["config"]), _config(description["tuned_config"])
        base, tuned = self._configs
        self._arrays = _Arrays(directory, dtype, {"base/": base, "tuned/": tuned})

    @property
    def stored(self) -> dict[str, frozenset[str]]:
        """The types that the base's matrices are stored in, by the store's name."""
        return {str(self._directory): self._arrays.stored}

    def load(
        self, placement: Placement | None = None, *, layers: bool = True
    ) -> tuple[Pair, PreTrainedTokenizerBase | None]:
        """The pair, or what of it stands outside the layers, and its tokenizer."""
        tree = self._arrays.read(placement, layers=layers)
        base, tuned, lora = (tree.get(name, {}) for name in _BRANCHES)
        pair = Pair(base, tuned, lora, *self._configs, self._notes)
        return pair, read_tokenizer(self._directory / "tokenizer")

    def layer(self, index: int) -> tuple[Params, Params, Params]:
        """One layer of each branch of the pair, arrays of the host."""
        tree = self._arrays.layer(index)
        base, tuned, lora = (tree.get(name, {}) for name in _BRANCHES)
        return base, tuned, lora


_BRANCHES = "base", "tuned", "lora"
_MOST_PACKED = 100  # weights hardly compress: what is more than so many times its files is none


def _write(
    directory: str | pathlib.Path,
    description: dict[str, Any],
    tree: Params,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    hf_config: PreTrainedConfig | None = None,
) -> None:
    by_first(lambda: check_target(directory, overwrite=overwrite))
    final = pathlib.Path(directory).absolute()
    partial = final.with_name(f".{final.name}.partial")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        text = json.dumps({"format": _FORMAT} | description, indent=1) + "\n"
        (partial / DESCRIPTION).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial / "tokenizer"))
        if hf_config is not None:
            hf_config.save_pretrained(str(partial))

    def end() -> None:
        old = final.with_name(f".{final.name}.old")
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)

    try:
        with writing(pathlib.Path(directory)):
            by_first(begin)
            arrays.save(partial / "params", tree)  # by all processes
            by_first(end)
    finally:
        if is_first():
            _remove(partial)


def _remove(folder: pathlib.Path) -> None:
    """Remove it, though threads of a writing that was broken off bring it back for a moment."""
    for _ in range(20):
        if not folder.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


class _Arrays:
    """The arrays of a store: a model's `Weights`, or a pair's, under base, tuned and lora.

    configs: of the models that lie under each prefix, to which the arrays must fit.
    """

    def __init__(
        self, directory: str | pathlib.Path, dtype: str, configs: Mapping[str, ModelConfig]
    ) -> None:
        if dtype not in (*DTYPES, PUBLISHED):
            raise InputError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self._folder = pathlib.Path(directory) / "params"
        with self._errors():
            self._stored = arrays.Stored(
                self._folder,
                dtype=lambda path, kind: held_dtype(dtype, [kind], path),
                check=self._finite,
            )
            self._check_shapes(configs)
        if int8.INT8 in self._stored.stored.values() and dtype != int8.INT8:
            raise InputError(
                f"{directory}: holds int8 weights: give --dtype int8, or import the model again"
            )

    @property
    def stored(self) -> frozenset[str]:
        """The types that the matrices of the layers, or of the base's, are stored in."""
        return frozenset(
            kind
            for path, kind in self._stored.stored.items()
            if path.endswith("/kernel") and path.removeprefix("base/").startswith("layers/")
        )

    def _check_shapes(self, configs: Mapping[str, ModelConfig]) -> None:
        """ValueError where arrays are not the configs', or more than the files can hold."""
        found = self._stored.shapes
        for prefix, config in configs.items():
            specs: dict[str, Any] = flatten_dict(param_shapes(config), sep="/")  # pyright: ignore[reportAssignmentType]
            wanted = {f"{prefix}{path}": spec.shape for path, spec in specs.items()}
            own = {path: shape for path, shape in found.items() if path.startswith(prefix)}
            kinds = self._stored.stored
            rounded = [p for p in wanted if int8.holds(p) and kinds.get(p) == int8.INT8]
            scales = {int8.scale_of(p): (*wanted[p][:-2], wanted[p][-1]) for p in rounded}
            needed = scales if prefix == "tuned/" else wanted | scales
            if lacking := sorted(needed.keys() - own.keys()):
                raise ValueError(f"{lacking[0]} is missing")
            wanted |= scales
            for path, shape in own.items():
                if wanted.get(path) != shape:
                    raise ValueError(f"{path} has shape {list(shape)}, not its config's")
        held = 4 * sum(map(math.prod, found.values()))
        on_disk = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        if held > _MOST_PACKED * on_disk + 2**20:
            raise ValueError(f"its {on_disk} bytes cannot hold the {held} that it declares")

    def read(self, placement: Placement | None = None, *, layers: bool = True) -> Params:
        with self._errors():
            return self._stored.read(placement, layers=layers)

    def layer(self, index: int) -> Params:
        with self._errors():
            return self._stored.layer(index)

    def _finite(self, path: str, part: np.ndarray) -> None:
        if not np.isfinite(part).all():
            raise InputError(
                f"{self._folder}: parameter {path} holds NaN or infinity; import it again"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self._folder}: incomplete or corrupt ({reason}); import it again"
            ) from None


def _describe(directory: str | pathlib.Path) -> dict[str, Any]:
    path = pathlib.Path(directory) / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description, dict) or description.get("format") not in _READ:
            raise ValueError(f"its format is none of {', '.join(_READ)}")
        needed = ("config", "notes" if "tuned_config" in description else "name")
        if lacking := [field for field in needed if field not in description]:
            raise ValueError(f"it has no {lacking[0]!r}")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not the description of a store ({error}); import it again"
        ) from None
    return description


def _fields(config: ModelConfig) -> dict[str, Any]:
    """A config as a store keeps it: without how its products are computed."""
    fields = dataclasses.asdict(config)
    del fields["precision"]
    return fields


def _config(fields: dict[str, Any]) -> ModelConfig:
    """A config from JSON, where tuples have become lists."""

    def tuples(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    try:
        ropes = [{k: tuples(v) for k, v in rope.items()} for rope in fields["ropes"]]
        plain: dict[str, Any] = {k: tuples(v) for k, v in fields.items()}
        for kind, some in ((ModelConfig, plain), *((Rope, rope) for rope in ropes)):
            _check_types(kind, some)
        plain["ropes"] = tuple(Rope(**rope) for rope in ropes)
        config = ModelConfig(**plain)
        check_supported(config.family)
        check_ranges(config)
        return config
    except (KeyError, TypeError, AttributeError, ValueError, InputError) as error:
        raise InputError(
            f"the store's {DESCRIPTION} describes no model of this version ({error}); "
            "import the model again"
        ) from None


def _check_types(kind: type[ModelConfig] | type[Rope], values: Mapping[str, Any]) -> None:
    """TypeError where a value is of another type than the field's default, or its parts are."""
    for field in dataclasses.fields(kind):
        wanted = type(field.default)
        value = values.get(field.name, field.default)
        fine = isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
        if field.name in ("frequencies", "long_frequencies", "rope_index", "windows"):
            fine = isinstance(value, tuple) and all(isinstance(x, int | float) for x in value)
            fine &= field.name.endswith("frequencies") or all(isinstance(x, int) for x in value)
        elif field.default is dataclasses.MISSING:
            continue
        if not fine:
            raise TypeError(f"{field.name} is {value!r}")


def _without_empty(tree: Params) -> Params:
    """The tree without empty branches, which orbax does not hold."""
    pruned = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in pruned.items() if not (isinstance(v, dict) and not v)}
