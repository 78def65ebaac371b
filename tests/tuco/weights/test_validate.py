"""What is no pair, and what is only worth a note."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco import random_models as rm
from tests.tuco.tiny import save_tiny, tiny_hf, tiny_tokenizer
from tests.tuco.weights.gguf import writer as gguf_writer
from tests.tuco.weights.peft import test_read as test_peft
from tuco_jax.models.config import ModelConfig
from tuco_jax.weights import validate
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.load import model_config
from tuco_jax.weights.peft import read as peft
from tuco_jax.weights.peft.adapter import Adapter

BASE = rm.config()


@pytest.mark.parametrize(
    "change",
    [
        {"family": "qwen2"},
        {"width": 48},
        {"depth": 2, "rope_index": (0, 1), "windows": (0, 5)},
        {"heads": 2},
        {"kv_heads": 4},
        {"head_dim": 16},
        {"mlp_width": 41},
        {"qkv_bias": False},
        {"norm": "layer"},
        {"qk_norm": "head"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_families_and_shapes_are_fatal(change):
    field = next(iter(change))
    old, new = getattr(BASE, field), change[field]
    with pytest.raises(
        InputError, match=rf"^b/tuned: {field} is {new}, but {old} in a/base; "
    ) as caught:
        validate.configs(BASE, dataclasses.replace(BASE, **change), "a/base", "b/tuned")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ropes": (rm.rope(8), rm.rope(8, 9e5))}, "RoPE base differs: 10000, 500 in the"),
        (
            {"ropes": (dataclasses.replace(rm.rope(8), scale=1.2), rm.rope(8, 500.0))},
            "RoPE scaling differs, in scale",
        ),
        (
            {"windows": (0, 7, 7)},
            "windows differs: 0 in 2 layers and 5 in 1 layers in the base, 0 in 1 layers and 7 in",
        ),
        ({"windows": (0, 0, 0)}, "0 in every layer tuned"),
        ({"norm_eps": 1e-3}, "norm_eps differs: 1e-06 in the base, 0.001 tuned"),
        ({"vocab_size": 99}, "vocab_size differs: 61 in the base, 99 tuned"),
        ({"tied_head": True}, "tied_head differs: False in the base, True tuned"),
    ],
)  # fmt: skip
def test_other_differences_are_notes(change, message):
    (note,) = validate.configs(BASE, dataclasses.replace(BASE, **change), "base", "tuned")
    assert message in note


def test_equal_configs_need_no_note_and_every_field_is_looked_at():
    assert validate.configs(BASE, BASE, "base", "tuned") == []
    said = validate.configs(BASE, dataclasses.replace(BASE, max_positions=9), "base", "tuned")
    assert len(said) == 1
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(validate._SHAPE) < names


def test_tokenizer_notes():
    assert validate.tokenizers(tiny_tokenizer(), tiny_tokenizer()) == []
    assert validate.tokenizers(None, tiny_tokenizer()) == ["no tokenizer in the base"]
    tuned = tiny_tokenizer()
    tuned.add_tokens(["<new>", "<newer>"])
    tuned.pad_token = "</s>"
    tuned.chat_template = "{{ messages }}"
    notes = validate.tokenizers(tiny_tokenizer(), tuned)
    assert re.search(r"259 tokens in the base's, 261 .*\(2 added, 0 gone, 0 under", notes[0])
    assert "pad_token is '<pad>' in the base, '</s>' tuned" in notes[1]
    assert "chat template differs from the base's" in notes[2] and len(notes) == 3
    plain = tiny_tokenizer()
    plain.chat_template = None
    (note,) = validate.tokenizers(plain, tiny_tokenizer())
    assert "chat template is new: the base has none" in note
    (note,) = validate.tokenizers(tiny_tokenizer(), plain)
    assert "is missing: only the base has one" in note


def test_tokenizers_of_one_vocabulary_that_cut_differently():
    other = tiny_tokenizer()
    other.backend_tokenizer.pre_tokenizer = None  # bytes beyond ASCII are now unknown
    (note,) = validate.tokenizers(tiny_tokenizer(), other)
    assert "cut a sample text differently" in note


def test_embedding_notes():
    pair = rm.full_pair()
    table = np.array(pair.base["embed"]["table"])
    moved = table.copy()
    moved[60] += 0.5 * table[60]
    moved[3] += 0.1 * table[3]
    longer = np.concatenate([moved, np.ones((4, table.shape[1]), np.float32)])
    tuned = dict(pair.tuned, embed={"table": jnp.asarray(longer)})
    (note,) = validate.embeddings(dataclasses.replace(pair, tuned=tuned), tiny_tokenizer())
    distance = np.linalg.norm(moved - table) / np.linalg.norm(table)
    assert f"moved by {distance:.2e}" in note and "over 61 shared rows" in note
    token = tiny_tokenizer().convert_ids_to_tokens(60)
    assert f"row 60 ({token!r}) most, by 5.00e-01" in note
    padding = {"table": jnp.asarray(table).at[5].set(0)}  # in the base; tuned, it is not 0
    padded = dataclasses.replace(pair, base=dict(pair.base, embed=padding), tuned=tuned)
    (note,) = validate.embeddings(padded, None)
    assert "row 60 most, by 5.00e-01" in note
    same = dict(pair.tuned, embed={"table": pair.base["embed"]["table"]})
    assert validate.embeddings(dataclasses.replace(pair, tuned=same), None) == []
    assert validate.embeddings(rm.adapter_pair(), None) == []


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    test_peft.write(directory, "llama", dict(target_modules=["q_proj"]))
    return directory


def rename(adapter, named):
    path = adapter / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
    return peft.find(adapter / "adapter")


@pytest.mark.parametrize(
    "named, base",
    [
        ("meta/Tiny-1B", "models/tiny-1b"),
        ("/home/someone/tiny-1b/", "owner/Tiny-1B"),
        ("owner/Tiny-1B", "files/tiny-1b-Q4_K_M.gguf"),
        ("owner/Tiny-1B", "files/tiny-1b.bf16.gguf"),
        (None, "anything"),
    ],
)
def test_one_base_by_several_names_needs_no_note(adapter, named, base):
    config = huggingface.load(str(adapter / "base")).config
    assert validate.adapter(rename(adapter, named), base, config) == []


def test_a_base_by_another_name_is_a_note(adapter):
    config = huggingface.load(str(adapter / "base")).config
    (note,) = validate.adapter(rename(adapter, "owner/other"), "owner/this", config)
    assert note == "the adapter names another base: owner/other, not owner/this"
    # The one that it names is at hand and has the same shape.
    (note,) = validate.adapter(rename(adapter, str(adapter / "base")), "owner/this", config)
    assert "names another base" in note


def test_a_base_that_is_known_to_be_another_model_is_fatal(adapter, tmp_path):
    save_tiny(tmp_path / "wide", "llama", hidden_size=64)
    config = huggingface.load(str(adapter / "base")).config
    directory = rename(adapter, str(tmp_path / "wide"))
    with pytest.raises(InputError, match=r"was trained on .*wide \(width 64\), not on owner/this"):
        validate.adapter(directory, "owner/this", config)


def test_an_adapter_that_misfits_is_fatal_before_weights_are_read(adapter):
    config = huggingface.load(str(adapter / "base")).config
    narrow = dataclasses.replace(config, heads=2)
    found = rename(adapter, None)
    with pytest.raises(InputError, match="the base has 32 inputs and 32 outputs there"):
        Adapter(found, narrow)
    with pytest.raises(InputError, match="is unknown to family 'gpt2' with 3 layers"):
        Adapter(found, dataclasses.replace(config, family="gpt2"))


def test_a_mistral_that_a_converter_wrote_as_llama(tmp_path):
    """llama.cpp writes both as one, with or without the window: a pair, and a note."""
    hf, hf_config = tiny_hf("mistral", sliding_window=5)
    gguf_writer.write(tmp_path / "plain.gguf", hf, hf_config)
    window = {".attention.sliding_window": 5}
    gguf_writer.write(tmp_path / "windowed.gguf", hf, hf_config, metadata=window)
    hf.save_pretrained(tmp_path / "hf")
    names = [str(tmp_path / n) for n in ("plain.gguf", "windowed.gguf", "hf")]
    read = [model_config(name) for name in names]
    assert [c.family for c in read] == ["llama", "mistral", "mistral"]
    for i, j in ((0, 1), (1, 0), (0, 2)):
        notes = validate.configs(read[i], read[j], names[i], names[j])
        assert [n for n in notes if n.startswith("windows differs")] == notes
    assert validate.configs(read[1], read[2], names[1], names[2]) == []
