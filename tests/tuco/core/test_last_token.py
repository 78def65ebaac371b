"""The last-token form is the full form at the last tokens."""

import numpy as np
import pytest

from tests.tuco import random_models as rm
from tests.tuco.core.forms import at_last, decompose, last_token
from tuco_jax.core.residual import share


def test_both_forms_agree_on_a_mixture_of_experts_with_an_adapter():
    """An adapter of attention, router and every expert; both models choose experts."""
    config = rm.config(mlp_bias=False, experts=5, experts_used=2)
    pair, (tokens, mask) = rm.adapter_pair(base=config), rm.batch(side="left")
    out = decompose(pair, tokens, mask)
    real = np.asarray(mask)
    np.testing.assert_allclose(
        (out.embeddings + out.ptc + out.ftc)[real], out.hidden[real], atol=2e-5
    )
    scored = last_token(pair, tokens, mask)
    ptc, ftc = (at_last(x, mask) for x in (out.ptc, out.ftc))
    np.testing.assert_allclose(scored.tuco, share(ptc, ftc, 1), atol=1e-6)
    assert float(scored.telescoping.max()) < 1e-5
    assert float(scored.tuco.min()) > 0.01


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
