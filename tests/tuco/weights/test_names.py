"""Names of tensors as wrappers write them, and tied models that store one of two names."""

from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from common_jax.io.wrapped_names import unwrapped
from tests.tuco.tiny import save_tiny
from tests.tuco.weights.refused import refusal
from tuco_jax.weights.hf.model import load

WEIGHTS = "model.safetensors"


def edit(directory, change):
    tensors = load_file(directory / WEIGHTS)
    save_file(change(tensors), directory / WEIGHTS, metadata={"format": "pt"})


def renamed(change):
    return lambda tensors: {change(name): value for name, value in tensors.items()}


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


WRAPPERS = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "data parallel": lambda name: f"module.{name}",
    "compiled data parallel": lambda name: f"module._orig_mod.{name}",
    "compiled layers": lambda name: name.replace(".0.", ".0._orig_mod."),
    "fsdp, checkpointing": lambda name: (
        "_fsdp_wrapped_module." + name.replace(".1.", ".1._checkpoint_wrapped_module.")
    ),
    "lightning": lambda name: f"model.{name}",
    "lightning, another attribute": lambda name: f"net.llm.{name}",
    "lightning, compiled": lambda name: f"model._orig_mod.{name}",
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_wrappers_add_is_taken_off(wrapper, family, tmp_path):
    save_tiny(tmp_path, family, tokenizer=False)
    plain = load(str(tmp_path))
    edit(tmp_path, renamed(WRAPPERS[wrapper]))
    assert_equal(plain.params, load(str(tmp_path)).params)


def test_unwrapped_leaves_other_names_alone():
    assert unwrapped("model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert unwrapped("model.original_module.weight") == "model.original_module.weight"


def test_messages_name_what_is_there(tmp_path):
    save_tiny(tmp_path, "llama", tokenizer=False)
    whole = load_file(tmp_path / WEIGHTS)
    edit(tmp_path, lambda t: renamed(WRAPPERS["lightning"])(t) | {"loss.weight": np.ones(2)})
    assert "tensor loss.weight is unknown to family 'llama'" in refusal(tmp_path)
    edit(tmp_path, lambda _: renamed(lambda n: n.replace("q_proj", "query"))(whole))
    message = refusal(tmp_path)
    assert "tensor model.layers.0.self_attn.q_proj.bias is missing (and 5 more)" in message
    assert "it holds model.layers.0.self_attn.query.bias (and 5 more) instead" in message
    two = {f"{who}.{name}": x for who in ("student", "teacher") for name, x in whole.items()}
    edit(tmp_path, lambda _: two)
    assert "holds several models: student.model.embed_tokens.weight and teacher" in refusal(
        tmp_path
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("wrapper", [None, "lightning"])
def test_a_tied_model_that_stores_only_its_head(family, wrapper, tmp_path):
    save_tiny(tmp_path, family, tokenizer=False, tie_word_embeddings=True)
    plain = load(str(tmp_path))
    head = "embed_out" if family == "gpt_neox" else "lm_head"

    def only_head(tensors):
        embedding = next(
            n for n in tensors if n.rpartition(".")[0][-4:] in ("kens", ".wte", "d_in")
        )
        return tensors | {f"{head}.weight": tensors.pop(embedding)}

    edit(tmp_path, only_head)
    if wrapper is None:  # transformers reads it so
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
        ours = np.asarray(plain.params["embed"]["table"])
        table = model.get_input_embeddings().weight.detach().numpy()
        np.testing.assert_array_equal(table, ours)
    else:
        edit(tmp_path, renamed(WRAPPERS[wrapper]))
    found = load(str(tmp_path))
    assert "head" not in found.params
    assert_equal(plain.params, found.params)
