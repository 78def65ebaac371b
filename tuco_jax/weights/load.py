"""Load a model, or a pair, of any kind: the one place that knows all kinds."""

import dataclasses
import pathlib
from typing import Protocol

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
from tuco_jax.weights.model import Model, OpenModel
from tuco_jax.weights.orbax import store
from tuco_jax.weights.peft import read as peft

__all__ = [
    "OpenPair",
    "load_model",
    "load_pair",
    "model_config",
    "needed_tokenizer",
    "open_model",
    "open_pair",
    "tuned_config",
]


def load_model(
    source: str,
    *,
    dtype: str = "float32",
    placement: Placement | None = None,
    tokenizer: bool = True,
) -> Model:
    """Read one model: a Hugging Face directory, a hub id, a .gguf file, or an orbax store.

    dtype: "float32", "bfloat16" or "float16". placement: where each parameter goes
    (`models/sharding.py`). Raises InputError where it is none of these, or corrupt.
    """
    return open_model(source, dtype=dtype, tokenizer=tokenizer).load(placement)


def open_model(source: str, *, dtype: str = "float32", tokenizer: bool = True) -> OpenModel:
    """`load_model` before it reads the weights, to be read whole or a layer at a time."""
    source = str(source)
    if _is_gguf(source):
        return gguf.open_model(source, dtype=dtype, tokenizer=tokenizer)
    if store.is_store(source):
        return store.open_model(source, dtype=dtype, tokenizer=tokenizer)
    return huggingface.open_model(source, dtype=dtype, tokenizer=tokenizer)


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
    """Read a pre-trained model and its tuned version.

    base: anything that `load_model` reads. tuned: likewise, or a PEFT adapter over `base`, by its
    directory or hub id. A store that holds a pair is given as both. mesh: where to spread the
    weights; they go straight to their shards.

    Returns the pair, whose `notes` say how its models differ besides their weights, and the
    tuned model's tokenizer: an adapter's own if it ships one, else the base's, with the adapter's
    chat_template.jinja if it ships that. Configs are compared before any weight is read:
    InputError where the two are no pair.
    """
    pair, tokenizer = open_pair(base, tuned, dtype=dtype).load(placement(mesh) if mesh else None)
    return pair, needed_tokenizer(tokenizer, tuned)


class OpenPair(Protocol):
    """A pair whose configs are compared, and whose weights are yet to be read."""

    def load(
        self, placement: Placement | None = None, *, layers: bool = True
    ) -> tuple[Pair, PreTrainedTokenizerBase | None]:
        """The pair with its notes, or what of it stands outside the layers; the tokenizer."""
        ...

    def layer(self, index: int) -> tuple[Params, Params, Params]:
        """One layer of `base`, `tuned` and `lora`: what the whole pair has at that index.

        Arrays of the host, read anew each time; leaves have no axis of layers.
        """
        ...


def open_pair(base: str, tuned: str, *, dtype: str = "float32") -> OpenPair:
    """`load_pair` before it reads the weights, to be read whole or a layer at a time."""
    base, tuned = str(base), str(tuned)
    if store.is_store(tuned) and store.holds_pair(tuned):
        if pathlib.Path(base).absolute() != pathlib.Path(tuned).absolute():
            raise InputError(f"{tuned}: the store holds a whole pair; give it as the base, too")
        return store.OpenPair(tuned, dtype=dtype)
    if not _is_gguf(tuned) and not store.is_store(tuned):
        directory = huggingface.locate(tuned)
        if peft.is_adapter(directory):
            return _WithAdapter(base, str(directory), dtype)
    return _TwoModels(base, tuned, dtype)


class _TwoModels:
    """Two whole models."""

    def __init__(self, base: str, tuned: str, dtype: str) -> None:
        self._notes = validate.configs(model_config(base), model_config(tuned), base, tuned)
        self._base, self._tuned = (open_model(m, dtype=dtype) for m in (base, tuned))

    def load(
        self, placement: Placement | None = None, *, layers: bool = True
    ) -> tuple[Pair, PreTrainedTokenizerBase | None]:
        old, new = (m.load(placement, layers=layers) for m in (self._base, self._tuned))
        tokenizer = new.tokenizer or old.tokenizer
        pair = Pair(old.params, new.params, {}, old.config, new.config)
        notes = self._notes + validate.tokenizers(old.tokenizer, new.tokenizer)
        notes += validate.embeddings(pair, tokenizer)
        return dataclasses.replace(pair, notes=Notes(notes)), tokenizer

    def layer(self, index: int) -> tuple[Params, Params, Params]:
        return self._base.weights.layer(index), self._tuned.weights.layer(index), {}


class _WithAdapter:
    """A model and a PEFT adapter over it."""

    def __init__(self, base: str, directory: str, dtype: str) -> None:
        config = model_config(base)
        self._notes = validate.adapter(directory, base, config)
        self._template = peft.read_chat_template(directory)
        self._base = open_model(base, dtype=dtype)
        self._adapter = peft.Adapter(directory, config)
        self._name, self._directory, self._dtype = base, directory, dtype

    def load(
        self, placement: Placement | None = None, *, layers: bool = True
    ) -> tuple[Pair, PreTrainedTokenizerBase | None]:
        old = self._base.load(placement, layers=layers)
        lora, overrides = self._adapter.load(
            old.params, dtype=self._dtype, placement=placement, layers=layers
        )
        own = huggingface.read_tokenizer(self._directory)
        tokenizer = own or old.tokenizer
        config = tuned_config(old.config, overrides)
        pair = Pair(old.params, overrides, lora, old.config, config)
        notes = self._notes + validate.configs(old.config, config, self._name, self._directory)
        if own is not None:
            notes += validate.tokenizers(old.tokenizer, own)
        elif tokenizer is not None and self._template is not None:
            notes += validate.chat_templates(tokenizer.chat_template, self._template)
            tokenizer.chat_template = self._template
        notes += validate.embeddings(pair, tokenizer)
        return dataclasses.replace(pair, notes=Notes(notes)), tokenizer

    def layer(self, index: int) -> tuple[Params, Params, Params]:
        base = self._base.weights.layer(index)
        lora, overrides = self._adapter.layer(base, index, dtype=self._dtype)
        return base, overrides, lora


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


def needed_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, source: str
) -> PreTrainedTokenizerBase:
    """The tokenizer; InputError naming the tuned model, `source`, where there is none."""
    if tokenizer is None:
        raise InputError(
            f"{source}: neither it nor its base has a tokenizer; copy the tokenizer's files there"
        )
    return tokenizer
