"""Identities of the decomposition and of the score, on random models."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tuco import random_models as rm
from tests.tuco.core.forms import at_last, decompose, last_token
from tuco_jax.core.decompose import decompose as eager_decompose
from tuco_jax.core.last_token import tuco
from tuco_jax.core.residual import share
from tuco_jax.models import decoder
from tuco_jax.models.positions import Positions


def tuned_forward(pair, tokens, mask):
    at = Positions.of(pair.tuned_config, mask)
    x = decoder.embed(pair.tuned_config, pair.tuned_params, tokens, at)
    return decoder.forward(pair.tuned_config, pair.tuned_params, x, at, pair.lora)[0]


forward = jax.jit(tuned_forward)


def test_components_telescope_and_alpha_one_is_the_tuned_model(pair, inputs):
    tokens, mask = inputs
    out = decompose(pair, tokens, mask, parts=True)
    real = np.asarray(mask)
    np.testing.assert_allclose(
        (out.embeddings + out.ptc + out.ftc)[real], out.hidden[real], atol=2e-5
    )
    np.testing.assert_allclose(out.ftc_attention + out.ftc_mlp, out.ftc, atol=2e-5)
    np.testing.assert_allclose(out.hidden[real], forward(pair, tokens, mask)[real], atol=2e-5)


def test_sums_equal_the_layers_own(pair, inputs):
    out = decompose(pair, *inputs)
    each = decompose(pair, *inputs, layers=True)
    chex.assert_shape(each.ptc, (pair.base_config.depth, *out.ptc.shape))
    np.testing.assert_allclose(each.ptc.sum(0), out.ptc, atol=2e-5)
    np.testing.assert_allclose(each.ftc.sum(0), out.ftc, atol=2e-5)


def test_equal_models_have_no_tuning_component():
    pair = rm.full_pair()
    pair = dataclasses.replace(pair, tuned=pair.base)
    out = decompose(pair, *rm.batch())
    assert float(jnp.abs(out.ftc).max()) == 0
    assert float(jnp.abs(last_token(pair, *rm.batch()).tuco).max()) < 1e-6
    slope = jax.jit(jax.grad(lambda x, mask: tuco(pair, None, mask, embeddings=x).sum()))
    gradient = slope(out.embeddings, rm.batch()[1])
    assert np.isfinite(gradient).all()


def test_a_route_is_a_part_of_tuning():
    """Where routers alone differ FTC is what the tuned route adds; with equal routers nothing."""
    config = rm.config(mlp_bias=False, experts=5, experts_used=2)
    pair = rm.full_pair(base=config)
    tokens, mask = rm.batch()
    same = dataclasses.replace(pair, tuned=pair.base)
    assert float(jnp.abs(decompose(same, tokens, mask).ftc).max()) == 0
    layers = pair.base["layers"]
    mlp = layers["mlp"] | {"router": pair.tuned["layers"]["mlp"]["router"]}
    routed = pair.base | {"layers": layers | {"mlp": mlp}}
    out = decompose(dataclasses.replace(pair, tuned=routed), tokens, mask, layers=True, parts=True)
    # Whatever the layer, attention sees the same stream; the change of route is the MLP's alone.
    assert float(jnp.abs(out.ftc_attention).max()) == 0
    assert (np.abs(out.ftc_mlp).max(axis=(1, 2, 3)) > 0.01).all()


def test_alpha_zero_is_the_base_between_the_tuned_models_ends():
    pair = rm.full_pair()
    tokens, mask = rm.batch()
    out = decompose(pair, tokens, mask, alpha=0.0, logits=True)
    at = Positions.of(pair.base_config, mask)
    x = decoder.embed(pair.tuned_config, pair.tuned, tokens, at)
    base = dataclasses.replace(pair, tuned=pair.base)
    x = decompose(base, None, mask, embeddings=x).hidden
    np.testing.assert_allclose(out.hidden[mask], x[mask], atol=2e-5)
    logits = decoder.logits(pair.tuned_config, pair.tuned, x)
    np.testing.assert_allclose(out.logits[mask], logits[mask], atol=5e-5)


def test_alpha_per_layer_and_per_example():
    pair, (tokens, mask) = rm.full_pair(), rm.batch()

    def run(alpha):
        return decompose(pair, tokens, mask, alpha).hidden

    alphas = jnp.array([0.0, 0.5, 1.0, 1.3])
    rows = run(alphas)
    for i, alpha in enumerate(alphas):
        np.testing.assert_allclose(rows[i][mask[i]], run(alpha)[i][mask[i]], atol=1e-5)
    # By hand, from the layers' own components on the scaled stream.
    per_layer = jnp.array([0.2, 1.0, 1.7])[:, None]
    out = decompose(pair, tokens, mask, per_layer, layers=True)
    x = out.embeddings + (out.ptc + per_layer[..., None, None] * out.ftc).sum(0)
    np.testing.assert_allclose(out.hidden[mask], x[mask], atol=2e-5)


def test_padding_does_not_matter(pair):
    tokens, mask = rm.batch(side="right")
    left_tokens, left_mask = np.array(tokens), np.array(mask)
    for row in range(len(mask)):
        shift = int((~np.asarray(mask[row])).sum())
        left_tokens[row] = np.roll(left_tokens[row], shift)
        left_mask[row] = np.roll(left_mask[row], shift)
    right = last_token(pair, tokens, mask).tuco
    np.testing.assert_allclose(right, last_token(pair, left_tokens, left_mask).tuco, atol=1e-6)
    row = int(np.argmin(mask.sum(1)))
    n = int(mask[row].sum())
    single = last_token(pair, tokens[row : row + 1, :n], mask[row : row + 1, :n]).tuco
    np.testing.assert_allclose(right[row], single[0], atol=1e-6)


def test_later_tokens_do_not_reach_earlier_ones(pair):
    tokens, mask = rm.batch(side="right")
    out = decompose(pair, tokens, mask)
    changed = decompose(pair, tokens.at[:, 6:].add(1) % 61, mask)
    np.testing.assert_array_equal(out.ftc[:, :6], changed.ftc[:, :6])
    assert float(jnp.abs(out.ftc[0, 6:] - changed.ftc[0, 6:]).max()) > 1e-3


@pytest.mark.slow
def test_gradients_agree_between_forms_and_with_finite_differences(pair):
    tokens, mask = rm.batch()
    x = decompose(pair, tokens, mask).embeddings

    def full(pair, x):
        out = eager_decompose(pair, mask=mask, embeddings=x)
        return share(at_last(out.ptc, mask), at_last(out.ftc, mask)).sum()

    def last(pair, x):
        return tuco(pair, None, mask, embeddings=x).sum()

    expected = jax.jit(jax.grad(full, argnums=(0, 1)))(pair, x)
    got = jax.jit(jax.grad(last, argnums=(0, 1)))(pair, x)
    chex.assert_trees_all_close(got, expected, atol=2e-5)

    @jax.jit
    def scaled(alpha):
        hidden = eager_decompose(pair, tokens, mask, alpha).hidden
        return jnp.square(jnp.where(mask[..., None], hidden, 0)).mean()

    slope = jax.jit(jax.grad(scaled))(0.8)
    step = 1e-2
    numeric = (scaled(0.8 + step) - scaled(0.8 - step)) / (2 * step)
    np.testing.assert_allclose(slope, numeric, rtol=2e-2)


@pytest.mark.slow
def test_adapters_can_be_differentiated_forward_and_twice():
    pair, (tokens, mask) = rm.adapter_pair(), rm.batch()
    x = decompose(pair, tokens, mask).embeddings
    v = jnp.asarray(np.random.default_rng(0).normal(size=x.shape), jnp.float32)

    def score(x):
        return tuco(pair, None, mask, embeddings=x).sum()

    slope, curved = jax.jit(lambda: jax.jvp(jax.grad(score), (x,), (v,)))()
    _, along = jax.jit(lambda: jax.jvp(score, (x,), (v,)))()
    np.testing.assert_allclose(along, jnp.vdot(slope, v), rtol=1e-4)
    assert np.isfinite(curved).all() and float(jnp.abs(curved).max()) > 0


def test_bfloat16_weights_accumulate_in_float32():
    pair = rm.full_pair()
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), pair)
    high = jax.tree.map(lambda a: a.astype(jnp.float32), low)
    tokens, mask = rm.batch()
    out = last_token(low, tokens, mask)
    assert out.ftc.dtype == out.tuco.dtype == jnp.float32
    assert float(out.telescoping.max()) < 1e-5
    np.testing.assert_allclose(out.tuco, last_token(high, tokens, mask).tuco, atol=0.02)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, t, m: eager_decompose(p), "either tokens"),
        (lambda p, t, m: tuco(p, None, m), "either tokens"),
        (lambda p, t, m: tuco(p, t, m, norm=3), "norm must be 1 or 2"),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call(rm.full_pair(), *rm.batch())


def test_remat_recomputes_and_changes_nothing():
    pair = rm.full_pair()
    tokens, mask = rm.batch()

    def total(x, remat):
        out = eager_decompose(pair, mask=mask, embeddings=x, alpha=0.7, remat=remat)
        return jnp.sum(jnp.square(out.ftc)) + jnp.sum(jnp.sin(out.hidden))

    slope = jax.grad(total)
    x = eager_decompose(pair, tokens, mask).embeddings
    plain, again = (jax.jit(slope, static_argnums=1)(x, remat) for remat in (False, True))
    np.testing.assert_allclose(plain, again, rtol=1e-4, atol=1e-5 * np.abs(plain).max())
    traced = [str(jax.make_jaxpr(slope, static_argnums=1)(x, remat)) for remat in (False, True)]
    plain, again = (text.count("remat") for text in traced)
    assert plain < again  # attention recomputes its inside with or without
