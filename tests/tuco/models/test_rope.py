"""Frequencies of rotary embeddings against those of transformers."""

import numpy as np
import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from common_jax.errors import InputError
from tests.tuco.models.test_families import LLAMA31_ROPE, hub, sizes
from tuco_jax.models.families import from_huggingface
from tuco_jax.models.rope import resolve_rope

ROPES = {
    "llama 3.1": ("llama", dict(head_dim=128, rope_theta=500000.0, rope_scaling=LLAMA31_ROPE)),
    "qwen2 yarn": (
        "qwen2",
        dict(
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e6,
                factor=4.0,
                original_max_position_embeddings=32768,
            ),
            **sizes(1000, 3584, 18944, 28, 28, 4),
        ),
    ),
    "yarn, its original context beside it": (
        "llama",
        dict(
            head_dim=128,
            original_max_position_embeddings=8192,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1e4,
                factor=4.0,
                original_max_position_embeddings=2048,
            ),
        ),
    ),
    "vicuna 16k": (
        "llama",
        dict(head_dim=128, rope_scaling=dict(type="linear", factor=4.0), rope_theta=10000.0),
    ),
    "phi3.5": (
        "phi3",
        dict(
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling=dict(
                type="longrope",
                short_factor=np.linspace(1, 2.8, 48).tolist(),
                long_factor=np.linspace(1.08, 64, 48).tolist(),
            ),
            **sizes(1000, 3072, 8192, 32, 32, pad_token_id=0),
        ),
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name):
    """To the last bits: at position 100,000 an error of 1e-6 in a frequency is an angle of 0.1."""
    model_type, fields = ROPES[name]
    config = hub(model_type, **fields)
    rope = from_huggingface(config).ropes[0]
    compute = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]]
    frequencies, scale = compute(config, "cpu")
    np.testing.assert_allclose(rope.frequencies, frequencies.numpy(), rtol=5e-7, atol=0)
    assert rope.scale == pytest.approx(scale, rel=1e-12)
    if rope.long_frequencies:
        assert rope.switch == 4096
        frequencies, scale = compute(config, "cpu", seq_len=4097)
        np.testing.assert_allclose(rope.long_frequencies, frequencies.numpy(), rtol=5e-7, atol=0)
        assert rope.long_scale == pytest.approx(scale, rel=1e-12)


def test_a_missing_or_misshaped_rope_field_is_named():
    with pytest.raises(InputError, match="type 'linear' lack the field 'factor'"):
        resolve_rope(dict(rope_type="linear", rope_theta=1e4), 8, 64)
    longrope = dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 3, long_factor=[1.0] * 4
    )
    with pytest.raises(InputError, match="short_factor has 3 numbers; .* call for 4"):
        resolve_rope(longrope, 8, 64)


def test_what_is_not_finite_is_an_error():
    for base in (0.0, float("nan")):
        with pytest.raises(ArithmeticError):
            resolve_rope(dict(rope_type="default", rope_theta=base), 8, 64)
