"""Parameter trees and the pure functions on them; parity is `test_parity.py`'s."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tuco import random_models as rm
from tuco_jax.models import decoder
from tuco_jax.models.positions import Positions


@pytest.mark.parametrize(
    "changes", [{}, dict(tied_head=True), dict(ropes=(), rope_index=(0,) * 3)]
)
def test_initial_parameters_have_the_shapes_that_are_told(changes):
    config = rm.config(**changes)
    params = decoder.init(config, jax.random.key(0))
    promised = decoder.param_shapes(config)
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, promised)
    assert ("head" in params) is not config.tied_head
    assert ("positions" in params) is not bool(config.ropes)


def test_merge_copies_nothing():
    params = rm.params(rm.config(), 0)
    new = jnp.ones(24)
    merged = decoder.merge(params, {"final_norm": {"scale": new}})
    assert merged["final_norm"]["scale"] is new
    assert merged["layers"] is params["layers"]
    assert decoder.merge(params, None) is params


def test_recomputed_activations_change_nothing():
    config = rm.config()
    params = rm.params(config, 0)
    tokens, mask = rm.batch()
    at = Positions.of(config, mask)
    x = decoder.embed(config, params, tokens, at)
    plain, hidden = decoder.forward(config, params, x, at, hidden_states=True)
    again, none = decoder.forward(config, params, x, at, remat=True)
    assert none is None and hidden is not None
    np.testing.assert_allclose(plain, again, atol=1e-6)
    np.testing.assert_array_equal(hidden[-1], plain)
