"""Decoding with caches: the stream of the whole text, few programs, every platform."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.tuco.random_models import different_configs, full_pair
from tuco_jax.core import walk
from tuco_jax.core.cache import Cache
from tuco_jax.core.decompose import decompose
from tuco_jax.generation import decoding
from tuco_jax.generation.generate import generate_tokens
from tuco_jax.models.pair import Notes

PROMPTS = [np.random.default_rng(n).integers(0, 61, n) for n in (3, 13, 1, 8, 5)]


def test_logits_from_caches_are_those_of_the_whole_text():
    """Closer than equal tokens: the stream itself, prompt and new columns, at alpha 0.6."""
    pair = different_configs()
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 61, (3, 14)))
    mask = jnp.arange(8)[None] < jnp.asarray([8, 3, 5])[:, None]
    alpha = jnp.full((3, 3), 0.6)
    source = walk.Stacked.of(pair)
    cache = Cache.empty(source.ends, mask, 6, both=True)
    advance = jax.jit(decoding.advance)
    x, cache = advance(source, cache, tokens[:, :8], alpha)
    streams = [x]
    for column in range(8, 14):
        x, cache = advance(source, cache, tokens[:, column, None], alpha)
        streams.append(x)
    got = jnp.concatenate(streams, axis=1)
    whole_mask = jnp.concatenate([mask, jnp.ones((3, 6), bool)], axis=1)
    want = jax.jit(decompose)(pair, tokens, whole_mask, 0.6).hidden
    assert int(cache.filled) == 14
    np.testing.assert_allclose(got[whole_mask], want[whole_mask], atol=1e-4, rtol=1e-5)


def compiled(function: Any) -> int:
    return function._cache_size()


def test_compilations_are_few():
    pair = full_pair(8)
    counted: Any = walk._one_cached, decoding._enter, decoding._emit
    for function in counted:  # what other tests compiled may be dropped while this one runs
        function.clear_cache()
    for prompts, new, alpha in (
        (PROMPTS, 33, 0.5),
        (PROMPTS[::-1], 40, 0.9),
        ([p[:2] for p in PROMPTS], 36, np.linspace(0, 0.5, len(PROMPTS))),
    ):
        generate_tokens(pair, prompts, alpha, max_new_tokens=new)
    other = dataclasses.replace(full_pair(9), notes=Notes(("moved",)))
    generate_tokens(other, PROMPTS, 0.5, max_new_tokens=40)
    # A layer's and what is before it: of prompts, and of one token; what is after it: of a token.
    assert [compiled(function) for function in counted] == [2, 2, 1]
