"""The share of FTC in what layers add: the paper's check values, and what is no number."""

import jax.numpy as jnp
import numpy as np
import pytest

from tuco_jax.core.residual import share


def test_the_papers_check_values():
    h = np.random.default_rng(0).normal(size=7)
    ftc = jnp.cumsum(jnp.stack([h, -h / 2, 0 * h, 0 * h]), axis=0)
    ptc = jnp.cumsum(jnp.stack([0 * h, 0 * h, h, -h / 2]), axis=0)
    np.testing.assert_allclose(share(ptc, ftc), [1, 1, 1 / 3, 1 / 2], rtol=1e-6)
    np.testing.assert_allclose(share(ptc, ftc, norm=2), [1, 1, 1 / 3, 1 / 2], rtol=1e-6)
    assert float(share(jnp.zeros(3), jnp.zeros(3))) == 0


@pytest.mark.parametrize("norm", [1, 2])
def test_what_is_not_a_number_stays_so(norm):
    broken = jnp.array([1.0, jnp.nan])
    assert np.isnan(share(broken, jnp.ones(2), norm))
    assert np.isnan(share(jnp.ones(2), broken, norm))
