import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tuco import random_models
from tests.tuco.finetune.test_batches import examples
from tuco_jax.finetune.batches import pack
from tuco_jax.finetune.loss import _pieces, answer_loss
from tuco_jax.models import decoder
from tuco_jax.models.positions import Positions

SIZES = [11, 4, 19]


@pytest.fixture(scope="module")
def model():
    config = random_models.config()
    return config, random_models.params(config, 1), random_models.lora(config, 2)


def data(config):
    made = examples(SIZES, seed=4)
    return [type(e)(e.tokens % config.vocab_size, e.answer) for e in made]


def unpacked(config, params, lora, data):
    """All logits of padded rows of one example each, then the sum of -log p of answer tokens."""
    tokens = np.zeros((len(data), max(SIZES)), np.int32)
    answer, mask = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row, example in enumerate(data):
        size = example.tokens.size
        tokens[row, :size], answer[row, :size], mask[row, :size] = (
            example.tokens,
            example.answer,
            1,
        )
    positions = Positions.of(config, jnp.asarray(mask))
    x = decoder.embed(config, params, jnp.asarray(tokens), positions)
    x, _ = decoder.forward(config, params, x, positions, lora)
    logp = jax.nn.log_softmax(decoder.logits(config, params, x, lora))[:, :-1]
    chosen = jnp.take_along_axis(logp, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(answer[:, 1:], chosen, 0))


@pytest.mark.slow
def test_packed_loss_and_gradient_equal_the_unpacked(model):
    config, params, lora = model
    table = pack(data(config), 24)
    assert table.segments.max() > 1
    packed = jax.jit(jax.value_and_grad(lambda lora: answer_loss(config, params, lora, table)))
    plain = jax.jit(jax.value_and_grad(lambda lora: unpacked(config, params, lora, data(config))))
    (loss, grads), (expected, gradient) = packed(lora), plain(lora)
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradient))
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_learned_positions_restart_too():
    config = random_models.config(ropes=(), rope_index=(0, 0, 0))
    params = random_models.params(config, 3)
    table = pack(data(config), 24)
    loss = jax.jit(lambda p: answer_loss(config, p, {}, table))(params)
    expected = jax.jit(lambda p: unpacked(config, p, {}, data(config)))(params)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)


def test_other_documents_do_not_leak(model):
    config, params, lora = model
    table = pack(data(config), 24)
    row = int(np.argmax(table.segments.max(axis=1)))
    other = np.array(table.tokens)
    first = table.segments[row] == 1
    other[row, first] = (other[row, first] + 1) % config.vocab_size
    weights = np.array(table.weights)
    weights[:row], weights[row + 1 :] = 0, 0
    weights[row] *= table.segments[row][table.columns[row]] > 1
    assert weights.sum() > 0
    table = table._replace(weights=weights)
    loss = jax.jit(lambda tokens: answer_loss(config, params, lora, table._replace(tokens=tokens)))
    assert loss(table.tokens) == loss(other)


def test_logits_in_pieces_and_remat_change_nothing(model):
    config, params, lora = model
    table = pack(data(config), 24)

    def way(lora, **options):
        whole = functools.partial(answer_loss, config, params, batch=table, **options)
        return jax.jit(jax.value_and_grad(lambda lora: whole(lora=lora)))(lora)

    expected, gradient = way(lora)
    loss, grads = way(lora, logits_at_once=1000, remat=True)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_pieces_are_the_fewest_that_fit():
    assert _pieces(120, 120 * 10, 1200) == 1
    assert _pieces(120, 120 * 10, 1199) == 2
    assert _pieces(120, 120 * 10, 300) == 4
    assert _pieces(120, 120 * 10, 1) == 120
