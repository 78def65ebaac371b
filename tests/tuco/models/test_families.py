"""Configs of real models, old and new spellings, and the settings that are refused."""

import math

import jax
import pytest
from transformers import AutoConfig

from common_jax.errors import InputError
from tests.tuco.tiny import FAMILIES, tiny_config
from tuco_jax.models import decoder
from tuco_jax.models.families import from_huggingface

LLAMA31_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def hub(model_type, **fields):
    """A config as a hub's config.json spells it."""
    return AutoConfig.for_model(model_type, **fields)


def sizes(vocab, width, mlp, depth, heads, kv=None, **fields):
    return dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv or heads,
        **fields,
    )


# name: (model_type, fields of its config.json, parameters as published)
MODELS = {
    "Llama-2-7b": ("llama", sizes(32000, 4096, 11008, 32, 32), 6_738_415_616),
    "Llama-3.1-8B": (
        "llama",
        sizes(128256, 4096, 14336, 32, 32, 8, rope_theta=500000.0, rope_scaling=LLAMA31_ROPE),
        8_030_261_248,
    ),
    "Mistral-7B-v0.1": ("mistral", sizes(32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "SmolLM2-135M": (
        "llama",
        sizes(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
        134_515_008,
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        sizes(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen3-0.6B": (
        "qwen3",
        sizes(151936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
        596_049_920,
    ),
    "gemma-2b": ("gemma", sizes(256000, 2048, 16384, 18, 8, 1, head_dim=256), 2_506_172_416),
    "gemma-2-2b": ("gemma2", sizes(256000, 2304, 9216, 26, 8, 4, head_dim=256), 2_614_341_888),
    "gemma-3-270m": (
        "gemma3_text",
        sizes(262144, 640, 2048, 18, 4, 1, head_dim=256),
        268_098_176,
    ),
    "Phi-3-mini": ("phi3", sizes(32064, 3072, 8192, 32, 32), 3_821_079_552),
    "OLMo-2-7B": ("olmo2", sizes(100352, 4096, 11008, 32, 32), 7_298_617_344),
    "gpt2": ("gpt2", {}, 124_439_808),
    "pythia-70m": (
        "gpt_neox",
        dict(
            vocab_size=50304,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=6,
            num_attention_heads=8,
        ),
        70_426_624,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(name):
    model_type, fields, count = MODELS[name]
    shapes = decoder.param_shapes(from_huggingface(hub(model_type, **fields)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_hashable_and_equal_to_its_twin(family):
    one, two = from_huggingface(tiny_config(family)), from_huggingface(tiny_config(family))
    assert one == two
    assert hash(one) == hash(two)
    assert one.family == family


def test_gemma3_has_two_rotary_embeddings_and_a_window_on_the_local_layers():
    config = from_huggingface(
        hub(
            "gemma3_text",
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            rope_scaling=dict(rope_type="linear", factor=8.0),
            sliding_window=512,
            query_pre_attn_scalar=168,
            **sizes(1000, 640, 2048, 7, 4, 1, head_dim=256),
        )
    )
    assert config.windows == (512,) * 5 + (0, 512)
    assert config.rope_index == (1,) * 5 + (0, 1)
    assert [rope.base for rope in config.ropes] == [1e6, 1e4]
    assert config.ropes[0].frequencies[0] == 1 / 8
    assert config.ropes[1].frequencies[0] == 1
    assert config.query_scale == 168**-0.5
    assert config.embed_scale == 640**0.5


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_the_activation_is_the_one_that_transformers_reads(model_type):
    """Published configs hold hidden_act, too, which counts for the first Gemma alone."""
    config = hub(model_type, hidden_activation="gelu_pytorch_tanh", hidden_act="silu")
    assert from_huggingface(config).activation == "gelu_tanh"


def test_gemma3_multimodal_gives_its_text_model():
    whole = hub("gemma3", text_config=dict(sizes(1000, 640, 2048, 7, 4, 1, head_dim=256)))
    assert from_huggingface(whole) == from_huggingface(whole.text_config)


def test_qwen_window_starts_at_max_window_layers():
    fields = sizes(1000, 64, 64, 4, 4, 2, sliding_window=9, max_window_layers=3)
    assert from_huggingface(hub("qwen2", use_sliding_window=True, **fields)).windows == (
        0,
        0,
        0,
        9,
    )
    assert from_huggingface(hub("qwen2", use_sliding_window=False, **fields)).windows == (0,) * 4


REFUSED = [
    ("bloom", {}, "model_type 'bloom' is not supported; supported are gemma, gemma2"),
    ("llama", dict(hidden_act="relu"), "activation 'relu' is not supported"),
    ("llama", dict(quantization_config=dict(quant_method="gptq", bits=4)), "quantization_config"),
    (
        "llama",
        dict(rope_parameters=dict(rope_type="proportional", rope_theta=1e4)),
        "rope_type 'proportional' is not supported; supported are default, linear",
    ),
    (
        "llama",
        dict(num_attention_heads=4, num_key_value_heads=3),
        "cannot share 3 key/value heads",
    ),
    (
        "qwen2",
        dict(num_hidden_layers=1, layer_types=["chunked_attention"]),
        "layer_types: 'chunked_attention' is not supported",
    ),
    ("llama", dict(num_hidden_layers=0), "depth is 0; mend the config"),
    (
        "llama",
        dict(rope_parameters=dict(LLAMA31_ROPE, factor="8")),
        "a setting is of the wrong type",
    ),
    ("gpt2", dict(n_head=0), "a size or a scale is 0"),
    ("gemma2", dict(query_pre_attn_scalar=0), "a size or a scale is 0"),
    (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=0.0)),
        "a size or a scale is 0",
    ),
    (
        "llama",
        dict(rope_parameters=dict(rope_type="default", rope_theta=0.0)),
        "a size or a scale is 0",
    ),
    ("gemma", dict(use_bidirectional_attention=True), "only causal models"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
]


@pytest.mark.parametrize(("model_type", "fields", "message"), REFUSED)
def test_what_the_block_does_not_have_is_refused(model_type, fields, message):
    with pytest.raises(InputError, match=message) as caught:
        from_huggingface(hub(model_type, **fields))
    assert "\n" not in str(caught.value)
