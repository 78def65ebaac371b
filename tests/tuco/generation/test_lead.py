"""What a batch's prompts begin with: which it is, and what it changes of the numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.mesh import make_mesh
from tests.tuco import random_models as rm
from tuco_jax.core import walk
from tuco_jax.generation import decoding, generate
from tuco_jax.generation.generate import generate_tokens
from tuco_jax.generation.lead import led
from tuco_jax.generation.sampling import Sampling, row_keys
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import place
from tuco_jax.prompts.batching import Batch, bucket_length, pad

BASE = rm.config(windows=(4, 0, 0), max_positions=128)


def prompts():
    """Behind two heads, some leaving theirs early; some that grow; one of its own."""
    rng = np.random.default_rng(0)
    heads = rng.integers(0, 61, 40), rng.integers(0, 61, 27)
    made = [np.append(heads[i % 2], rng.integers(0, 61, n)) for i, n in enumerate((3, 5, 1, 2, 4))]
    made += [np.append(heads[0][:30], rng.integers(0, 61, 4)), heads[0][:25], heads[0]]
    return [*made, rng.integers(0, 61, 9)]


def test_beginnings_of_a_batch():
    rows = prompts()
    tokens, mask, lead = led(rows, 16, [0] * 9)
    assert lead is not None and lead.tokens.shape == (2, 64) and tokens.shape == (16, 16)
    for row in range(16):
        here = np.asarray(lead.tokens[lead.follows[row]])[np.asarray(lead.seen[row])]
        want = rows[row if row < 9 else 0]
        np.testing.assert_array_equal(np.concatenate([here, tokens[row][mask[row]]]), want)
    assert lead.seen[:9].sum(axis=1).tolist() == [40, 27, 40, 27, 40, 30, 24, 39, 0]


def test_where_little_is_shared_nothing_is_led():
    rng = np.random.default_rng(1)
    apart = [rng.integers(0, 61, 40) for _ in range(8)]
    assert led(apart, 8, [0] * 8)[2] is None
    assert led(prompts(), 16, range(9))[2] is None, "of kinds of their own"
    assert led(prompts()[:1], 1, [0])[2] is None


@pytest.mark.parametrize("source", [walk.Split, walk.Stacked.of])
@pytest.mark.parametrize("alpha", [None, 0.6])
def test_streams_behind_a_lead_are_those_of_whole_rows(source, alpha):
    """Closer than equal tokens: what the first new token, and the next, are chosen from."""
    pair = rm.adapter_pair(base=BASE) if alpha is None else rm.full_pair(base=BASE)
    rows, size = prompts(), 9
    found = source(pair)
    alphas = None if alpha is None else jnp.full((3, size), alpha)
    nothing = jnp.zeros(size, jnp.int32)
    request = decoding.Request(
        alphas, nothing + 4, nothing, row_keys(0, jnp.arange(size)), nothing[:0], Sampling.of()
    )
    width = bucket_length(max(map(len, rows)))
    whole = pad(rows, Batch(tuple(range(size)), size, width))
    given: list[Any] = [(*whole, None), led(rows, size, [0] * size)]
    assert given[1][2] is not None
    streams, firsts = [], []
    for tokens, mask, lead in given:
        progress = decoding.begin(found, request, tokens, mask, lead, room=4)
        firsts.append(np.asarray(progress.tokens))
        more = jnp.asarray(np.random.default_rng(2).integers(0, 61, (size, 3)))
        streams.append(np.asarray(decoding.advance(found, progress.cache, more, alphas)[0]))
    np.testing.assert_array_equal(*firsts)
    scale = max(1.0, float(np.abs(streams[0]).max()))
    np.testing.assert_allclose(streams[1], streams[0], rtol=0, atol=1e-5 * scale)


def switching(switch: int, **changes: Any) -> Pair:
    """Frequencies that change within the prompts' lengths, and once more while they grow."""
    ropes = (dataclasses.replace(BASE.ropes[0], switch=switch, **changes),) * 2
    return rm.full_pair(base=dataclasses.replace(BASE, ropes=ropes))


PAIRS = {
    "windows": lambda: rm.full_pair(base=BASE),
    "LongRoPE": lambda: switching(42, long_frequencies=(0.9, 0.3, 0.1, 0.02), long_scale=1.1),
    "dynamic NTK": lambda: switching(46, dynamic_factor=2.0),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_answers_are_those_of_prompts_alone(kind, monkeypatch):
    """A batch of one has no lead. Alphas of three kinds: only rows of one share."""
    pair, leads = PAIRS[kind](), []

    def spied(*given: Any) -> Any:
        leads.append(led(*given)[2])
        return led(*given)

    monkeypatch.setattr(generate, "led", spied)
    rows = prompts()
    alpha = np.asarray([0.5, 0.8, 1.0])[[0, 1, 0, 1, 0, 0, 0, 0, 2]]
    got = generate_tokens(pair, rows, alpha, max_new_tokens=6)
    assert any(lead is not None for lead in leads)
    alone = generate_tokens(pair, rows, alpha, max_new_tokens=6, batch_size=1)
    assert [t.tolist() for t in got] == [t.tolist() for t in alone]


def test_on_a_mesh():
    pair = PAIRS["windows"]()
    want = generate_tokens(pair, prompts(), 0.7, max_new_tokens=4)
    mesh = make_mesh(2, 2, 2)
    got = generate_tokens(place(pair, mesh), prompts(), 0.7, max_new_tokens=4, mesh=mesh)
    assert [t.tolist() for t in got] == [t.tolist() for t in want]


def test_a_lead_is_part_of_the_compiled_prefill():
    pair = rm.full_pair(base=BASE)
    tokens, mask, lead = led(prompts(), 9, [0] * 9)
    nothing = jnp.zeros(9, jnp.int32)
    keys = row_keys(0, jnp.arange(9))
    request = decoding.Request(None, nothing, nothing, keys, nothing[:0], Sampling.of())
    traced = jax.jit(decoding.begin, static_argnames="room").trace(
        walk.Stacked.of(pair), request, tokens, mask, lead, room=4
    )
    assert traced.lower(lowering_platforms=("tpu", "cuda")).as_text()
