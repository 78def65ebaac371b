"""Models that are in memory already, such as those of transformers and `peft`, without torch.

A tensor is whatever has a shape and becomes a NumPy array: torch's (on any device, bfloat16 too),
JAX's, NumPy's. Nothing is converted before it is asked for, and then a tensor at a time.
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from transformers import AutoConfig, PreTrainedConfig

from common_jax.errors import InputError
from common_jax.io.wrapped_names import unwrapped
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.families import check_supported, from_huggingface
from tuco_jax.weights.assemble import Checkpoint
from tuco_jax.weights.experts import one_by_one
from tuco_jax.weights.keys import FAMILIES
from tuco_jax.weights.model import OpenModel
from tuco_jax.weights.names import Renamed
from tuco_jax.weights.peft.adapter import Found
from tuco_jax.weights.peft.config import AdapterConfig
from tuco_jax.weights.peft.layout import PREFIX
from tuco_jax.weights.peft.tensors import PARTS

__all__ = ["find_adapter", "model_config", "open_model"]

_WRAPPERS = ("token_adapter", "base_layer", "original_module")  # PEFT's, in names of the base's
_WHOLE = {"modules_to_save", "ln_tuning_layers"}  # of a module that an adapter replaces
_ADAPTERS = {*PARTS, *_WHOLE, "trainable_tokens_original", "ranknum"}


class Held(NamedTuple):
    """A model in memory; module: the object itself, None where only its tensors are given."""

    tensors: Mapping[str, Any]
    config: PreTrainedConfig
    name: str
    module: Any


def open_model(source: Any, *, dtype: str = "float32") -> OpenModel:
    """A transformers model, or (state dict, config), to be read; of a PeftModel, its base.

    The config may be transformers' or the fields of a config.json; a state dict may be that of a
    Lightning checkpoint. Raises InputError where it is none of these, or does not fit its config.
    """
    held = _hold(source)
    config = from_huggingface(held.config)
    family = FAMILIES[config.family]
    stored = one_by_one(_Tensors(_base_tensors(held.tensors), held.name), config)
    tensors = Renamed(stored, config, family)
    weights = Checkpoint(config, tensors, family.table(), dtype=dtype)
    return OpenModel(config, weights, None, held.name, copy.deepcopy(held.config))


def model_config(source: Any) -> ModelConfig:
    """The config of what `open_model` would read."""
    return from_huggingface(_hold(source).config)


def find_adapter(source: Any, adapter: str | None = None) -> Found | None:
    """The adapter of a PeftModel; None for a model without adapters.

    adapter: its name; by default the active one. Raises InputError, which lists the names, where
    that is not one.
    """
    held = _hold(source)
    configs = getattr(held.module, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        return None
    if any(getattr(module, "merged", False) for module in held.module.modules()):
        raise InputError(
            f"{held.name}: its adapter is merged into its weights; call unmerge_adapter() first"
        )
    name = next(iter(configs)) if len(configs) == 1 else _active(held.module)
    name = name if adapter is None else adapter
    if name not in configs:
        which = "several adapters are active" if name is None else f"no adapter {name!r}"
        raise InputError(
            f"{held.name}: {which}; it holds {', '.join(configs)}: name one with adapter="
        )
    config = configs[name]
    fields = dict(config if isinstance(config, Mapping) else config.to_dict())
    fields["peft_type"] = getattr(fields.get("peft_type"), "value", fields.get("peft_type"))
    title = f"{held.name}, adapter {name!r}"
    family = FAMILIES[from_huggingface(held.config).family]
    ends = {
        family.bare(row.tensor)
        for row in family.rows
        if row.paths in (("embed/table",), ("head/kernel",))
    }
    tensors: dict[str, Any] = {}
    for stored, value in held.tensors.items():
        parts = unwrapped(stored).removeprefix(PREFIX).split(".")
        at = next((i for i, part in enumerate(parts) if part in _ADAPTERS), None)
        plain = [part for part in parts if part not in _WRAPPERS]
        if at is not None:
            if parts[at] in {*PARTS, *_WHOLE} and parts[at + 1 : at + 2] == [name]:
                role = [] if parts[at] in _WHOLE else [parts[at]]
                tensors[".".join([*parts[:at], *role, *parts[at + 2 :]])] = value
        elif family.bare(".".join(plain)) in ends:  # the base's, perhaps resized
            tensors[".".join([*plain[:-1], "original_module", plain[-1]])] = value
        elif parts[-1] == "bias" and _is_trained(str(fields.get("bias", "none")), parts):
            tensors[".".join(plain)] = value
    return Found(AdapterConfig(fields, title), _Tensors(tensors, title), title, None)


def _hold(source: Any) -> Held:
    if isinstance(source, tuple) and len(source) == 2:
        tensors, config = source
        module, name = None, "a state dict in memory"
    else:
        module: Any = source
        while not hasattr(module, "config") and hasattr(module, "module"):  # data-parallel
            module = module.module
        if not hasattr(module, "config") or not callable(getattr(module, "state_dict", None)):
            raise InputError(
                f"a {type(source).__name__} is no model; give a directory, a hub id, a .gguf "
                "file, a store, a transformers model, a PeftModel or (state dict, config)"
            )
        tensors, config = module.state_dict(), module.config
        name = f"a {type(module).__name__} in memory"
    if isinstance(tensors, Mapping) and isinstance(tensors.get("state_dict"), Mapping):
        tensors = tensors["state_dict"]  # a Lightning checkpoint
    if not isinstance(tensors, Mapping) or not all(hasattr(x, "shape") for x in tensors.values()):
        raise InputError(f"{name}: must map names to tensors")
    if isinstance(config, Mapping):
        config = _from_fields(config, name)
    if not isinstance(config, PreTrainedConfig):
        raise InputError(f"{name}: its config is no transformers config, nor the fields of one")
    return Held(tensors, config, name, module)


def _from_fields(fields: Mapping[str, Any], name: str) -> PreTrainedConfig:
    rest = dict(fields)
    check_supported(str(rest.pop("model_type", None)))
    try:
        return AutoConfig.for_model(str(fields["model_type"]), **rest)
    except Exception as error:  # transformers' own kinds for a field of a wrong type or value
        raise InputError(f"{name}: {' '.join(str(error).split())}; mend its config") from None


class _Tensors:
    """Tensors in memory as a `TensorSource`."""

    def __init__(self, tensors: Mapping[str, Any], name: str) -> None:
        self._tensors, self.name = tensors, name
        self._shapes = {k: tuple(int(n) for n in v.shape) for k, v in tensors.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def file(self, tensor: str) -> str:
        return self.name

    def stored(self, tensor: str) -> str:
        return str(getattr(self._tensors[tensor], "dtype", "?")).removeprefix("torch.")

    def read(
        self, tensor: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> Float[np.ndarray, "..."]:
        value = self._tensors[tensor]
        if rows != slice(None):
            value = value[rows]
        if columns != slice(None):
            value = value[:, columns]
        if hasattr(value, "detach"):  # torch's
            if str(getattr(value, "device", "")) == "meta":
                raise InputError(
                    f"{self.name}: tensor {tensor} is on the meta device: it is empty"
                )
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # which NumPy does not know
                value = value.float()
            value = value.numpy()
        value = np.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise InputError(
                f"{self.name}: tensor {tensor} holds {value.dtype}, not floats; dequantise the "
                "model first"
            )
        return value


def _base_tensors(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's tensors under the names that they had before PEFT wrapped its modules."""
    wrapped = {*_WRAPPERS, *_ADAPTERS}
    if not any(wrapped & set(name.split(".")) for name in tensors):
        return tensors
    out: dict[str, Any] = {}
    for name, value in tensors.items():
        parts = unwrapped(name).removeprefix(PREFIX).split(".")
        if not _ADAPTERS & set(parts):
            out.setdefault(".".join(part for part in parts if part not in _WRAPPERS), value)
    return out


def _active(module: Any) -> str | None:
    """The name of the one active adapter; None where several are, or none."""
    names: Any = getattr(module, "active_adapters", ())
    names = names() if callable(names) else names
    return names[0] if len(names) == 1 else None


def _is_trained(bias: str, parts: list[str]) -> bool:
    """Whether an adapter whose config says `bias` trained the bias of that name."""
    return bias == "all" or (bias.endswith("_only") and "base_layer" in parts)
