"""Reading and writing Hugging Face checkpoints: safetensors, config.json and tokenizer.

`load` takes a directory or a hub id, `export` writes a directory that transformers loads. Both go
by the key tables of `weights/keys.py`. No code of a checkpoint is ever run: pickles are refused
and `trust_remote_code` is off.
"""

import copy
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, StrictDataclassError
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from common_jax.errors import InputError
from common_jax.io.files import cannot_write, is_full, writing
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.models.families import check_supported, from_huggingface
from tuco_jax.weights.assemble import Checkpoint, Placement
from tuco_jax.weights.experts import one_by_one
from tuco_jax.weights.hf.safetensors_files import SafetensorsFile, SafetensorsTensors
from tuco_jax.weights.keys import FAMILIES
from tuco_jax.weights.model import Model, OpenModel
from tuco_jax.weights.names import Renamed
from tuco_jax.weights.options import check_source
from tuco_jax.weights.rust import rust_errors

__all__ = [
    "export",
    "load",
    "locate",
    "model_config",
    "open_model",
    "read_config",
    "read_tokenizer",
]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_TOKENIZER_PATTERNS = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
]
_TOKENIZER_PATTERNS += ["vocab.json", "merges.txt"]
_DOWNLOAD = [
    "config.json",
    "adapter_config.json",
    "*/adapter_config.json",  # of adapters, or of checkpoints, whose weights stay there
    "generation_config.json",
    "model*.safetensors",
    _INDEX,
    *_TOKENIZER_PATTERNS,
]
_Flat = dict[str, Any]  # path to array
_MALFORMED = (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError)
_MALFORMED += (RecursionError,)  # brackets in brackets
# No model is larger; transformers makes lists of as many layers as a config says.
_MOST = {"num_hidden_layers": 10_000, "n_layer": 10_000, "head_dim": 65_536}
_MOST |= {"num_experts": 2048, "num_local_experts": 2048} | dict.fromkeys(
    ("hidden_size", "n_embd", "intermediate_size", "n_inner", "num_attention_heads", "n_head"),
    2**24,
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def load(
    source: str,
    *,
    dtype: str = "float32",
    placement: Placement | None = None,
    tokenizer: bool = True,
) -> Model:
    """Read a model from a directory or, by its hub id, from the hub's cache or the hub.

    dtype: of the parameters, "float32", "bfloat16" or "float16". placement: where each parameter
    goes (`models/sharding.py`). tokenizer: read it, too, if there is one.

    Raises InputError, one line that names file and tensor or field, for: an unknown source or
    family; pickled, truncated or corrupt files; a tensor that is missing, unknown, doubled,
    misshaped or not finite.
    """
    return open_model(source, dtype=dtype, tokenizer=tokenizer).load(placement)


def open_model(source: str, *, dtype: str = "float32", tokenizer: bool = True) -> OpenModel:
    """`load` before it reads the weights, their names checked."""
    directory = locate(source)
    hf_config = read_config(directory)
    config = _mapped(directory, hf_config)
    own_tokenizer = read_tokenizer(directory) if tokenizer else None
    family = FAMILIES[config.family]
    stored = SafetensorsTensors(str(directory), _files(directory))
    tensors = Renamed(one_by_one(stored, config), config, family)
    weights = Checkpoint(config, tensors, family.table(), dtype=dtype)
    return OpenModel(config, weights, own_tokenizer, source, hf_config)


def locate(source: str, adapter: str | None = None) -> pathlib.Path:
    """The directory of a checkpoint: `source` itself, or the hub's snapshot of that id.

    adapter: the folder below it of one adapter, "." for its own, whose weights are wanted, too.
    """
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix in _PICKLES:
        raise _pickled(path)
    if path.exists():
        raise InputError(f"{source}: is a file; give the directory that holds config.json")
    check_source(source)
    patterns = list(_DOWNLOAD)
    if adapter is not None:
        inside = "" if adapter == "." else f"{adapter}/"
        patterns += [
            f"{inside}{name}" for name in ("adapter_model.safetensors", *_TOKENIZER_PATTERNS)
        ]
    try:
        return pathlib.Path(snapshot_download(source, allow_patterns=patterns))
    except GatedRepoError:
        reason = "the hub asks for access to it: accept its licence there, then `hf auth login`"
    except RepositoryNotFoundError:
        reason = "the hub has no such model (a private one needs `hf auth login`)"
    except (OSError, ValueError) as error:
        if is_full(error):
            raise cannot_write(pathlib.Path(constants.HF_HUB_CACHE), error) from error
        reason = "the hub cannot be reached and its cache holds no copy; give a directory"
    raise InputError(f"{source}: no such directory, and {reason}")


def read_config(directory: str | pathlib.Path) -> PreTrainedConfig:
    """A checkpoint's config.json as transformers reads it."""
    path = pathlib.Path(directory) / "config.json"
    if not path.is_file():
        mend = "is this a model's directory?"
        if (path.parent / "adapter_config.json").is_file():
            mend = "the directory holds a PEFT adapter, which needs its base model"
        raise InputError(f"{path}: no such file; {mend}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        if "model_type" not in fields:
            raise ValueError("no field model_type")
        check_supported(fields["model_type"])  # before transformers asks to run the model's code
        for part in (fields, fields.get("text_config")):
            _check_sizes(part if isinstance(part, dict) else {})
        return AutoConfig.from_pretrained(str(path.parent), trust_remote_code=False)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (*_MALFORMED, StrictDataclassError) as error:
        raise InputError(f"{path}: {_one_line(error)}; mend the field") from None


def _check_sizes(fields: Mapping[str, Any]) -> None:
    for field, most in _MOST.items():
        value = fields.get(field)
        if isinstance(value, int | float) and not value <= most:
            raise InputError(f"{field} is {value}, more than any model has; mend the field")


def model_config(directory: pathlib.Path) -> ModelConfig:
    """A checkpoint's config.json as a `ModelConfig`."""
    return _mapped(directory, read_config(directory))


def _mapped(directory: pathlib.Path, hf_config: PreTrainedConfig) -> ModelConfig:
    try:
        return from_huggingface(hf_config)
    except InputError as error:
        raise InputError(f"{directory / 'config.json'}: {error}") from None


def read_tokenizer(directory: str | pathlib.Path) -> PreTrainedTokenizerBase | None:
    """A checkpoint's tokenizer, with its chat template; None where it has no tokenizer files."""
    directory = pathlib.Path(directory)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        return None
    with rust_errors(f"{directory}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        tokenizer("a", verbose=False)  # settings of a wrong type show when it is used
        return tokenizer


def export(
    directory: str | pathlib.Path,
    config: ModelConfig,
    params: Params,
    tokenizer: PreTrainedTokenizerBase | None,
    hf_config: PreTrainedConfig,
    *,
    ends: Sequence[int] = (),
    max_shard_bytes: int = 2_000_000_000,
) -> None:
    """Write a new directory that transformers loads: safetensors, config.json, tokenizer.

    hf_config: the config that `config` was mapped from. ends: tokens that end an answer, for
    generation_config.json, where they are known. The host holds one shard at a time, and
    the directory appears when it is complete. Raises InputError if it exists and is not empty.
    """
    directory = pathlib.Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: exists and is not empty; name a new directory")
    text = copy.deepcopy(hf_config.get_text_config())
    if (
        hf_config.model_type == "gemma3"
    ):  # what the whole model says goes before what its text does
        text.architectures = ["Gemma3ForCausalLM"]
        text.tie_word_embeddings, text.final_logit_softcapping = config.tied_head, None
    if from_huggingface(text) != config:
        raise ValueError("hf_config describes another model than config does")
    flat: _Flat = flatten_dict(params, sep="/")
    if any(x.dtype == np.int8 for x in flat.values()):
        raise InputError(f"{directory}: int8 weights are no others' format; load another dtype")
    text.dtype = str(flat["embed/table"].dtype)
    with writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix=".export-", dir=directory.parent))
    try:
        with writing(directory):
            _write_weights(scratch, config, flat, max_shard_bytes)
            text.save_pretrained(str(scratch))
            if tokenizer is not None:
                tokenizer.save_pretrained(str(scratch))
            if ends:
                names = ("bos_token_id", "pad_token_id")
                known = {name: getattr(text, name, None) for name in names}
                stops = json.dumps(known | {"eos_token_id": list(ends)}, indent=2) + "\n"
                (scratch / "generation_config.json").write_text(stops, "utf-8")
            scratch.chmod(0o755)
            scratch.replace(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _files(directory: pathlib.Path) -> list[SafetensorsFile]:
    """The checkpoint's safetensors: the single file, or all that the index names."""
    if (directory / _WEIGHTS).is_file():
        return [SafetensorsFile(directory / _WEIGHTS)]
    index = directory / _INDEX
    if not index.is_file():
        for path in sorted(directory.iterdir()):
            if path.suffix in _PICKLES:
                raise _pickled(path)
        # Pickles are never downloaded, so what a hub's snapshot lacks may be there as such.
        raise InputError(
            f"{directory}: holds neither {_WEIGHTS} nor {_INDEX}; where a model comes as pickled "
            "weights only, convert it with transformers' save_pretrained where torch is installed"
        )
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(map(str, weight_map.values())))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{index}: not an index of shards ({_one_line(error)})") from None
    for name in names:
        if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
            raise InputError(f"{index}: names {name}, a file outside the directory")
        if not (directory / name).is_file():
            raise InputError(f"{directory / name}: no such file, though {_INDEX} names it")
    shards = {name: SafetensorsFile(directory / name) for name in names}
    for tensor, name in weight_map.items():
        if tensor not in shards[name].tensors:
            raise InputError(
                f"{directory / name}: tensor {tensor} is missing, though {_INDEX} places it there"
            )
    return list(shards.values())


def _pickled(path: pathlib.Path) -> InputError:
    return InputError(
        f"{path}: pickled weights can run code when read, so they are refused; where torch is "
        'installed, convert them: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{path.parent}').save_pretrained('{path.parent}-safetensors')\""
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _stored_tensors(config: ModelConfig, flat: _Flat) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the checkpoint, made from the parameters when asked for."""
    for row in FAMILIES[config.family].rows:
        if row.paths[0] not in flat:
            continue
        for name, at in row.names(config):
            parts = [np.asarray(flat[path][at] if at else flat[path]) for path in row.paths]
            yield name, row.layout.join(parts, config)


def _write_weights(
    directory: pathlib.Path,
    config: ModelConfig,
    flat: _Flat,
    max_shard_bytes: int,
) -> None:
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        nonlocal held
        save_file(held, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held = {}

    for name, value in _stored_tensors(config, flat):
        if held and sum(v.nbytes for v in held.values()) + value.nbytes > max_shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(value)
        total += value.nbytes
    flush()
    weight_map = {}
    for i, names in enumerate(shards):
        file = _WEIGHTS
        if len(shards) > 1:
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{i}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
