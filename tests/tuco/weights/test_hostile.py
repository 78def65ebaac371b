"""Broken and hostile files: a model, or a refusal of one line; little memory and little time.

Each kind of file is made whole, then spoilt in ways that hypothesis chooses, always the same.
"""

import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common_jax.errors import InputError
from tests.hostile import CHANGES, bounded, check_json, fuzzed, spoil
from tests.tuco.tiny import save_tiny, tiny_hf
from tests.tuco.weights.gguf import test_tokenizer as tokenizers
from tests.tuco.weights.gguf.writer import write
from tests.tuco.weights.peft import test_read as test_peft
from tuco_jax.weights.gguf.tokenizer import build_tokenizer
from tuco_jax.weights.load import load_model, load_pair
from tuco_jax.weights.orbax import store

TEXT = "Hello, world!  It's 3.14 o'clock.\n\t\u65e5\u672c\U0001f600 <s><|im_end|>"


def load(source):
    model = load_model(str(source))
    jax.block_until_ready(model.params)
    if model.tokenizer is not None:
        model.tokenizer(TEXT)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """Files with both kinds of tokenizer; and how long their headers are."""
    folder = tmp_path_factory.mktemp("gguf")
    hf, hf_config = tiny_hf("llama", vocab_size=1000, num_hidden_layers=1)
    fields = {
        "llama": tokenizers.sentencepiece_fields(),
        "gpt2": tokenizers.byte_level_fields("llama-bpe"),
    }
    for name, metadata in fields.items():
        write(folder / f"{name}.gguf", hf, hf_config, metadata=metadata)
        load(folder / f"{name}.gguf")
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gguf(kind, gguf, tmp_path):
    whole = (gguf / f"{kind}.gguf").read_bytes()
    header = whole.index(b"token_embd.weight") + 1500  # the tokens, and the table of tensors

    @fuzzed
    @given(CHANGES, st.sampled_from([300, header, None]))
    def check(changes, most):
        path = tmp_path / "m.gguf"
        path.write_bytes(spoil(whole, changes, most))
        with bounded():
            load(path)

    check()


ODD = [float("inf"), float("nan"), -1, 2**31, 0.5, True, "x", [], ["a"], [float("inf")], [-1, 0]]
FIELDS = [
    *("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id", "add_bos_token"),
    *("tokens", "scores", "merges", "token_type", "pre", "model"),
]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gguf_fields_of_a_tokenizer(kind, gguf, tmp_path):
    hf, hf_config = tiny_hf("llama", vocab_size=1000, num_hidden_layers=1)
    plain = (
        tokenizers.sentencepiece_fields()
        if kind == "llama"
        else tokenizers.byte_level_fields("smollm")
    )

    @fuzzed
    @given(st.sampled_from(FIELDS), st.sampled_from(ODD))
    def check(field, value):
        path = tmp_path / "m.gguf"
        try:
            write(path, hf, hf_config, metadata=plain | {f"tokenizer.ggml.{field}": value})
        except Exception:  # what the writer itself cannot write
            return
        with bounded():
            load(path)

    check()


PIECES = st.text(st.sampled_from("ab \u2581\u00e9\u65e5<>s0x41\u0120"), max_size=4)
PIECES |= st.sampled_from(["<unk>", "<s>", "<0x41>", "<0x0A>", "a", "b", "ab", "", " ", "\u2581"])


@settings(fuzzed, max_examples=200)
@given(
    tokens=st.lists(PIECES, max_size=12),
    merges=st.lists(PIECES | st.tuples(PIECES, PIECES).map(" ".join), max_size=8),
    token_type=st.lists(st.integers(0, 7), max_size=12),
    model=st.sampled_from(["gpt2", "llama"]),
    pre=st.sampled_from(["smollm", "qwen2", "llama-bpe", "default"]),
    unknown_token_id=st.integers(-1, 12),
    bos_token_id=st.integers(0, 12),
    add_bos_token=st.booleans(),
    add_space_prefix=st.booleans(),
)
def test_vocabularies_of_any_kind(**fields):
    """Those that are taken also cut any text; the library panics with some."""
    fields["scores"] = [-float(i) for i in range(len(fields["tokens"]))]
    metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    try:
        tokenizer = build_tokenizer(metadata | {"general.architecture": "llama"})
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert tokenizer is not None
    for text in ("", "a", "ab ba\u65e5 <s> A\n", TEXT):
        tokenizer.decode(tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    for family in ("llama", "qwen2", "gemma3_text", "gpt2"):
        save_tiny(folder / family, family)
        load(folder / family)
    test_peft.write(folder / "pair", "llama", dict(target_modules=["q_proj"]))
    shutil.copy(folder / "llama/tokenizer.json", folder / "pair/base")
    return folder


def copy(source, target):
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def test_safetensors(huggingface, tmp_path):
    whole = (huggingface / "llama/model.safetensors").read_bytes()
    copy(huggingface / "llama", tmp_path / "m")

    @fuzzed
    @given(CHANGES, st.sampled_from([16, 4000, None]))
    def check(changes, most):
        (tmp_path / "m/model.safetensors").write_bytes(spoil(whole, changes, most))
        with bounded():
            load(tmp_path / "m")

    check()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2"])
def test_config_json(family, huggingface, tmp_path):
    copy(huggingface / family, tmp_path / "m")
    check_json(tmp_path / "m/config.json", lambda: load(tmp_path / "m"))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_json(name, huggingface, tmp_path):
    copy(huggingface / "llama", tmp_path / "m")
    check_json(tmp_path / "m" / name, lambda: load(tmp_path / "m"))


def test_adapter_config(huggingface, tmp_path):
    copy(huggingface / "pair", tmp_path / "m")
    names = str(tmp_path / "m/base"), str(tmp_path / "m/adapter")
    load_pair(*names)
    check_json(tmp_path / "m/adapter/adapter_config.json", lambda: load_pair(*names))


@pytest.fixture(scope="module")
def stored(huggingface, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    store.save(folder / "store", load_model(str(huggingface / "gemma3_text")))
    return folder / "store"


def test_store_json(stored, tmp_path):
    copy(stored, tmp_path / "m")
    check_json(tmp_path / "m/store.json", lambda: load(tmp_path / "m"))


def test_orbax_files(stored, tmp_path):
    files = sorted(path.relative_to(stored) for path in stored.rglob("*") if path.is_file())
    files = [path for path in files if path.parts[0] == "params"]

    @fuzzed
    @given(st.sampled_from(files), CHANGES, st.sampled_from([200, None]))
    def check(name, changes, most):
        copy(stored, tmp_path / "m")
        (tmp_path / "m" / name).write_bytes(spoil((stored / name).read_bytes(), changes, most))
        with bounded():
            load(tmp_path / "m")

    check()


def test_adapter_weights(huggingface, tmp_path):
    copy(huggingface / "pair", tmp_path / "m")
    names = str(tmp_path / "m/base"), str(tmp_path / "m/adapter")
    path = tmp_path / "m/adapter/adapter_model.safetensors"
    whole = path.read_bytes()

    @fuzzed
    @given(CHANGES, st.sampled_from([16, None]))
    def check(changes, most):
        path.write_bytes(spoil(whole, changes, most))
        with bounded():
            load_pair(*names)

    check()


def test_an_index_of_shards(tmp_path):
    save_tiny(tmp_path / "m", "llama", max_shard_size="20KB", tokenizer=False)
    path = tmp_path / "m/model.safetensors.index.json"
    check_json(path, lambda: load(tmp_path / "m"))
    whole = path.read_bytes()

    @fuzzed
    @given(CHANGES)
    def check(changes):
        path.write_bytes(spoil(whole, changes))
        with bounded():
            load(tmp_path / "m")

    check()


def test_an_index_that_leads_out_of_its_directory(tmp_path):
    save_tiny(tmp_path / "m", "llama", max_shard_size="20KB", tokenizer=False)
    path = tmp_path / "m/model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("../x.safetensors", "/etc/passwd"):
        index["weight_map"][next(iter(index["weight_map"]))] = name
        path.write_text(json.dumps(index))
        with pytest.raises(InputError, match="a file outside the directory"):
            load_model(str(tmp_path / "m"))


def test_tensors_of_a_gguf_that_share_bytes(gguf, tmp_path):
    """A small file could otherwise fill any memory."""
    whole = (gguf / "llama.gguf").read_bytes()
    at = whole.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8 + 4
    assert int.from_bytes(whole[at : at + 8], "little") > 0  # its offset
    (tmp_path / "m.gguf").write_bytes(whole[:at] + (0).to_bytes(8, "little") + whole[at + 8 :])
    with pytest.raises(InputError, match="share bytes; the file is corrupt"):
        load(tmp_path / "m.gguf")


def test_a_store_of_arrays_that_its_files_cannot_hold(tmp_path):
    """Missing chunks read as zeros: 10 kB would give any number of them."""
    from tests.tuco import random_models as rm
    from tuco_jax.weights import arrays
    from tuco_jax.weights.model import Model

    config = rm.config(vocab_size=1_000_000, width=16, head_dim=8)
    params = jax.tree.map(np.zeros_like, rm.params(config, 0))
    store.save(tmp_path / "m", Model(config, params, None, "zeros"))
    assert arrays.Stored(tmp_path / "m/params").shapes["embed/table"] == (1_000_000, 16)
    with pytest.raises(InputError, match="bytes cannot hold the .* that it declares"):
        load(tmp_path / "m")
