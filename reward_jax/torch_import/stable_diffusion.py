"""Stable Diffusion from a diffusers folder, without torch.

    sd = load_stable_diffusion("stable-diffusion-v1-5")

A folder has `model_index.json`, and for each component a folder with its config and its weights in
safetensors, in one file or in several with an index. Our parameters are named as the files name
them (see `models/stable_diffusion/layers.py`), so that there is no table of names: only the last
part of a path, and the order of axes, differ. A tensor that is unknown, missing, misshaped or not
finite is an error that names it. Over a mesh each device's part of a tensor is read from the file
by itself: no host holds a parameter that its devices do not.
"""

import dataclasses
import functools
import hashlib
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Int, Shaped

from common_jax.errors import InputError
from common_jax.io.files import read_json
from common_jax.mesh import read_shards
from reward_jax.models.stable_diffusion.config import (
    SchedulerConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from reward_jax.models.stable_diffusion.pipeline import Config, CutPrompts, StableDiffusion
from reward_jax.models.stable_diffusion.schedulers import schedule_of
from reward_jax.models.stable_diffusion.text import TextEncoder
from reward_jax.models.stable_diffusion.unet import UNet
from reward_jax.models.stable_diffusion.vae import Decoder, Encoder
from reward_jax.sharding import placement
from reward_jax.torch_import.torch_files import Tensor, read_safetensors
from reward_jax.torch_import.torch_state import and_more

__all__ = ["Axes", "Dtype", "check_stable_diffusion", "load_stable_diffusion", "theirs"]

# What `dtype` may be.
Dtype = Literal["float32", "bfloat16", "float16"]

_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionPipelineSafe",
    "StableDiffusionImg2ImgPipeline",
)
_OTHERS = {"StableDiffusionXL": "SDXL", "StableDiffusion3": "SD 3", "Flux": "Flux"}
_MEND = "fetch it again"
_TWO = "the components are of two models: take all from one folder"
_LARGEST = 1 << 24  # bytes of a config, an index or a file of the tokenizer
_UNET, _MODEL = "diffusion_pytorch_model", "model"


def load_stable_diffusion(
    directory: str | pathlib.Path, dtype: Dtype = "float32", mesh: Mesh | None = None
) -> StableDiffusion:
    """A model of the networks of Stable Diffusion 1.x and 2.x.

    Args:
        directory: a diffusers folder.
        dtype: of the weights, and of what the networks compute; norms, softmax and what a sampler
            computes are in float32 always.
        mesh: over whose fsdp and tensor axes the weights are cut (`reward_jax/sharding.py`), each
            part read from the file to its device.

    Raises:
        InputError: for a folder of another pipeline, a missing component, weights that are no
            safetensors or do not fit, a config with an option that is not implemented.
    """
    if dtype not in get_args(Dtype):
        raise InputError(f"dtype {dtype!r} is unknown; known are {', '.join(get_args(Dtype))}")
    found, params = _open(pathlib.Path(directory)), {}
    for component in found.components:
        params |= _read(component, dtype, mesh)
    schedule = schedule_of(found.config.scheduler)
    return StableDiffusion(**params, schedule=schedule, config=found.config, tokens=found.tokens)


def check_stable_diffusion(directory: str | pathlib.Path) -> Config:
    """What a folder says; raises InputError as `load_stable_diffusion`, but reads no tensor."""
    return _open(pathlib.Path(directory)).config


class _Component(NamedTuple):
    """A folder's tensors, and the shapes of the parameters of each tree that they are for."""

    folder: pathlib.Path
    tensors: Mapping[str, Tensor]
    wanted: Mapping[str, Mapping[str, Any]]


class _Folder(NamedTuple):
    """A model whose numbers are not read yet, all else of it checked."""

    config: Config
    tokens: "_Tokens"
    components: list[_Component]


def _open(folder: pathlib.Path) -> _Folder:
    _check_pipeline(folder)
    parts = {name: folder / name for name in ("unet", "vae", "text_encoder")}
    config = Config(
        _stated(UNetConfig, parts["unet"], "config.json"),
        _stated(VAEConfig, parts["vae"], "config.json"),
        _stated(TextConfig, parts["text_encoder"], "config.json"),
        _stated(SchedulerConfig, folder / "scheduler", "scheduler_config.json"),
    )
    schedule_of(config.scheduler)
    _check_fit(folder, config)
    files = {
        name: _weights(part, _MODEL if name == "text_encoder" else _UNET)
        for name, part in parts.items()
    }
    layers = {
        "unet": sum(config.unet.layers) + sum(config.unet.depth),
        "vae": config.vae.layers,
        "text_encoder": config.text.layers,
    }
    for name, part in parts.items():  # nothing is built that no file holds
        if layers[name] > len(files[name]):
            raise InputError(
                f"{part}: config.json says {layers[name]} layers, the weights are "
                f"{len(files[name])} tensors; they are of two models: take both from one folder"
            )
    tokens = _tokens(folder / "tokenizer", config.text)
    c, latents = config, (1, 8, 8, config.unet.in_channels)
    text = jax.ShapeDtypeStruct((1, 1, c.unet.text_width), jnp.float32)
    image = jax.ShapeDtypeStruct(
        (1, c.vae.factor, c.vae.factor, c.vae.image_channels), jnp.float32
    )
    t, x = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct(latents, jnp.float32)
    z = jax.ShapeDtypeStruct((1, 1, 1, c.vae.latent_channels), jnp.float32)
    of_text = {name.removeprefix("text_model."): t for name, t in files["text_encoder"].items()}
    components = [
        _Component(parts["unet"], files["unet"], {"unet": _shapes(UNet(c.unet), x, t, text)}),
        _Component(
            parts["vae"],
            _renamed(files["vae"]),
            {"encoder": _shapes(Encoder(c.vae), image), "decoder": _shapes(Decoder(c.vae), z)},
        ),
        _Component(
            parts["text_encoder"],
            of_text,
            {"text": _shapes(TextEncoder(c.text), jax.ShapeDtypeStruct((1, 1), jnp.int32))},
        ),
    ]
    for component in components:
        _check_tensors(component)
    return _Folder(config, tokens, components)


def _check_pipeline(folder: pathlib.Path) -> None:
    if folder.is_file():
        raise InputError(
            f"{folder}: a file, where a diffusers folder belongs; where diffusers is, convert it: "
            "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    index = folder / "model_index.json"
    if not index.is_file():
        raise InputError(
            f"{folder}: no diffusers folder, for it has no model_index.json; name one that has"
        )
    name = " ".join(str(_json(index, {"_class_name": None})["_class_name"]).split())[:60]
    if name not in _PIPELINES:
        kind = next((k for start, k in _OTHERS.items() if name.startswith(start)), None)
        raise InputError(
            f"{folder}: holds {f'{kind} ({name})' if kind else name}, not Stable Diffusion 1.x; "
            f"give a folder of {_PIPELINES[0]}"
        )


def _json(path: pathlib.Path, wanted: Any) -> Any:
    _check_size(path)
    return read_json(path, wanted, _MEND)


def _check_size(path: pathlib.Path) -> None:
    if (size := path.stat().st_size) > _LARGEST:
        raise InputError(
            f"{path}: is of {size / 1e6:,.0f} MB, which none of a diffusers folder is; {_MEND}"
        )


def _stated(kind: Any, folder: pathlib.Path, name: str) -> Any:
    """A config of that kind, of a component's file."""
    if not folder.is_dir():
        raise InputError(f"{folder}: is missing; a Stable Diffusion folder has it: {_MEND}")
    if not (folder / name).is_file():
        raise InputError(f"{folder / name}: is missing; {_MEND}")
    stated = _json(folder / name, {})
    try:
        return kind.of(stated, folder / name)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / name}: an option is of another kind ({str(error):.100}); {_MEND}"
        ) from None


def _check_fit(folder: pathlib.Path, c: Config) -> None:
    """That the components are of one model."""
    if c.unet.text_width != c.text.width:
        raise InputError(
            f"{folder}: the U-Net takes texts of width {c.unet.text_width}, the text encoder "
            f"gives {c.text.width}; {_TWO}"
        )
    if c.unet.in_channels != c.vae.latent_channels:
        raise InputError(
            f"{folder}: the U-Net takes latents of {c.unet.in_channels} channels, the autoencoder "
            f"gives {c.vae.latent_channels}; {_TWO}"
        )


def _weights(folder: pathlib.Path, stem: str) -> dict[str, Tensor]:
    """Every tensor of a component, from one file or from those that an index names."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        named = _json(index, {"weight_map": {}})["weight_map"].values()
        paths = [folder / name for name in sorted({str(name) for name in named})]
        for path in paths:
            if path.parent != folder or not path.is_file():
                raise InputError(f"{index}: names {path.name}, which is missing; {_MEND}")
    else:
        whole = folder / f"{stem}.safetensors"
        paths = [whole] if whole.is_file() else [folder / f"{stem}.fp16.safetensors"]
    if not paths or not paths[0].is_file():
        others = sorted(
            p.name for p in folder.glob(f"{stem}*") if p.suffix in (".bin", ".msgpack")
        )
        if others:
            raise InputError(
                f"{folder}: has {others[0]} and no safetensors; where diffusers is, convert it: "
                "StableDiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise InputError(f"{folder / stem}.safetensors: is missing; {_MEND}")
    found: dict[str, Tensor] = {}
    for path in paths:
        found |= read_safetensors(path)
    return found


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's attention had other names, as published 1.x folders still have them."""
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

    def name(old: str) -> str:
        front, part, leaf = (["", "", ""] + old.rsplit(".", 2))[-3:]
        return f"{front}.{new[part]}.{leaf}" if ".attentions." in old and part in new else old

    return {name(old): tensor for old, tensor in tensors.items()}


def _shapes(module: nn.Module, *inputs: Any) -> dict[str, Any]:
    """Path -> shape of every parameter."""
    found = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return flatten_dict(found, sep="/")


_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def theirs(path: str) -> str:
    """The file's name of a parameter."""
    *modules, leaf = path.split("/")
    return ".".join([*modules, _LEAVES[leaf]])


class Axes(tuple[int, ...]):
    """For each axis of a parameter, which of a tensor's in a file it is; others there are of 1.

    Kernels are [outputs, inputs] there, of convolutions [outputs, inputs, height, width].
    """

    @classmethod
    def of(cls, path: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> "Axes | None":
        """Of a parameter's path and shape, and the tensor's; None where they do not fit."""
        axes, beyond = tuple(range(len(shape))), ((),)
        if path.endswith("kernel"):
            axes, beyond = ((1, 0), ((), (1, 1))) if len(shape) == 2 else ((2, 3, 1, 0), ((),))
        fits = len(stored) >= len(shape) == len(axes) and stored[len(shape) :] in beyond
        return cls(axes) if fits and tuple(stored[axis] for axis in axes) == shape else None

    def place(self, place: tuple[slice, ...], dimensions: int) -> tuple[slice, ...]:
        """Where a part of the parameter stands in the tensor, which has so many axes."""
        found = [slice(0, 1)] * dimensions
        for axis, own in zip(self, place, strict=True):
            found[axis] = own
        return tuple(found)

    def ours(self, part: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """That part with its axes in our order."""
        alone = tuple(axis for axis in range(part.ndim) if axis not in self)
        return part.transpose(*self, *alone).reshape([part.shape[axis] for axis in self])


def _check_tensors(component: _Component) -> None:
    """InputError for a tensor that is missing, unknown or of another shape; reads none."""
    folder, tensors, wanted = component
    expected = {theirs(path) for shapes in wanted.values() for path in shapes}
    if missing := sorted(expected - set(tensors)):
        raise InputError(
            f"{folder}: tensor {missing[0]} is missing{and_more(missing)}; the weights are "
            f"incomplete, or of another network than config.json says; {_MEND}"
        )
    beside = ("position_ids",)  # a constant that older files hold
    unknown = sorted(n for n in set(tensors) - expected if not n.endswith(beside))
    if unknown:
        raise InputError(
            f"{folder}: tensor {unknown[0]} is unknown{and_more(unknown)}; the weights are of "
            f"another network than config.json says; {_MEND}"
        )
    for shapes in wanted.values():
        for path, like in shapes.items():
            shape = tensors[theirs(path)].shape
            if Axes.of(path, shape, like.shape) is None:
                raise InputError(
                    f"{folder}: tensor {theirs(path)} has shape {list(shape)}, which config.json "
                    f"does not fit; {_MEND}"
                )


def _read(component: _Component, dtype: str, mesh: Mesh | None) -> dict[str, Any]:
    """Every parameter that the modules call for, a tree for each; errors as of the module."""
    found, where = {}, placement(mesh)
    for name, shapes in component.wanted.items():
        tree = {
            path: read_shards(
                like.shape,
                where(path, like.shape),
                functools.partial(_part, component, path, like.shape, dtype),
            )
            for path, like in shapes.items()
        }
        found[name] = unflatten_dict(tree, sep="/")
    return found


def _part(
    component: _Component, path: str, shape: tuple[int, ...], dtype: str, place: tuple[slice, ...]
) -> Shaped[np.ndarray, "..."]:
    """The numbers of a parameter at a place; errors as of the module."""
    tensor = component.tensors[theirs(path)]
    axes = Axes.of(path, tensor.shape, shape)
    assert axes is not None
    value = axes.ours(tensor.read(axes.place(place, len(tensor.shape))))
    with np.errstate(over="ignore"):
        value = value.astype(jnp.dtype(dtype))
    if not np.isfinite(value).all():
        raise InputError(
            f"{component.folder}: tensor {theirs(path)} holds NaN, infinity or numbers too large"
        )
    return value


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """A tokenizer of transformers; two of the same files are one, so that programs are shared."""

    digest: str
    length: int
    tokenizer: Any = dataclasses.field(compare=False, repr=False)

    def __call__(self, prompts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Tokens, cut and filled up; says how many prompts were cut."""
        if long := self.long(prompts):
            warnings.warn(
                f"prompts of more than {self.length} tokens are cut there: {len(long)} of "
                f"{len(prompts)}, the first {long[0]:.60}",
                CutPrompts,
                stacklevel=3,
            )
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True
        )["input_ids"]
        return np.asarray(ids, np.int32)

    def long(self, prompts: Sequence[str]) -> list[str]:
        """Those that are cut."""
        whole = self.tokenizer(list(prompts), verbose=False)["input_ids"]
        return [text for text, ids in zip(prompts, whole, strict=True) if len(ids) > self.length]


def _tokens(folder: pathlib.Path, text: TextConfig) -> _Tokens:
    known = "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"
    known += ("special_tokens_map.json", "added_tokens.json")
    there = [folder / name for name in known if (folder / name).is_file()]
    names = {path.name for path in there}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise InputError(
            f"{folder}: has neither tokenizer.json nor vocab.json with merges.txt; {_MEND}"
        )
    for path in there:
        _check_size(path)
    from transformers import CLIPTokenizer

    digest = hashlib.sha256()
    for path in there:
        digest.update(path.name.encode() + path.read_bytes())
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if not 2 <= tokenizer.model_max_length:
            raise ValueError(f"model_max_length is {tokenizer.model_max_length}")
        length = int(min(tokenizer.model_max_length, text.length))
        made = _Tokens(digest.hexdigest(), length, tokenizer)
        made(["", "a"])  # one may be made that knows no text
        largest = 1 + max(tokenizer.get_vocab().values())
    except Exception as error:  # of JSON, of tokenizers, of what transformers expects
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: no tokenizer of CLIP ({line:.120}); {_MEND}") from None
    if largest > text.vocabulary:
        raise InputError(
            f"{folder}: has {largest} tokens, the text encoder {text.vocabulary}; {_TWO}"
        )
    return made
