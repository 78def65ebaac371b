"""The pair's layer: base, tuned weights and low-rank factors meet there as in a merged model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.tuco import random_models as rm
from tuco_jax.core.last_token import Carry, LastTokenStep
from tuco_jax.core.layer import stacked_layers
from tuco_jax.core.places import Places
from tuco_jax.models.pair import Pair

CONFIG = rm.config(depth=2, windows=(0, 5), rope_index=(0, 1))
MASK = jnp.ones((2, 7), bool)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, CONFIG.width)), jnp.float32)


def layer(pair: Pair, index: int):
    return jax.tree.map(lambda a: a[index], stacked_layers(pair))


def test_factors_add_to_the_weights_that_they_stand_beside():
    pair = rm.adapter_pair(base=CONFIG)
    merged = jax.tree.map(lambda a: a, pair.base)
    for part, kinds in pair.lora["layers"].items():
        for name, factors in kinds.items():
            kernel = merged["layers"][part][name]["kernel"]
            merged["layers"][part][name]["kernel"] = kernel + factors["a"] @ factors["b"]
    whole = Pair(pair.base, merged, {}, CONFIG, CONFIG)
    for index in range(CONFIG.depth):
        at = Places.of(pair, MASK).tuned
        got, want = (layer(p, index).tuned.whole(X, at).total for p in (pair, whole))
        np.testing.assert_allclose(got, want, atol=1e-4)
        base = layer(pair, index).base.whole(X, at).total
        assert float(jnp.abs(got - base).max()) > 0.1


def test_selected_tokens_are_those_of_the_whole_block():
    pair = rm.full_pair(base=CONFIG)
    columns = jnp.asarray([[6, 2], [1, 4]])
    places = Places.of(pair, MASK, columns)
    own = layer(pair, 1).tuned
    whole = own.whole(X, places.tuned)
    last = jnp.take_along_axis(X, columns[..., None], axis=1)
    part, _ = own.selected(last, X, places.tuned)
    for a, b in zip(part, whole, strict=True):
        wanted = jnp.take_along_axis(b, columns[..., None], axis=1)
        np.testing.assert_allclose(a, wanted, atol=1e-5)


def test_an_adapter_s_pair_multiplies_by_each_weight_once():
    """One layer of the score takes at most 1.02 x the operations of the tuned model's layer.

    What both models multiply x by is one product of the compiled program: the base's keys and
    values at every token are free, but for the factors' part that only the tuned model adds.
    """
    config = rm.config(
        width=128, mlp_width=256, heads=4, head_dim=32, depth=1, windows=(0,), rope_index=(0,)
    )
    config = dataclasses.replace(config, ropes=(rm.rope(32),))
    one = jax.eval_shape(lambda: layer(rm.adapter_pair(base=config), 0))
    pair = jax.eval_shape(lambda: rm.adapter_pair(base=config))
    places = jax.eval_shape(lambda p: Places.of(p, jnp.ones((2, 192), bool)), pair)
    x, last = (jax.ShapeDtypeStruct((2, n, config.width), jnp.float32) for n in (192, 1))

    def scored(x, last, places, layer):
        step = LastTokenStep(places, full=True, norm=1, mesh=None)
        return step(Carry(x, last, last, (last,) * 4), layer, None)

    def forward(x, _, places, layer):
        return x + layer.tuned.whole(x, places.tuned).total

    costs = [
        (jax.jit(f).lower(x, last, places, one).compile().cost_analysis() or {})["flops"]
        for f in (scored, forward)
    ]
    assert costs[0] <= 1.02 * costs[1]
