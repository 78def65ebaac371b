"""The last-token form is the full form at the last tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tuco import random_models as rm
from tuco_jax.core.decompose import decompose as eager_decompose
from tuco_jax.core.last_token import last_token as eager_last_token
from tuco_jax.core.places import last_column
from tuco_jax.core.residual import share

PAIRS = {
    "full": rm.full_pair,
    "adapter": rm.adapter_pair,
    "post_norm": lambda: rm.full_pair(base=rm.config(post_norm=True, norm_offset=1.0)),
    "parallel": lambda: rm.full_pair(base=rm.config(parallel=True, norm="layer", gated=False)),
    "one_layer": lambda: rm.full_pair(base=rm.config(depth=1, rope_index=(1,), windows=(4,))),
    "configs_differ": lambda: rm.full_pair(
        base=rm.config(),
        tuned=rm.config(
            ropes=(rm.rope(8, 3e4), rm.rope(8, 99.0)), windows=(0, 0, 3), norm_eps=1e-2
        ),
    ),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    return PAIRS[request.param]()


@pytest.fixture(scope="module", params=["right", "left"])
def inputs(request):
    return rm.batch(side=request.param)


# Jitted once, shared by all tests: eager execution compiles every operation by itself.
decompose = jax.jit(eager_decompose, static_argnames=("layers", "logits", "parts"))

last_token = jax.jit(eager_last_token, static_argnames="norm")


def at_last(x, mask):
    return x[..., jnp.arange(len(mask)), last_column(mask), :]


@pytest.mark.parametrize("norm", [1, 2])
def test_last_token_form_equals_the_full_form(pair, inputs, norm):
    tokens, mask = inputs
    out = decompose(pair, tokens, mask, layers=True, parts=True)
    ptc, ftc = (at_last(x, mask).cumsum(0) for x in (out.ptc, out.ftc))
    expected = share(ptc, ftc, norm)
    scored = last_token(pair, tokens, mask, norm=norm)
    np.testing.assert_allclose(scored.layers, expected, atol=1e-6)
    np.testing.assert_allclose(scored.tuco, expected[-1], atol=1e-6)
    np.testing.assert_allclose(scored.ptc, ptc[-1], atol=2e-5)
    np.testing.assert_allclose(scored.ftc, ftc[-1], atol=2e-5)
    np.testing.assert_allclose(scored.ftc_mlp, at_last(out.ftc_mlp, mask).sum(0), atol=2e-5)
    assert float(scored.telescoping.max()) < 1e-5
    assert float(scored.tuco.min()) > 0.01  # a pair that differs must not score zero
