"""Checks that two models are a pair: errors, and notes on how they differ.

Errors, raised before any weight is read: another family or shape, an adapter that cannot be
applied. Notes are printed and stored with every result. TuCo allows PT and FT to differ in RoPE,
window, epsilon and vocabulary, and each layer uses its own; but such a difference becomes part of
FTC, which a reader should know. A change of the embedding is not part of TuCo at all.

An adapter says which base it was trained on. That name is often a path on another machine, so it
is compared by its last component, without case and quantisation suffix, and a different one is a
note. It is fatal only if it can be looked up here (a directory, or a hub id in the local cache)
and turns out to be a model of another family or shape.
"""

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Array, Float
from transformers import PreTrainedTokenizerBase

from common_jax.errors import InputError
from common_jax.mesh import fetch
from tuco_jax.models.config import ModelConfig, Rope
from tuco_jax.models.families import from_huggingface
from tuco_jax.models.pair import Pair
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.peft.adapter import Found

__all__ = ["adapter", "chat_templates", "configs", "embeddings", "tokenizers"]

# Two models must agree in these to be one before and after tuning.
_SHAPE = (
    "family",
    "depth",
    "width",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp_width",
    "norm",
    "pre_norm",
    "post_norm",
    "parallel",
    "gated",
    "experts",
    "qkv_bias",
    "out_bias",
    "mlp_bias",
    "qk_norm",
)
# One block and one key table: llama.cpp's converter writes the second as the first.
_ALIKE = {"mistral": "llama"}
_SAMPLE = "Hello, world!  It's 3.14 o'clock.\n\tdef naïve(x): return x == 1  # 日本語 😀\n"
_EMPTY = 1e-3  # a row's norm beside that of rows in general (root mean square)


def configs(base: ModelConfig, tuned: ModelConfig, base_name: str, tuned_name: str) -> list[str]:
    """Notes on two configs. InputError, naming both values, where they are no pair."""
    for field in _SHAPE:
        old, new = _shape(base, field), _shape(tuned, field)
        if old != new:
            raise InputError(
                f"{tuned_name}: {field} is {new}, but {old} in {base_name}; "
                "the two are not one model before and after tuning"
            )
    notes = []
    for field in dataclasses.fields(ModelConfig):
        old, new = getattr(base, field.name), getattr(tuned, field.name)
        if field.name in _SHAPE or old == new:
            continue
        if field.name == "ropes":
            notes += _rope_notes(old, new)
        else:
            notes.append(f"{field.name} differs: {_short(old)} in the base, {_short(new)} tuned")
    return notes


def _rope_notes(base: tuple[Rope, ...], tuned: tuple[Rope, ...]) -> list[str]:
    bases = [[rope.base for rope in ropes] for ropes in (base, tuned)]
    if bases[0] != bases[1]:
        old, new = (", ".join(f"{b:g}" for b in side) or "none" for side in bases)
        return [f"RoPE base differs: {old} in the base, {new} tuned"]
    for old, new in zip(base, tuned, strict=True):
        fields = [f.name for f in dataclasses.fields(Rope)]
        differing = [name for name in fields if getattr(old, name) != getattr(new, name)]
        if differing:
            return [f"RoPE scaling differs, in {', '.join(differing)}"]
    return []


def _shape(config: ModelConfig, field: str) -> object:
    value = getattr(config, field)
    return _ALIKE.get(value, value) if field == "family" else value


def _short(value: object) -> str:
    """A per-layer tuple by its distinct values."""
    if not isinstance(value, tuple):
        return str(value)
    kinds = sorted(set(value))
    if len(kinds) == 1:
        return f"{kinds[0]} in every layer"
    return " and ".join(f"{k} in {value.count(k)} layers" for k in kinds)


def adapter(found: Found, base_name: str, base: ModelConfig) -> list[str]:
    """Notes on which base an adapter names; InputError where it was trained on another model.

    That is where the named base is at hand, and turns out to be one (see the module).
    """
    named = found.config.fields.get("base_model_name_or_path")
    if not named or found.folder is None or _plain(named) == _plain(base_name):
        return []
    known = _known_config(str(named))
    if known is not None:
        for field in _SHAPE:
            old, new = _shape(base, field), _shape(known, field)
            if old != new:
                raise InputError(
                    f"{found.name}: the adapter was trained on {named} ({field} {new}), not "
                    f"on {base_name} ({field} {old}); give the base that it names"
                )
    return [f"the adapter names another base: {named}, not {base_name}"]


def _plain(name: str) -> str:
    """The last component of a model's path or id, without what conversions add to it."""
    last = re.split(r"[/\\]", str(name).rstrip("/\\"))[-1].lower().removesuffix(".gguf")
    return re.sub(r"[-._](f32|f16|bf16|i?q\d+(_\w+)?|gguf|hf)$", "", last)


def _known_config(name: str) -> ModelConfig | None:
    """The config of a model that is at hand, without asking the hub; None if it is not."""
    directory = pathlib.Path(name)
    if not (directory / "config.json").is_file():
        if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
            return None
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            return None
        directory = pathlib.Path(cached).parent
    try:
        return from_huggingface(huggingface.read_config(directory))
    except InputError:
        return None


def tokenizers(
    base: PreTrainedTokenizerBase | None, tuned: PreTrainedTokenizerBase | None
) -> list[str]:
    """Notes on how two tokenizers differ: vocabulary, special tokens, cuts, chat template."""
    if base is None or tuned is None:
        missing = [name for name, t in (("base", base), ("tuned model", tuned)) if t is None]
        return [f"no tokenizer in the {' and the '.join(missing)}"]
    notes = []
    old, new = base.get_vocab(), tuned.get_vocab()
    if old != new:
        added, gone = len(new.keys() - old.keys()), len(old.keys() - new.keys())
        moved = sum(old[token] != new[token] for token in old.keys() & new.keys())
        notes.append(
            f"tokenizers differ: {len(old)} tokens in the base's, {len(new)} in the tuned model's "
            f"({added} added, {gone} gone, {moved} under another number)"
        )
    specials = sorted(
        name
        for name in base.special_tokens_map.keys() | tuned.special_tokens_map.keys()
        if base.special_tokens_map.get(name) != tuned.special_tokens_map.get(name)
    )
    for name in specials:
        pair = base.special_tokens_map.get(name), tuned.special_tokens_map.get(name)
        notes.append(
            f"special tokens differ: {name} is {pair[0]!r} in the base, {pair[1]!r} tuned"
        )
    if not notes and list(base(_SAMPLE)["input_ids"]) != list(tuned(_SAMPLE)["input_ids"]):
        notes.append("tokenizers have one vocabulary but cut a sample text differently")
    return notes + chat_templates(base.chat_template, tuned.chat_template)


def chat_templates(base: Any, tuned: Any) -> list[str]:
    """A note on how two chat templates differ; none where they are the same."""
    if base == tuned:
        return []
    which = "differs from the base's" if base else "is new: the base has none"
    if not tuned:
        which = "is missing: only the base has one"
    return [f"the tuned model's chat template {which}"]


def embeddings(pair: Pair, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """A note on how far tuning moved the embedding, which TuCo does not see; none if it did not.

    The relative Frobenius distance |E_FT - E_PT| / |E_PT| over the rows that both have, and the
    row that moved most, relative to itself. Rows of the base that are nothing beside its others
    (those of padding are often 0) are not asked for that.
    """
    tuned = pair.tuned.get("embed")
    if tuned is None:
        return []
    old, new = pair.base["embed"]["table"], tuned["table"]
    moved, size = fetch(_row_squares(old, new))
    if not moved.any():
        return []
    distance = np.sqrt(moved.sum() / size.sum())
    used = size > _EMPTY**2 * size.mean()
    rows = np.sqrt(np.divide(moved, size, out=np.zeros_like(moved), where=used))
    row = int(rows.argmax())
    token = f" ({tokenizer.convert_ids_to_tokens(row)!r})" if tokenizer is not None else ""
    return [
        f"embeddings moved by {distance:.2e} (relative Frobenius distance over {len(rows)} shared "
        f"rows), row {row}{token} most, by {rows[row]:.2e}; TuCo does not see this"
    ]


@jax.jit
def _row_squares(
    old: Float[Array, "V D"], new: Float[Array, "W D"]
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """Squared norms of each shared row of E_FT - E_PT and of E_PT.

    Compiled, so that nothing as large as a table is made; whole, so that none is gathered.
    """
    rows = min(len(old), len(new))
    a, b = (x[:rows].astype(jnp.float32) for x in (old, new))
    return jnp.square(b - a).sum(1), jnp.square(a).sum(1)
