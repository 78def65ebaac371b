"""Models in memory: of transformers, compiled, as state dicts, and PeftModels of every kind."""

from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from common_jax.errors import InputError
from tests.tuco.tiny import VOCAB, tiny_hf, tiny_tokenizer
from tests.tuco.weights.peft import test_adapter
from tests.tuco.weights.peft import test_read as shared
from tuco_jax.core.streamed import stream_pair
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.load import load_model, load_pair

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transformers_model_is_what_it_would_be_from_disk(family, dtype, tmp_path):
    model, _ = tiny_hf(family)
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    expected = huggingface.load(str(tmp_path), tokenizer=False)
    for source in (
        model,
        (model.state_dict(), model.config),
        (model.state_dict(), model.config.to_dict()),
        ({k: v.float().numpy() for k, v in model.state_dict().items()}, model.config),
        ({k: jnp.asarray(v.float().numpy()) for k, v in model.state_dict().items()}, model.config),
        ({"state_dict": {f"net.{k}": v for k, v in model.state_dict().items()}}, model.config),
    ):
        found = load_model(source)
        assert found.config == expected.config
        chex.assert_trees_all_equal(found.params, expected.params)


def test_wrapped_models(tmp_path):
    model, _ = tiny_hf("llama")
    plain = load_model(model)
    chex.assert_trees_all_equal(load_model(torch.compile(model)).params, plain.params)
    parallel = torch.nn.DataParallel(model)
    chex.assert_trees_all_equal(load_model(parallel).params, plain.params)


def test_two_models_in_memory(tmp_path):
    (base, _), (tuned, _) = tiny_hf("llama", seed=0), tiny_hf("llama", seed=1)
    pair, tokenizer = load_pair(base, tuned, tokenizer=TOKENIZER)
    assert tokenizer is TOKENIZER
    assert not [note for note in pair.notes if "tokenizer" in note]
    tokens, mask = shared.batch()
    expected = shared.torch_logits(tuned, tokens, mask)
    np.testing.assert_allclose(
        shared.our_logits(pair, tokens, mask)[mask], expected[mask], atol=1e-4
    )
    base.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    mixed, tokenizer = load_pair(str(tmp_path), tuned)  # whose tokenizer is the base's
    chex.assert_trees_all_equal(mixed.tuned, pair.tuned)
    assert tokenizer is not None
    streamed, _ = stream_pair(base, tuned, tokenizer=TOKENIZER)
    assert streamed.ends.base_config == pair.base_config


PEFT = ["dora", "biases", "ia3, conv1d", "adalora", "lokr, both in parts", "rows of both ends"]
PEFT += ["rows of a tied embedding", "tied embedding that stays tied", "dora, tied embedding"]
PEFT += ["norms", "norms, with biases"]


@pytest.mark.parametrize("case", PEFT)
def test_a_peft_model_is_what_it_would_be_from_disk(case, tmp_path):
    family, config, changes = test_adapter.CASES[case]
    wrapped = shared.write_any(tmp_path, family, config, **changes)
    expected = shared.read(tmp_path)
    pair, _ = load_pair(str(tmp_path / "base"), wrapped, tokenizer=TOKENIZER)
    assert pair.tuned_config == expected.tuned_config
    chex.assert_trees_all_equal((pair.tuned, pair.lora), (expected.tuned, expected.lora))
    if "biases" not in case:  # which PEFT trains in the base itself
        twice, _ = load_pair(wrapped, wrapped, tokenizer=TOKENIZER)
        chex.assert_trees_all_equal(twice, pair)


def test_a_peft_model_of_a_resized_vocabulary(tmp_path):
    model, _ = tiny_hf("llama")
    model.save_pretrained(tmp_path)
    model.resize_token_embeddings(VOCAB + 5, mean_resizing=False)
    config = test_adapter.lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    wrapped = shared.randomise(peft.get_peft_model(model, config)).eval()
    pair, _ = load_pair(str(tmp_path), wrapped, tokenizer=TOKENIZER)
    tokens, mask = shared.batch(vocab=VOCAB + 5)
    expected = shared.torch_logits(wrapped, tokens, mask)
    np.testing.assert_allclose(
        shared.our_logits(pair, tokens, mask)[mask], expected[mask], atol=1e-4
    )


def test_one_of_several_adapters():
    base, _ = tiny_hf("llama")
    model, _ = tiny_hf("llama")
    wrapped = peft.get_peft_model(model, test_adapter.lora(target_modules=["q_proj"]))
    wrapped.add_adapter("terse", test_adapter.lora(target_modules=["v_proj"]))
    shared.randomise(wrapped)
    wrapped.set_adapter("terse")
    active, _ = load_pair(base, wrapped, tokenizer=TOKENIZER)
    named, _ = load_pair(base, wrapped, tokenizer=TOKENIZER, adapter="terse")
    chex.assert_trees_all_equal(active.lora, named.lora)
    assert set(active.lora["layers"]["attention"]) == {"v"}
    other, _ = load_pair(base, wrapped, tokenizer=TOKENIZER, adapter="default")
    assert set(other.lora["layers"]["attention"]) == {"q"}
    with pytest.raises(InputError, match="no adapter 'rude'; it holds default, terse: name one"):
        load_pair(base, wrapped, tokenizer=TOKENIZER, adapter="rude")
    wrapped.merge_adapter()
    with pytest.raises(InputError, match="its adapter is merged into its weights; call unmerge"):
        load_pair(base, wrapped, tokenizer=TOKENIZER)


def test_an_adapter_that_was_put_into_a_model_without_a_wrapper():
    """As transformers' own add_adapter does, too."""
    base, _ = tiny_hf("llama")
    model: Any = tiny_hf("llama")[0]
    config = test_adapter.lora(target_modules=["q_proj", "down_proj"])
    shared.randomise(peft.inject_adapter_in_model(config, model, adapter_name="polite"))
    pair, _ = load_pair(base, model, tokenizer=TOKENIZER)
    assert pair.tuned == {} and set(pair.lora["layers"]) == {"attention", "mlp"}
    tokens, mask = shared.batch()
    expected = shared.torch_logits(model, tokens, mask)
    ours = shared.our_logits(pair, tokens, mask)
    np.testing.assert_allclose(ours[mask], expected[mask], atol=1e-4)


def test_what_is_no_model_is_named():
    model, _ = tiny_hf("llama")
    weights = model.state_dict()
    for source, message in (
        (3, "a int is no model; give a directory, a hub id"),
        ((weights, {"model_type": "bloom"}), "model_type 'bloom' is not supported"),
        ((weights, None), "its config is no transformers config, nor the fields of one"),
        (([1, 2], model.config), "must map names to tensors"),
        (({"a": 3}, model.config), "must map names to tensors"),
        ((dict(weights, x=torch.ones(2)), model.config), "tensor x is unknown to family 'llama'"),
        (
            ({k: v.to(torch.int8) for k, v in weights.items()}, model.config),
            "holds int8, not floats; dequantise the model first",
        ),
        (
            ({k: v.to("meta") for k, v in weights.items()}, model.config),
            "is on the meta device: it is empty",
        ),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_model(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="a model in memory brings no tokenizer; give one with"):
        load_pair(model, model)
