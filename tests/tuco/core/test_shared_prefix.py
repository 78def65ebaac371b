"""Rows behind prefixes give what whole rows give, over every source and on a mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.mesh import make_mesh
from tests.tuco import random_models as rm
from tuco_jax.core.alpha_grid import AlphaGrid, layer_alphas
from tuco_jax.core.decompose import decompose
from tuco_jax.core.engine import run
from tuco_jax.core.last_token import LastTokens, last_tokens
from tuco_jax.core.streamed import Streamed
from tuco_jax.core.walk import Split, Stacked
from tuco_jax.models.sharding import place, put_rows
from tuco_jax.prompts.packing import Packed
from tuco_jax.prompts.prefixes import Behind
from tuco_jax.scoring.engine import engine_of

CONFIG = rm.config(width=32, mlp_width=48, kv_heads=4, vocab_size=64)
PAIRS = {"full": rm.full_pair(base=CONFIG), "adapter": rm.adapter_pair(base=CONFIG)}
HEADS = (9, 4)  # beyond the window of 5, and within it


def prompts():
    """Twelve prompts: even ones behind the longer head, odd ones behind the shorter."""
    rng = np.random.default_rng(3)
    heads = [rng.integers(0, 64, n) for n in HEADS]
    tails = [rng.integers(0, 64, n) for n in (1, 2, 5, 3, 4, 1, 2, 6, 3, 5, 7, 2)]
    return [np.concatenate([heads[i % 2], t]).astype(np.int32) for i, t in enumerate(tails)]


ROWS = ((0, 2), (4, 6), (1, 3), (8,), (5, 7), (10,), (9, 11))
STARTS = (
    (7, 9),
    (9, 7),
    (4, 1),
    (4,),
    (3, 4),
    (8,),
    (4, 3),
)  # most leave their head before its end
BATCH = Behind(
    ROWS,
    8,
    8,
    2,
    ((9, 0), (4, 1)),
    count=2,
    width=12,
    follows=(0, 0, 1, 0, 1, 0, 1),
    starts=STARTS,
    chunks=2,
)
ONE = Behind(
    ((1,), (3,), (5,)),
    4,
    8,
    1,
    ((4, 1),),
    count=1,
    width=4,
    follows=(0, 0, 0),
    starts=((4,), (2,), (0,)),
    chunks=1,
)


def engine(batch: Packed, mesh: Any = None, of: Any = LastTokens, **options: Any):
    rows = put_rows(jax.tree.map(jnp.asarray, batch.arrays(prompts())), mesh)
    return engine_of(rows, functools.partial(of, mesh=mesh, **options))


def close(got: Any, batch: Packed, pair: Any):
    for r, row in enumerate(batch.rows):
        for c, i in enumerate(row):
            whole = jnp.asarray(prompts()[i][None])
            want = last_tokens(pair, whole, jnp.ones(whole.shape, bool))
            for name in ("tuco", "layers", "ptc", "ftc"):
                a, b = getattr(got, name), getattr(want, name)
                a = a[:, r, c] if name == "layers" else a[r, c]
                b = b[:, 0, 0] if name == "layers" else b[0, 0]
                scale = max(1.0, float(np.abs(b).max()))
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("source", [Split, Streamed.of, Stacked.of])
def test_rows_behind_two_prefixes(kind, source):
    close(run(engine(BATCH), source(PAIRS[kind])), BATCH, PAIRS[kind])


def test_one_prefix_and_a_prompt_a_row():
    close(run(engine(ONE), Split(PAIRS["full"])), ONE, PAIRS["full"])


def test_one_layer():
    pair = rm.full_pair(
        base=rm.config(width=32, vocab_size=64, depth=1, rope_index=(0,), windows=(0,))
    )
    close(run(engine(ONE), Stacked.of(pair)), ONE, pair)


def test_frequencies_that_depend_on_lengths():
    """LongRoPE: every prompt behind the shorter head has more tokens than the switch."""
    rope = dataclasses.replace(
        CONFIG.ropes[0], long_frequencies=(0.9, 0.3, 0.1, 0.02), long_scale=1.1, switch=4
    )
    pair = rm.full_pair(base=dataclasses.replace(CONFIG, ropes=(rope, rope)))
    close(run(engine(ONE), Split(pair)), ONE, pair)


def test_on_a_mesh():
    mesh = make_mesh(2, 2, 2)
    source = Stacked.of(place(PAIRS["full"], mesh))
    close(jax.jit(run)(engine(BATCH, mesh), source), BATCH, PAIRS["full"])


ALPHAS = (0.4, 1.0, 1.3)
whole = jax.jit(
    lambda pair, tokens, mask, alpha: decompose(pair, tokens, mask, alpha, layers=False).hidden
)


def close_grid(got: Any, batch: Packed, pair: Any):
    """Against one alpha at a time over whole rows."""
    for r, row in enumerate(batch.rows):
        for c, i in enumerate(row):
            ids = np.zeros((1, 16), np.int32)
            n = prompts()[i].size
            ids[0, :n] = prompts()[i]
            mask = jnp.arange(16)[None] < n
            for a, alpha in enumerate(ALPHAS):
                want = whole(pair, jnp.asarray(ids), mask, jnp.float32(alpha))[0, n - 1]
                scale = max(1.0, float(np.abs(want).max()))
                np.testing.assert_allclose(got[a, r, c], want, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("kind", "source", "chunk"), [("full", Split, 3), ("adapter", Stacked.of, 2)]
)
def test_alphas_behind_two_prefixes(kind, source, chunk):
    alphas = layer_alphas(ALPHAS, CONFIG.depth)
    made = engine(BATCH, of=AlphaGrid, alphas=alphas, chunk=chunk)
    close_grid(run(made, source(PAIRS[kind])), BATCH, PAIRS[kind])


def test_alphas_on_a_mesh():
    mesh = make_mesh(2, 2, 2)
    source = Stacked.of(place(PAIRS["full"], mesh))
    made = engine(BATCH, mesh, AlphaGrid, alphas=layer_alphas(ALPHAS, CONFIG.depth))
    close_grid(jax.jit(run)(made, source), BATCH, PAIRS["full"])


def test_alphas_of_one_layer():
    pair = rm.full_pair(
        base=rm.config(width=32, vocab_size=64, depth=1, rope_index=(0,), windows=(0,))
    )
    made = engine(ONE, of=AlphaGrid, alphas=layer_alphas(ALPHAS, 1))
    close_grid(run(made, Stacked.of(pair)), ONE, pair)


def test_kernels_lower_for_accelerators():
    source = Stacked.of(PAIRS["full"])
    traced = jax.jit(run).trace(engine(BATCH), source)
    assert traced.lower(lowering_platforms=("tpu", "cuda")).as_text()
