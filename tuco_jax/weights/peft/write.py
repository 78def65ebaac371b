"""Writing low-rank factors as an adapter that the `peft` library loads."""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from common_jax.errors import InputError
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params, param_shapes
from tuco_jax.weights.keys import FAMILIES, Stored
from tuco_jax.weights.peft.layout import (
    CHAT_TEMPLATE,
    CONFIG,
    PREFIX,
    WEIGHTS,
    fed_rows,
    is_conv1d,
)

__all__ = ["save"]


def save(
    directory: str | pathlib.Path,
    config: ModelConfig,
    lora: Params,
    *,
    base_name: str,
    chat_template: str | None = None,
) -> None:
    """Write low-rank factors as a new adapter that `peft` loads over the same base.

    lora: the tree that `load` gives and training makes; scales are in "b", so alpha equals the
    rank. Parts that Hugging Face fuses become one module, whose rank is the sum of theirs unless
    they share their "a". base_name: what the base is called, for those who load the adapter.
    chat_template: the tuned model's, where it is not that of the base's tokenizer.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: exists and is not empty; name a new directory")
    factors: dict[str, Any] = flatten_dict(lora, sep="/")  # pyright: ignore[reportAssignmentType]
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    transposed = False
    family = FAMILIES[config.family]
    modules = {tensor: alias for alias, tensor in family.aliases}  # as transformers 5 names them
    for row in family.rows:
        own = {
            path: (np.asarray(factors[f"{part}/a"]), np.asarray(factors[f"{part}/b"]))
            for path in row.paths
            if f"{(part := path.removesuffix('/kernel'))}/a" in factors
        }
        if not own:
            continue
        a, b, conv1d = _fuse(row, own, config)
        module = modules.get(row.tensor, row.tensor).removesuffix(".weight")
        ranks[re.split(r"\{[le]\}\.", module)[-1]] = a.shape[-1]
        transposed |= conv1d
        for tensor, at in row.names(config):
            name = PREFIX + modules.get(tensor, tensor).removesuffix(".weight")
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a[at].T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b[at].T)
    if not tensors:
        raise ValueError("lora holds no factors")
    rank = max(ranks.values())
    unlike = {re.escape(target): r for target, r in ranks.items() if r != rank}
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": unlike,
        "alpha_pattern": unlike,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": sorted(ranks),
    }
    text = json.dumps(fields, indent=2) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / CONFIG).write_text(text, encoding="utf-8")
        if chat_template is not None:
            (directory / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory}: the adapter cannot be written ({error})") from error


def _fuse(
    row: Stored, own: Mapping[str, tuple[np.ndarray, np.ndarray]], config: ModelConfig
) -> tuple[np.ndarray, np.ndarray, bool]:
    """One module's a [.., in, r] and b [.., r, out] from its parts'; whether it is a Conv1D."""
    specs: dict[str, Any] = flatten_dict(param_shapes(config), sep="/")  # pyright: ignore[reportAssignmentType]
    shapes = {path: spec.shape for path, spec in specs.items()}
    shapes["head/kernel"] = config.width, config.vocab_size
    inputs, outputs = shapes[row.paths[0]][-2], sum(shapes[path][-1] for path in row.paths)
    rows = dict(zip(row.paths, fed_rows(row, config, inputs, outputs), strict=True))
    every = [a for a, _ in own.values()]
    if all(np.array_equal(a, every[0]) for a in every):
        a, starts = every[0], [0] * len(every)
    else:
        a = np.concatenate(every, axis=-1)
        starts = np.cumsum([0] + [a.shape[-1] for a in every[:-1]]).tolist()
    b = np.zeros((*a.shape[:-2], a.shape[-1], outputs), a.dtype)
    for start, (path, (_, part)) in zip(starts, own.items(), strict=True):
        b[..., start : start + part.shape[-2], rows[path]] = part
    return a, b, is_conv1d(row, config, inputs, outputs)
