"""A model, or a pair, from whatever a user names: one place that knows all the kinds."""

import dataclasses
import pathlib

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from common_jax.errors import InputError
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.models.pair import Notes, Pair
from tuco_jax.models.sharding import placement
from tuco_jax.weights import validate
from tuco_jax.weights.assemble import Placement
from tuco_jax.weights.gguf import model as gguf
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.model import Model
from tuco_jax.weights.orbax import store
from tuco_jax.weights.peft import read as peft

__all__ = ["load_model", "load_pair", "model_config", "tuned_config"]


def load_model(
    source: str,
    *,
    dtype: str = "float32",
    placement: Placement | None = None,
    tokenizer: bool = True,
) -> Model:
    """Read one model: a Hugging Face directory, a hub id, a .gguf file, or an orbax store.

    dtype: "float32", "bfloat16" or "float16". placement: where each parameter goes
    (`models/sharding.py`). Raises InputError, one line, where it is none of them or is spoilt.
    """
    source = str(source)
    if _is_gguf(source):
        return gguf.load(source, dtype=dtype, placement=placement, tokenizer=tokenizer)
    if store.is_store(source):
        return store.load(source, dtype=dtype, placement=placement, tokenizer=tokenizer)
    return huggingface.load(source, dtype=dtype, placement=placement, tokenizer=tokenizer)


def model_config(source: str) -> ModelConfig:
    """The config of what `load_model` would read, without its weights."""
    source = str(source)
    if _is_gguf(source):
        return gguf.read_config(source)
    if store.is_store(source):
        return store.read_config(source)
    return huggingface.model_config(huggingface.locate(source))


def load_pair(
    base: str, tuned: str, *, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[Pair, PreTrainedTokenizerBase]:
    """Read a pre-trained model and what tuning made of it.

    base: anything that `load_model` reads. tuned: likewise, or a PEFT adapter over `base`, by its
    directory or hub id. A store that holds a pair is given as both. mesh: where to spread the
    weights; they go straight to their shards.

    Returns the pair, whose `notes` say in what its halves differ beside their weights, and the
    tuned model's tokenizer: an adapter's own if it ships one, else the base's, with the adapter's
    chat_template.jinja if it ships that. Configs are compared before any weight is read:
    InputError where the two are no pair.
    """
    base, tuned = str(base), str(tuned)
    where = placement(mesh) if mesh is not None else None
    if store.is_store(tuned) and store.holds_pair(tuned):
        if pathlib.Path(base).absolute() != pathlib.Path(tuned).absolute():
            raise InputError(f"{tuned}: the store holds a whole pair; give it as the base, too")
        pair, words = store.load_pair(tuned, dtype=dtype, placement=where)
        return pair, _needed(words, tuned)
    if not _is_gguf(tuned) and not store.is_store(tuned):
        directory = huggingface.locate(tuned)
        if peft.is_adapter(directory):
            return _load_adapter(base, str(directory), dtype, where)
    notes = validate.configs(model_config(base), model_config(tuned), base, tuned)
    old = load_model(base, dtype=dtype, placement=where)
    new = load_model(tuned, dtype=dtype, placement=where)
    words = _needed(new.tokenizer or old.tokenizer, tuned)
    pair = Pair(old.params, new.params, {}, old.config, new.config)
    notes += validate.tokenizers(old.tokenizer, new.tokenizer)
    notes += validate.embeddings(pair, words)
    return dataclasses.replace(pair, notes=Notes(notes)), words


def _load_adapter(
    base: str, directory: str, dtype: str, where: Placement | None
) -> tuple[Pair, PreTrainedTokenizerBase]:
    config = model_config(base)
    notes = validate.adapter(directory, base, config)
    template = peft.read_chat_template(directory)
    old = load_model(base, dtype=dtype, placement=where)
    lora, overrides = peft.load(directory, old, dtype=dtype, placement=where)
    own = huggingface.read_tokenizer(directory)
    words = _needed(own or old.tokenizer, directory)
    pair = Pair(old.params, overrides, lora, old.config, tuned_config(old.config, overrides))
    notes += validate.configs(old.config, pair.tuned_config, base, directory)
    if own is not None:
        notes += validate.tokenizers(old.tokenizer, own)
    elif template is not None:
        notes += validate.chat_templates(words.chat_template, template)
        words.chat_template = template
    notes += validate.embeddings(pair, words)
    return dataclasses.replace(pair, notes=Notes(notes)), words


def tuned_config(config: ModelConfig, overrides: Params) -> ModelConfig:
    """The base's config as the parameters that an adapter replaced change it: vocabulary, head."""
    if "embed" in overrides:
        config = dataclasses.replace(config, vocab_size=overrides["embed"]["table"].shape[0])
    if "head" in overrides:
        rows = overrides["head"]["kernel"].shape[1]
        config = dataclasses.replace(config, vocab_size=rows, tied_head=False)
    return config


def _is_gguf(source: str) -> bool:
    return source.endswith(".gguf")


def _needed(tokenizer: PreTrainedTokenizerBase | None, source: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InputError(
            f"{source}: neither it nor its base has a tokenizer; copy the tokenizer's files there"
        )
    return tokenizer
