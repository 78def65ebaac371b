"""Load a model, or a pair, of any kind: the one place that knows all kinds."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from common_jax.errors import InputError
from tuco_jax.models.config import ModelConfig, Precision
from tuco_jax.models.decoder import Params
from tuco_jax.models.pair import Notes, Pair
from tuco_jax.models.sharding import placement
from tuco_jax.weights import in_memory, kinship, validate
from tuco_jax.weights.assemble import Placement, held_dtype
from tuco_jax.weights.gguf import model as gguf
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.model import Model, OpenModel
from tuco_jax.weights.options import AskedPrecision
from tuco_jax.weights.orbax import store
from tuco_jax.weights.peft import read as peft
from tuco_jax.weights.peft.adapter import Adapter, Found
from tuco_jax.weights.peft.config import choose, is_adapter
from tuco_jax.weights.precision import Wanted

__all__ = [
    "OpenPair",
    "load_model",
    "load_pair",
    "model_config",
    "needed_tokenizer",
    "open_model",
    "open_pair",
    "stated_types",
    "tuned_config",
]


Source = Any  # a path or hub id (str, PathLike), or a model in memory (`weights/in_memory.py`)


def load_model(
    source: Source,
    *,
    dtype: str = "float32",
    placement: Placement | None = None,
    tokenizer: bool = True,
) -> Model:
    """Read one model: a Hugging Face directory, a hub id, a .gguf file, or an orbax store.

    source: or a model in memory, as `load_pair` takes it. dtype: "float32", "bfloat16", "float16",
    or "int8" (`weights/int8.py`). placement: where each parameter goes (`models/sharding.py`).
    Raises InputError where it is none of these, or corrupt.
    """
    return open_model(source, dtype=dtype, tokenizer=tokenizer).load(placement)


def open_model(source: Source, *, dtype: str = "float32", tokenizer: bool = True) -> OpenModel:
    """`load_model` before it reads the weights, to be read whole or a layer at a time."""
    if not _is_path(source):
        return in_memory.open_model(source, dtype=dtype)
    source = str(source)
    if _is_gguf(source):
        return gguf.open_model(source, dtype=dtype, tokenizer=tokenizer)
    if store.is_store(source):
        return store.open_model(source, dtype=dtype, tokenizer=tokenizer)
    return huggingface.open_model(source, dtype=dtype, tokenizer=tokenizer)


def model_config(source: Source) -> ModelConfig:
    """The config of what `load_model` would read, without its weights."""
    if not _is_path(source):
        return in_memory.model_config(source)
    source = str(source)
    if _is_gguf(source):
        return gguf.read_config(source)
    if store.is_store(source):
        return store.read_config(source)
    return huggingface.model_config(huggingface.locate(source))


def stated_types(source: str, dtype: str) -> frozenset[str]:
    """The types that a model's matrices are stored in, such as "bfloat16".

    dtype: to read them in, as `load_model` takes it. Of a pair's store its base's; of a Hugging
    Face folder what config.json says, float32 where it says nothing: weights need not be there.
    """
    if store.is_store(source) and store.holds_pair(source):
        return frozenset().union(*store.OpenPair(source, dtype=dtype).stored.values())
    if _is_gguf(source) or store.is_store(source):
        return open_model(source, dtype=dtype, tokenizer=False).weights.stored
    config = huggingface.read_config(huggingface.locate(source))
    stated = config.get_text_config().dtype or config.dtype or "float32"
    return frozenset({str(stated).removeprefix("torch.")})


def load_pair(
    base: Source,
    tuned: Source,
    *,
    dtype: str = "float32",
    precision: AskedPrecision = "auto",
    mesh: Mesh | None = None,
    adapter: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Pair, PreTrainedTokenizerBase]:
    """Read a pre-trained model and its tuned version.

    base: anything that `load_model` reads: a Hugging Face directory, a hub id, a .gguf file, a
    store; or a model in memory: one of transformers (of a PeftModel: its base), or (its state
    dict, its config). tuned: likewise, or an adapter over `base`: a PEFT folder, by its path or
    hub id, or a PeftModel. A store that holds a pair is given as both. dtype, precision: what
    weights are held in, and how products take activations (`weights/options.py`, PairOptions);
    the pair's configs say which precision "auto" chose. mesh: where to spread the
    weights; they go straight to their shards. adapter: the name of one of several adapters that
    `tuned` holds. tokenizer: the tuned model's, where another than its own is wanted, or where
    both models are in memory, which bring none.

    Returns the pair, whose `notes` say how its models differ besides their weights, and the
    tuned model's tokenizer: an adapter's own if it ships one, else the base's, with the adapter's
    chat_template.jinja if it ships that. Configs are compared before any weight is read:
    InputError where the two are no pair.
    """
    how: Any = dict(dtype=dtype, precision=precision, adapter=adapter)
    opened = open_pair(base, tuned, spread=mesh is not None and mesh.size > 1, **how)
    pair, found = opened.load(placement(mesh) if mesh else None)
    return pair, needed_tokenizer(tokenizer or found, tuned)


class OpenPair(Protocol):
    """A pair whose configs are compared, and whose weights are yet to be read."""

    @property
    def stored(self) -> Mapping[str, frozenset[str]]:
        """The types that layers' matrices are stored in, of each model by its name."""
        ...

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


def open_pair(
    base: Source,
    tuned: Source,
    *,
    dtype: str = "float32",
    precision: AskedPrecision = "auto",
    adapter: str | None = None,
    spread: bool = False,
) -> OpenPair:
    """`load_pair` before it reads the weights, to be read whole or a layer at a time.

    spread: they will go over a mesh, on which "auto" may stand for another precision.
    """
    wanted = Wanted(dtype, precision, spread)
    return _Settled(_open(base, tuned, wanted.held, adapter), wanted)


class _Settled:
    """A pair whose configs say how its products take activations."""

    def __init__(self, opened: OpenPair, wanted: Wanted) -> None:
        self._opened, self.stored = opened, opened.stored
        self._precision: Precision = wanted.settled(opened.stored)

    def load(
        self, placement: Placement | None = None, *, layers: bool = True
    ) -> tuple[Pair, PreTrainedTokenizerBase | None]:
        pair, tokenizer = self._opened.load(placement, layers=layers)
        return pair.at(self._precision), tokenizer

    def layer(self, index: int) -> tuple[Params, Params, Params]:
        return self._opened.layer(index)


def _open(base: Source, tuned: Source, dtype: str, adapter: str | None) -> OpenPair:
    if not _is_path(tuned):
        found = in_memory.find_adapter(tuned, adapter)
    else:
        tuned = str(tuned)
        if store.is_store(tuned) and store.holds_pair(tuned) and adapter is None:
            if not _is_path(base) or _absolute(base) != _absolute(tuned):
                raise InputError(
                    f"{tuned}: the store holds a whole pair; give it as the base, too"
                )
            return store.OpenPair(tuned, dtype=dtype)
        found = None
        if not _is_gguf(tuned) and not store.is_store(tuned):
            directory = huggingface.locate(tuned)
            if is_adapter(directory):
                inside = choose(directory, adapter).relative_to(directory)
                found = peft.find(huggingface.locate(tuned, str(inside)), adapter)
    if found is not None:
        return _WithAdapter(base, found, dtype)
    if adapter is not None:
        raise InputError(f"{_named(tuned)}: is a whole model; --adapter names one of an adapter's")
    return _TwoModels(base, tuned, dtype)


class _TwoModels:
    """Two whole models."""

    def __init__(self, base: Source, tuned: Source, dtype: str) -> None:
        names = _named(base), _named(tuned)
        self._notes = validate.configs(model_config(base), model_config(tuned), *names)
        self._base, self._tuned = (open_model(m, dtype=dtype) for m in (base, tuned))
        self._on_disk = _is_path(base) and _is_path(tuned)  # both could have a tokenizer
        opened = self._base, self._tuned
        self.stored = {n: m.weights.stored for n, m in zip(names, opened, strict=True)}

    def load(
        self, placement: Placement | None = None, *, layers: bool = True
    ) -> tuple[Pair, PreTrainedTokenizerBase | None]:
        old, new = (m.load(placement, layers=layers) for m in (self._base, self._tuned))
        tokenizer = new.tokenizer or old.tokenizer
        pair = Pair(old.params, new.params, {}, old.config, new.config)
        notes = self._notes
        if self._on_disk:
            notes = notes + validate.tokenizers(old.tokenizer, new.tokenizer)
        notes = notes + validate.embeddings(pair, tokenizer)

        def compared(index: int) -> kinship.Matrices:
            if layers:
                return kinship.matrices(old.params["layers"], new.params["layers"])
            return kinship.matrices(*self.layer(index)[:2])

        notes += kinship.notes(compared, new.config.depth, stacked=layers)
        return dataclasses.replace(pair, notes=Notes(notes)), tokenizer

    def layer(self, index: int) -> tuple[Params, Params, Params]:
        return self._base.weights.layer(index), self._tuned.weights.layer(index), {}


class _WithAdapter:
    """A model and a PEFT adapter over it."""

    def __init__(self, base: Source, found: Found, dtype: str) -> None:
        config = model_config(base)
        self._found, self._name = found, _named(base)
        self._own_dtype = held_dtype(dtype, ())  # scaled, factors are not what was stored
        self._notes = validate.adapter(found, self._name, config)
        self._adapter = Adapter(found, config)
        self._template = None if found.folder is None else peft.read_chat_template(found.folder)
        self._base = open_model(base, dtype=dtype)
        self.stored = {self._name: self._base.weights.stored}

    def load(
        self, placement: Placement | None = None, *, layers: bool = True
    ) -> tuple[Pair, PreTrainedTokenizerBase | None]:
        old = self._base.load(placement, layers=layers)
        lora, overrides = self._adapter.load(
            old.params, dtype=self._own_dtype, placement=placement, layers=layers
        )
        folder = self._found.folder
        own = None if folder is None else huggingface.read_tokenizer(folder)
        tokenizer = own or old.tokenizer
        config = tuned_config(old.config, overrides)
        pair = Pair(old.params, overrides, lora, old.config, config)
        notes = self._notes + validate.configs(old.config, config, self._name, self._found.name)
        if own is not None:
            notes += validate.tokenizers(old.tokenizer, own)
        elif tokenizer is not None and self._template is not None:
            notes += validate.chat_templates(tokenizer.chat_template, self._template)
            tokenizer.chat_template = self._template
        notes += validate.embeddings(pair, tokenizer)
        return dataclasses.replace(pair, notes=Notes(notes)), tokenizer

    def layer(self, index: int) -> tuple[Params, Params, Params]:
        base = self._base.weights.layer(index)
        lora, overrides = self._adapter.layer(base, index, dtype=self._own_dtype)
        return base, overrides, lora


def tuned_config(config: ModelConfig, overrides: Params) -> ModelConfig:
    """The base's config as the parameters that an adapter replaced change it: vocabulary, head."""
    if "embed" in overrides:
        config = dataclasses.replace(config, vocab_size=overrides["embed"]["table"].shape[0])
    if "head" in overrides:
        rows = overrides["head"]["kernel"].shape[1]
        config = dataclasses.replace(config, vocab_size=rows, tied_head=False)
    return config


def _is_path(source: Source) -> bool:
    return isinstance(source, str | os.PathLike)


def _absolute(source: str | os.PathLike[str]) -> pathlib.Path:
    return pathlib.Path(source).absolute()


def _named(source: Source) -> str:
    """A model as messages and notes name it."""
    return str(source) if _is_path(source) else "the model in memory"


def _is_gguf(source: str) -> bool:
    return source.endswith(".gguf")


def needed_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, source: Source
) -> PreTrainedTokenizerBase:
    """The tokenizer; InputError naming the tuned model, `source`, where there is none."""
    if tokenizer is None and not _is_path(source):
        raise InputError("a model in memory brings no tokenizer; give one with tokenizer=")
    if tokenizer is None:
        raise InputError(
            f"{source}: neither it nor its base has a tokenizer; copy the tokenizer's files there"
        )
    return tokenizer
