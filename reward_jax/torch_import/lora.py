"""The expert of a Stable Diffusion: another folder, or a LoRA of the base in diffusers' layout.

A LoRA file (`pytorch_lora_weights.safetensors`) has two factors for each weight that it changes,

    weight + alpha / rank * up @ down

named `unet.<module>.lora_A.weight` (down) and `lora_B`, or `lora.down` and `lora.up` as older
files have them, with `<module>.alpha` or what the file's metadata says; without either alpha is
the rank. It is merged into a copy of the weights that it changes; all else is shared. Where the
base lies on a mesh, each device's part of a weight is given the same part of the product.
"""

import json
import math
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

from common_jax.errors import InputError
from common_jax.mesh import read_shards
from reward_jax.models.stable_diffusion.pair import check_pair, reads_alike
from reward_jax.models.stable_diffusion.pipeline import StableDiffusion
from reward_jax.torch_import.stable_diffusion import (
    Axes,
    Dtype,
    load_stable_diffusion,
    theirs,
)
from reward_jax.torch_import.torch_files import read_safetensors
from reward_jax.torch_import.torch_state import and_more

__all__ = ["OwnTexts", "load_expert", "with_lora"]

_FILE = "pytorch_lora_weights.safetensors"
_OWNERS = {"unet": "unet", "text_encoder": "text"}
# (end of a name, what its module's name ends in, which factor)
_ENDS = (
    (r"\.lora_A\.weight", "", "down"),
    (r"\.lora_B\.weight", "", "up"),
    (r"\.lora(?:_linear_layer)?\.(down|up)\.weight", "", None),
    (r"\.processor\.(to_[qkv])_lora\.(down|up)\.weight", r".\1", None),
    (r"\.processor\.to_out_lora\.(down|up)\.weight", ".to_out.0", None),
    (r"\.alpha", "", "alpha"),
)


class OwnTexts(UserWarning):
    """An expert makes other texts of prompts than its base."""


def load_expert(
    base: StableDiffusion,
    path: str | pathlib.Path,
    dtype: Dtype = "float32",
    mesh: Mesh | None = None,
) -> StableDiffusion:
    """The expert of a pair: a diffusers folder of the base's architecture, or a LoRA of the base.

    path: a folder with model_index.json; or a LoRA's safetensors file, or a folder that has
    `pytorch_lora_weights.safetensors`. dtype, mesh: of a folder, see `load_stable_diffusion`; what
    a LoRA changes lies as the base's does. Warns of `OwnTexts` where one text is not for both.
    Raises InputError as `load_stable_diffusion`, `with_lora` and `check_pair`.
    """
    path = pathlib.Path(path)
    if path.is_file() or (path / _FILE).is_file():
        expert = with_lora(base, path)
    else:
        expert = load_stable_diffusion(path, dtype, mesh)
        check_pair(base, expert)
    if not reads_alike(base, expert):
        warnings.warn(
            f"{path}: reads prompts otherwise than the base, by a text encoder or a tokenizer of "
            "its own: give both their own texts, by pair_scores and pair_texts",
            OwnTexts,
            stacklevel=2,
        )
    return expert


def with_lora(base: StableDiffusion, path: str | pathlib.Path) -> StableDiffusion:
    """The base with a LoRA merged into it; see the module.

    Raises InputError for factors that are missing, unknown, misshaped or not finite, and for
    layouts that are not read.
    """
    path = pathlib.Path(path)
    path = path / _FILE if path.is_dir() else path
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: a LoRA is read from safetensors only; convert it")
    factors = _factors(path)
    metadata = _metadata(path)
    changed, products = {}, []
    for owner, field in _OWNERS.items():
        params: dict[str, Any] = flatten_dict(getattr(base, field), sep="/")
        places = {theirs(p).removesuffix(".weight"): p for p in params if p.endswith("kernel")}
        mine = {module: f for (who, module), f in factors.items() if who == owner}
        unknown = sorted(set(mine) - set(places))
        if unknown:
            raise InputError(
                f"{path}: changes {owner}.{unknown[0]}{and_more(unknown)}, which the base does "
                "not have; it is of another architecture"
            )
        for module, factor in mine.items():
            place = places[module]
            name, shape = f"{owner}.{module}", params[place].shape
            products.append((params, place, _product(path, name, factor, metadata, shape, place)))
        if mine:
            changed[field] = params
    for params, place, product in products:  # of which none is wrong
        params[place] = _merged(jnp.asarray(params[place]), product)
    trees = {field: unflatten_dict(params, sep="/") for field, params in changed.items()}
    return base.replace(**trees)  # pyright: ignore[reportAttributeAccessIssue]


class _Product(NamedTuple):
    """scale * up @ down, [outputs, ranks] and [ranks, inputs, ...], for a parameter."""

    up: Float[np.ndarray, "O R"]
    down: Float[np.ndarray, "R I ..."]
    scale: float
    axes: Axes

    def part(self, place: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        """The numbers at a place of the parameter, without the others."""
        outputs, *inputs = self.axes.place(place, self.down.ndim)
        product = np.tensordot(self.up[outputs], self.down[(slice(None), *inputs)], 1)
        return self.scale * self.axes.ours(product)


def _merged(weight: Float[Array, "..."], product: _Product) -> Float[Array, "..."]:
    """A weight with a product added, where it lies, part by part."""
    held = {_bounds(s.index, weight.shape): s.data for s in weight.addressable_shards}

    def read(place: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        own = np.asarray(held[_bounds(place, weight.shape)], np.float32)
        return (own + product.part(place)).astype(weight.dtype)

    return read_shards(weight.shape, weight.sharding if weight.committed else None, read)


def _bounds(place: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(own.indices(size)[:2] for own, size in zip(place, shape, strict=True))


def _factors(path: pathlib.Path) -> dict[tuple[str, str], dict[str, Float[np.ndarray, "..."]]]:
    """(owner, module) -> "down", "up" and perhaps "alpha"."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name, tensor in read_safetensors(path).items():
        if name.startswith("lora_"):
            raise InputError(
                f"{path}: is in kohya's layout ({name:.60}); where diffusers is, convert it: "
                "pipe.load_lora_weights(file), pipe.save_lora_weights(folder)"
            )
        match, into, kind = next(
            ((m, into, kind) for end, into, kind in _ENDS if (m := re.search(f"{end}$", name))),
            (None, "", None),
        )
        if match is None:
            raise InputError(f"{path}: tensor {name} is no factor of a LoRA, nor an alpha")
        module = name[: match.start()] + match.expand(into)
        owner, _, rest = module.partition(".")
        if owner not in _OWNERS:  # of the U-Net alone, in the oldest files
            owner, rest = "unet", module
        rest = rest.removeprefix("text_model.") if owner == "text_encoder" else rest
        value = np.asarray(tensor.read(), np.float32)
        if not np.isfinite(value).all():
            raise InputError(f"{path}: tensor {name} holds NaN or infinity")
        found.setdefault((owner, rest), {})[kind or match[match.re.groups]] = value
    if not found:
        raise InputError(f"{path}: holds no tensor")
    return found


def _metadata(path: pathlib.Path) -> Mapping[str, Any]:
    """What diffusers wrote of the adapter, such as "unet.lora_alpha"."""
    try:
        with safe_open(path, "numpy") as file:
            stated = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        found = json.loads(stated)
    except (SafetensorError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path}: its metadata are damaged; save it again")
    for option in ("use_dora", "lora_bias"):
        for owner in _OWNERS:
            if found.get(f"{owner}.{option}"):
                raise InputError(
                    f"{path}: {option} is not implemented; merge it where it was made"
                )
    return found


def _product(
    path: pathlib.Path,
    name: str,
    factor: Mapping[str, Float[np.ndarray, "..."]],
    metadata: Mapping[str, Any],
    shape: tuple[int, ...],
    place: str,
) -> _Product:
    """What is added to the parameter at `place`."""
    if lack := [kind for kind in ("down", "up") if kind not in factor]:
        raise InputError(f"{path}: {name} has no {lack[0]} factor; the file is incomplete")
    down, up = factor["down"], factor["up"]
    rank = len(down) if down.ndim > 1 else 0
    if not rank or up.ndim != down.ndim or up.shape[1] != rank:
        raise InputError(
            f"{path}: the factors of {name} are {list(down.shape)} and {list(up.shape)}, which do "
            "not belong together"
        )
    up = up.reshape(len(up), math.prod(up.shape[1:]))
    changed = (len(up), *down.shape[1:])
    axes = Axes.of(place, changed, shape) if up.shape[1] == rank else None
    if axes is None:
        raise InputError(
            f"{path}: changes {name} by {list(changed)}, which the base's weight does not "
            "fit; it is of another architecture"
        )
    return _Product(up, down, _scale(name, factor, metadata, rank), axes)


def _scale(name: str, factor: Mapping[str, Any], metadata: Mapping[str, Any], rank: int) -> float:
    """Alpha / rank, or by its root where the adapter says so."""
    owner, _, module = name.partition(".")
    alpha = metadata.get(f"{owner}.lora_alpha", rank)
    for pattern, own in (metadata.get(f"{owner}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
    if "alpha" in factor:
        alpha = float(factor["alpha"].reshape(-1)[0])
    return alpha / (math.sqrt(rank) if metadata.get(f"{owner}.use_rslora") else rank)
