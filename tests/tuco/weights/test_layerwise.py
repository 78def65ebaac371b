"""A layer read alone is the layer of the whole, bit for bit, whatever it is read from."""

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common_jax.errors import InputError
from tests.tuco.tiny import FAMILIES, save_tiny, tiny_hf, tiny_tokenizer
from tests.tuco.weights.gguf import test_model as test_gguf
from tests.tuco.weights.gguf import writer as gguf_writer
from tests.tuco.weights.peft import test_adapter
from tests.tuco.weights.peft import test_read as test_peft
from tuco_jax.weights.load import load_model, load_pair, open_model, open_pair
from tuco_jax.weights.orbax import store


def without_layers(params):
    return {name: value for name, value in params.items() if name != "layers"}


def one_layer(params, index):
    return jax.tree.map(lambda x: np.asarray(x[index]), params.get("layers", {}))


def check_model(source, **options):
    """Every layer and what stands outside them, against the whole model."""
    whole, opened = load_model(source, **options), open_model(source, **options)
    for index in range(whole.config.depth):
        layer = opened.weights.layer(index)
        chex.assert_trees_all_equal(layer, one_layer(whole.params, index))
        chex.assert_trees_all_equal_dtypes(layer, one_layer(whole.params, index))
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(layer))
    outside = opened.load(layers=False)
    chex.assert_trees_all_equal(outside.params, without_layers(whole.params))
    assert (outside.config, outside.name) == (whole.config, whole.name)


def check_pair(base, tuned, **options):
    """The same of a pair, and that the same is said of it."""
    whole, tokenizer = load_pair(base, tuned, **options)
    opened = open_pair(base, tuned, **options)
    outside, again = opened.load(layers=False)
    branches = "base", "tuned", "lora"
    for name in branches:
        expected = without_layers(getattr(whole, name))
        chex.assert_trees_all_equal(getattr(outside, name), expected)
        chex.assert_trees_all_equal_dtypes(getattr(outside, name), expected)
    for index in range(whole.base_config.depth):
        for name, layer in zip(branches, opened.layer(index), strict=True):
            chex.assert_trees_all_equal(layer, one_layer(getattr(whole, name), index))
            chex.assert_trees_all_equal_dtypes(layer, one_layer(getattr(whole, name), index))
    assert list(outside.notes) == list(whole.notes)
    assert (outside.base_config, outside.tuned_config) == (whole.base_config, whole.tuned_config)
    assert again is not None and again.chat_template == tokenizer.chat_template
    return whole


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family(tmp_path, family, dtype):
    """In shards, stored in half the bits of what is asked for, or the other way round."""
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    save_tiny(tmp_path, family, dtype=other, max_shard_size="20KB", tokenizer=False)
    check_model(str(tmp_path), dtype=dtype)


def test_two_models(tmp_path):
    """Tied heads, vocabularies that differ, a note on each difference."""
    save_tiny(tmp_path / "base", "gemma3_text", seed=0)
    save_tiny(tmp_path / "tuned", "gemma3_text", seed=1, vocab_size=280, rms_norm_eps=1e-3)
    pair = check_pair(str(tmp_path / "base"), str(tmp_path / "tuned"))
    assert len(pair.notes) >= 3


@pytest.mark.parametrize("case", test_peft.CASES)
def test_adapters(tmp_path, case):
    family, changes, options = test_peft.CASES[case]
    test_peft.write(tmp_path, family, options, **changes)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    check_pair(str(tmp_path / "base"), str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    "case",
    [
        *("dora", "dora, conv1d", "dora, fused", "biases, norms too", "ia3, fused", "lokr"),
        *("adalora", "rows of a tied embedding"),
    ],
)
def test_adapters_that_become_tuned_weights(tmp_path, case):
    family, config, changes = test_adapter.CASES[case]
    test_peft.write_any(tmp_path, family, config, **changes)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    check_pair(str(tmp_path / "base"), str(tmp_path / "adapter"))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_adapters_in_another_dtype_and_with_a_template(tmp_path, dtype):
    test_peft.write(tmp_path, *_saved_modules())
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    pair = check_pair(str(tmp_path / "base"), str(tmp_path / "adapter"), dtype=dtype)
    assert "layers" in pair.tuned and any("chat template differs" in note for note in pair.notes)


def _saved_modules():
    family, _, options = test_peft.CASES["saved_modules"]
    return family, options


@pytest.mark.parametrize("case", test_gguf.CASES)
def test_every_gguf(tmp_path, case):
    """Quantised blocks, rows put back in order, norms without their offset."""
    family, changes, arguments = test_gguf.CASES[case]
    gguf_writer.write(tmp_path / "m.gguf", *tiny_hf(family, **changes), **arguments)
    check_model(str(tmp_path / "m.gguf"), tokenizer=False)


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stores(tmp_path, tuned, dtype):
    test_peft.write(tmp_path, *_saved_modules())
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    save_tiny(tmp_path / "tuned", "llama", seed=1)
    base = str(tmp_path / "base")
    pair, tokenizer = load_pair(base, str(tmp_path / tuned))
    store.save(tmp_path / "model", load_model(base))
    store.save_pair(tmp_path / "pair", pair, tokenizer)
    check_model(str(tmp_path / "model"), dtype=dtype)
    check_pair(str(tmp_path / "model"), str(tmp_path / tuned), dtype=dtype)
    check_pair(str(tmp_path / "pair"), str(tmp_path / "pair"), dtype=dtype)


def test_what_is_wrong_is_said_when_opened(tmp_path):
    """Names and configs are known before a weight is read."""
    save_tiny(tmp_path / "base", "llama")
    save_tiny(tmp_path / "wide", "llama", hidden_size=64)
    with pytest.raises(InputError, match="width is 64, but 32 in"):
        open_pair(str(tmp_path / "base"), str(tmp_path / "wide"))
    path = tmp_path / "wide" / "model.safetensors"
    tensors = load_file(path)
    removed = tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj\.weight is missing"):
        open_model(str(tmp_path / "wide"))
    removed[0, 0] = np.nan
    save_file(tensors | {"model.layers.2.mlp.up_proj.weight": removed}, path)
    opened = open_model(str(tmp_path / "wide"))
    opened.weights.layer(1)
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj\.weight holds NaN"):
        opened.weights.layer(2)


def test_layers_in_blocks(tmp_path, monkeypatch):
    """A layer of many blocks, and of tensors that are read in rows."""
    monkeypatch.setattr("tuco_jax.weights.assemble._BLOCK", 100)
    save_tiny(tmp_path, "llama", tokenizer=False)
    check_model(str(tmp_path))
