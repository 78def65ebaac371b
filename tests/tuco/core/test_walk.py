"""Every engine over every source gives the same numbers, eager, jitted and on a mesh.

Split and streamed sources are eager only: their loop over layers is Python's. Stacked layers run
eager, jitted and on a mesh.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.mesh import make_mesh
from tests.tuco import random_models as rm
from tuco_jax.attacks.target_loss import Pieces, cached_prompts, candidate_losses, token_gradient
from tuco_jax.core.alpha_grid import AlphaGrid, grid_logits, layer_alphas
from tuco_jax.core.cache import Cache
from tuco_jax.core.decompose import decompose
from tuco_jax.core.engine import run
from tuco_jax.core.last_token import last_token, last_tokens
from tuco_jax.core.places import last_column
from tuco_jax.core.shared_prefix import SharedPrefixes
from tuco_jax.core.streamed import Streamed
from tuco_jax.core.trajectories import output_co, trajectories
from tuco_jax.core.walk import Split, Stacked, program, source_of
from tuco_jax.generation import decoding
from tuco_jax.generation.generate import generate_tokens
from tuco_jax.generation.sampling import Sampling, row_keys
from tuco_jax.models.sharding import mesh_of, place

CONFIG = rm.config(width=32, mlp_width=48, kv_heads=4, vocab_size=64)
PAIRS = {"full": rm.full_pair(base=CONFIG), "adapter": rm.adapter_pair(base=CONFIG)}


SOURCES = {"split": Split, "streamed": Streamed.of, "stacked": Stacked.of}


def inputs():
    tokens, mask = rm.batch(rows=8, vocab=64)
    return tokens, mask


def packed():
    """Two prompts a row: segments [B, T] and last columns [B, 2]."""
    tokens, _ = rm.batch(rows=8, vocab=64)
    cut = jnp.asarray([1, 4, 10, 6, 7, 3, 5, 2])[:, None]
    segments = 1 + (jnp.arange(tokens.shape[1])[None] >= cut).astype(jnp.int32)
    columns = jnp.concatenate([cut - 1, jnp.full((8, 1), tokens.shape[1] - 1)], axis=1)
    return tokens, segments, columns


def decoded(source: Any, mesh: Any = None, alpha: Any = 0.7):
    """The stream of a prompt and of three more columns, and what is emitted."""
    tokens, mask = inputs()
    tokens = jnp.where(mask, tokens, 0)
    alphas = None if alpha is None else jnp.full((3, 8), alpha)
    cache = Cache.empty(source.ends, mask, 3, both=alpha is not None)
    x, cache = decoding.advance(source, cache, tokens, alphas, mesh=mesh)
    found = [jnp.where(mask[..., None], x, 0)]
    for step in range(3):
        new = jnp.full((8, 1), step + 5)
        x, cache = decoding.advance(source, cache, new, alphas, mesh=mesh)
        found.append(x)
    return found, cache.filled


def resumed(source: Any, mesh: Any = None):
    """Twelve tokens of each row, sampled."""
    tokens, mask = inputs()
    request = decoding.Request(
        alpha=jnp.full((3, 8), 0.6),
        limits=jnp.full(8, 12),
        before=jnp.zeros(8, jnp.int32),
        keys=row_keys(0, jnp.arange(8)),
        eos=jnp.asarray([1]),
        sampling=Sampling.of(temperature=1.0, top_k=5, top_p=0.9),
    )
    progress = decoding.begin(source, request, tokens, mask, room=16, mesh=mesh)
    progress = decoding.resume(source, request, progress, 4, mesh=mesh)
    progress = decoding.resume(source, request, progress, 12, mesh=mesh)
    return progress.tokens, progress.counts, progress.stopped


def packed_scores(source: Any, mesh: Any = None):
    tokens, segments, columns = packed()
    mask = jnp.ones(tokens.shape, bool)
    return last_tokens(source, tokens, mask, columns=columns, segments=segments, mesh=mesh)


def grid(source: Any, mesh: Any = None):
    return grid_logits(source, *inputs(), jnp.asarray([0.0, 0.5, 1.0, 1.3]), chunk=2, mesh=mesh)


def grid_behind_prefix(source: Any, mesh: Any = None):
    tokens, mask = (a[:, None] for a in inputs())
    columns = last_column(mask[:, 0])[:, None, None]
    alphas, segments = layer_alphas([0.4, 1.2], 3), mask.astype(int)
    rows = AlphaGrid(tokens, mask, columns, alphas, segments, mesh=mesh)
    prefix = jnp.arange(7)[None] * 5
    real, follows = jnp.ones(prefix.shape, bool), jnp.zeros((8, 1), int)
    starts = jnp.full(tokens.shape, 7)
    return run(SharedPrefixes(rows, prefix, real, jnp.asarray([8]), follows, starts), source)


def target_losses(source: Any, mesh: Any = None):
    rng = np.random.default_rng(1)
    prompts = [Pieces(*(rng.integers(0, 64, n) for n in sizes)) for sizes in ((7, 4, 3, 5),) * 2]
    cached = cached_prompts(source, prompts)[0]
    attacks = jnp.asarray(rng.integers(0, 64, (8, 4)), jnp.int32)
    return candidate_losses(source, cached, attacks, mesh=mesh)


def gradient(source: Any, mesh: Any = None):
    """By one attack's tokens; stacked layers alone, since it is a compiled function."""
    rng = np.random.default_rng(1)
    pieces = Pieces(*(rng.integers(0, 64, n) for n in (7, 4, 3, 5)))
    cached = cached_prompts(source, [pieces])[0]
    return token_gradient(source, cached, jnp.asarray(pieces.attack), mesh=mesh)


def decomposed(source: Any, mesh: Any = None, **options: Any):
    tokens, mask = inputs()
    out = decompose(source, tokens, mask, mesh=mesh, **options)
    return jax.tree.map(
        lambda a: jnp.where(mask[..., None], a, 0) if a.shape[-3:-1] == mask.shape else a, out
    )


ENGINES = {
    "score": lambda s, mesh=None: last_token(s, *inputs(), mesh=mesh),
    "packed score": packed_scores,
    "score, norm 2": lambda s, mesh=None: last_token(s, *inputs(), norm=2, mesh=mesh),
    "decompose": functools.partial(decomposed, alpha=0.8, parts=True, logits=True),
    "decompose by layer": functools.partial(decomposed, layers=True),
    "trajectories": lambda s, mesh=None: trajectories(s, *inputs(), mesh=mesh),
    "output-co": lambda s, mesh=None: output_co(s, *inputs(), mesh=mesh),
    "alpha grid": grid,
    "alpha grid behind a prefix": grid_behind_prefix,
    "prefill and decode": decoded,
    "decode, tuned alone": functools.partial(decoded, alpha=None),
    "generation": resumed,
    "target loss": target_losses,
    "token gradient": gradient,
}
COMPILED = {"token gradient"}  # engines of stacked layers alone


def close(got: Any, want: Any):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, float(np.abs(np.asarray(b)).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)


@functools.cache
def expected(engine: str, kind: str):
    """In one program, over stacked layers."""
    return jax.jit(ENGINES[engine])(Stacked.of(PAIRS[kind]))


@pytest.mark.parametrize(
    ("engine", "source"),
    [(e, s) for e in ENGINES for s in SOURCES if s == "stacked" or e not in COMPILED],
)
@pytest.mark.parametrize("kind", PAIRS)
def test_every_engine_over_every_source(kind, engine, source):
    """Eager; `expected` is jitted."""
    close(ENGINES[engine](SOURCES[source](PAIRS[kind])), expected(engine, kind))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", PAIRS)
def test_every_engine_on_a_mesh(kind, engine):
    mesh = make_mesh(2, 2, 2)
    source = Stacked.of(place(PAIRS[kind], mesh))
    close(jax.jit(functools.partial(ENGINES[engine], mesh=mesh))(source), expected(engine, kind))


def test_one_layer():
    pair = rm.full_pair(base=rm.config(depth=1, rope_index=(0,), windows=(0,)))
    tokens, mask = rm.batch()
    for engine in (
        lambda s: last_token(s, tokens, mask),
        lambda s: grid_logits(s, tokens, mask, jnp.asarray([0.3, 1.0])),
    ):
        close(engine(Split(pair)), jax.jit(engine)(Stacked.of(pair)))


def test_programs_are_shared_by_layers_and_calls():
    """Two a shape beside those before and after the layers: a middle layer's and the last's."""
    deep = rm.config(depth=5, rope_index=(0,) * 5, windows=(0,) * 5)
    sources = [Split(rm.full_pair(seed, base=deep)) for seed in range(2)]
    function = program(next(iter(sources[0].layers(0, 1))))
    function.clear_cache()
    for seed, source in enumerate(sources):
        last_token(source, *rm.batch(seed=seed))
    assert function._cache_size() == 2


@pytest.mark.parametrize("precision", ["bfloat16x3", "bfloat16x2"])
def test_parts_on_a_cpu_are_fused(precision):
    """Their program has options of its own, which change what is fused and no number."""
    wide = rm.full_pair(3)
    pair = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide).at(precision)
    source, batch = Split(pair), rm.batch(seed=4)
    fused = program(next(iter(source.layers(0, 1))))
    assert fused is not program(next(iter(Split(wide).layers(0, 1))))
    fused.clear_cache()
    found = last_token(source, *batch)
    assert fused._cache_size() == 2
    close(found, jax.jit(last_token)(Stacked.of(pair), *batch))
    cached = program(next(iter(source.layers(0, 1))), cached=True)
    assert cached is not program(next(iter(Split(wide).layers(0, 1))), cached=True)
    cached.clear_cache()
    generate_tokens(pair, [np.arange(1, 6)], 0.5, max_new_tokens=2)
    assert cached._cache_size() == 2  # of prompts, and of one token


def test_split_weights_are_views():
    """Matrices whose size is a multiple of 64 bytes: an odd one would be copied, and work, too."""
    pair = rm.full_pair()
    stacked = pair.base["layers"]["mlp"]["up"]["kernel"]
    assert stacked[0].nbytes % 64 == 0
    start = stacked.unsafe_buffer_pointer()
    for index, layer in enumerate(Split(pair).layers(0, 3)):
        kernel = layer.params["mlp"]["up"]["kernel"]
        assert kernel.unsafe_buffer_pointer() == start + index * stacked[0].nbytes


def test_which_source():
    pair = rm.full_pair()
    assert isinstance(source_of(pair), Split)
    elsewhere = jax.device_put(pair.base, jax.devices()[1])
    assert isinstance(source_of(dataclasses.replace(pair, base=elsewhere)), Stacked)
    assert jax.jit(lambda p: isinstance(source_of(p), Stacked) * 1)(pair) == 1
    streamed = Streamed.of(pair)
    assert source_of(streamed) is streamed and source_of(streamed).streams
    mesh = make_mesh(2, 2, 2)
    over = source_of(pair, mesh)
    assert isinstance(over, Stacked) and mesh_of(over.ends) == mesh


@pytest.mark.parametrize("kind", PAIRS)
def test_layers_are_the_same_in_every_source(kind):
    per_source = [list(source(PAIRS[kind]).layers(1, 3)) for source in SOURCES.values()]
    for layers in zip(*per_source, strict=True):
        for other in layers[1:]:
            chex.assert_trees_all_equal(layers[0], other)
