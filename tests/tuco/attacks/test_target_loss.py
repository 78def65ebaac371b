"""Losses of targets with reused keys are those of whole passes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tuco import random_models as rm
from tests.tuco.tiny import VOCAB
from tuco_jax.attacks.target_loss import (
    Pieces,
    cached_prompts,
    candidate_losses,
)
from tuco_jax.models import decoder
from tuco_jax.models.pair import Pair, single
from tuco_jax.models.positions import Positions


@pytest.fixture(scope="module")
def model():
    """Of rotary tables that change beyond 17 tokens: LongRoPE's, and dynamic NTK's."""
    long: dict[str, Any] = dict(long_frequencies=(0.9, 0.3, 0.1, 0.02), long_scale=1.1, switch=17)
    ropes = (
        dataclasses.replace(rm.rope(8), **long),
        dataclasses.replace(rm.rope(8, 500.0), dynamic_factor=2.0, switch=17),
    )
    config = rm.config(vocab_size=VOCAB, max_positions=96, ropes=ropes)
    return single(config, rm.params(config, 0), rm.lora(config, 1))


def pieces(seed: int = 0, sizes=(7, 4, 3, 5), vocab: int = VOCAB) -> Pieces:
    rng = np.random.default_rng(seed)
    return Pieces(*(rng.integers(0, vocab, n).astype(np.int32) for n in sizes))


@jax.jit
def whole_losses(model: Pair, rows: jax.Array, first: jax.Array, count: int):
    """Loss of the last tokens from `first` on, by one ordinary forward pass of whole rows."""
    config, params = model.tuned_config, model.tuned_params
    at = Positions.of(config, jnp.ones(rows.shape, bool))
    x = decoder.embed(config, params, rows, at)
    x, _ = decoder.forward(config, params, x, at, model.lora)
    logits = decoder.logits(config, params, x, model.lora)
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    own = jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=2)[..., 0]
    wanted = jnp.arange(rows.shape[1] - 1) >= first - 1
    return -jnp.sum(jnp.where(wanted[None], own, 0), axis=1) / count


def test_losses_with_reused_keys_are_those_of_whole_passes(model):
    prompts = [pieces(), pieces(1, (9, 4, 1, 2)), pieces(2, (1, 4, 6, 7))]
    candidates = np.random.default_rng(3).integers(0, VOCAB, (6, 4)).astype(np.int32)
    for p, cached in zip(prompts, cached_prompts(model, prompts), strict=True):
        got, greedy = candidate_losses(model, cached, jnp.asarray(candidates))
        rows = jnp.asarray([p._replace(attack=c).whole for c in candidates])
        first = p.whole.size - p.target.size
        expected = whole_losses(model, rows, first, p.target.size)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert greedy.shape == (6, 7) and greedy[:, p.target.size :].all()


def test_greedy_tokens_are_told(model):
    p = pieces()
    (cached,) = cached_prompts(model, [p])
    config, params = model.tuned_config, model.tuned_params
    at = Positions.of(config, jnp.ones((1, 14), bool))
    ids = np.concatenate(p[:3])
    x = decoder.embed(config, params, jnp.asarray(ids)[None], at)
    x, _ = decoder.forward(config, params, x, at, model.lora)
    first = int(decoder.logits(config, params, x[0, -1], model.lora).argmax())
    p = p._replace(target=np.asarray([first, (first + 1) % VOCAB], np.int32))
    (cached,) = cached_prompts(model, [p])
    _, greedy = candidate_losses(model, cached, jnp.asarray(p.attack)[None])
    assert bool(greedy[0, 0])
