"""Which form attention takes, and that it is the same by cuDNN; chains hold it to diffusers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from reward_jax.models.stable_diffusion import attention
from reward_jax.models.stable_diffusion.attention import attend


def tensors(dtype=jnp.bfloat16, width=40, queries=70, keys=77):
    """Of 1.5's head width at the finest level, to a text."""
    rng = np.random.default_rng(0)
    shapes = (2, queries, 3, width), (2, keys, 3, width), (2, keys, 3, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def test_what_cudnn_is_asked_for_is_parts():
    """The same call by XLA."""
    given = tensors()
    with jax.numpy_dtype_promotion("standard"):  # JAX's own function promotes
        found = attention._by_cudnn(*given, implementation="xla")
    wanted = attend(*tensors(jnp.float32))
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.02)
    np.testing.assert_allclose(attend(*given).astype(jnp.float32), wanted, atol=0.02)
    assert np.abs(wanted).max() > 0.5


@pytest.mark.parametrize(
    ("widest", "platform", "causal", "given", "expected"),
    [
        (256, "cuda", False, {}, True),
        (128, "cuda", False, dict(dtype=jnp.float16, width=128), True),
        (0, "cuda", False, {}, False),  # an older GPU, or another maker's
        (256, "tpu", False, {}, False),
        (256, "cuda", True, dict(queries=77), False),
        (256, "cuda", False, dict(dtype=jnp.float32), False),
        (256, "cuda", False, dict(width=160), False),
        (256, "cuda", False, dict(width=36), False),
    ],
)
def test_where_cudnn_is_called(monkeypatch, widest, platform, causal, given, expected):
    monkeypatch.setattr(attention, "cudnn_width", lambda: widest)
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    traced = jax.jit(lambda *x: attend(*x, causal=causal)).trace(*tensors(**given))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == expected
    assert text.count("stablehlo.dot_general") == 2 * (not expected)
