"""A grid of alphas in one call against one alpha at a time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from tests.tuco import random_models
from tests.tuco.random_models import adapter_pair, batch, different_configs, full_pair
from tests.tuco.tiny import FAMILIES, VOCAB, save_tiny
from tuco_jax.core import alpha_grid, engine, walk
from tuco_jax.core.alpha_grid import grid_logits
from tuco_jax.core.decompose import decompose
from tuco_jax.core.places import last_column
from tuco_jax.models.pair import Pair
from tuco_jax.models.sharding import place
from tuco_jax.weights.hf.model import load

ALPHAS = jnp.asarray([0.0, 0.75, 1.0, 1.3])
whole = jax.jit(
    lambda pair, tokens, mask, alpha: decompose(pair, tokens, mask, alpha, logits=True)
)


def one_by_one(pair, tokens, mask, alphas: Any = ALPHAS):
    """Logits [A, B, T, V], an alpha at a time; alphas [A] or [A, L]."""
    alphas = jnp.asarray(alphas)
    return np.stack(
        [whole(pair, tokens, mask, a if a.ndim == 0 else a[:, None]).logits for a in alphas]
    )


def last(logits, mask):
    """[A, B, V] of [A, B, T, V]."""
    return logits[:, np.arange(len(mask)), np.asarray(last_column(mask))]


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    """At alpha 1 also the tuned model's own logits, in transformers."""
    models, references = [], []
    for seed, name in enumerate(("base", "tuned")):
        references.append(save_tiny(tmp_path / name, family, seed, tokenizer=False)[0])
        models.append(load(str(tmp_path / name), tokenizer=False))
    base, tuned = models
    pair = Pair(base.params, tuned.params, {}, base.config, tuned.config)
    tokens, mask = batch(3, 16, vocab=VOCAB)  # windows are 4 or 5
    want = last(one_by_one(pair, tokens, mask), mask)
    got = grid_logits(pair, tokens, mask, ALPHAS)
    close(got, want)
    assert np.abs(want[0] - want[2]).max() > 0.01
    with torch.no_grad():
        reference: Any = references[1]
        for row in range(len(tokens)):
            text = np.asarray(tokens[row])[np.asarray(mask[row])]
            logits = reference(input_ids=torch.as_tensor(text)[None]).logits[0, -1].numpy()
            np.testing.assert_allclose(got[2, row], logits, rtol=1e-3, atol=1e-4)


def replaced_modules():
    pair = adapter_pair(6)
    other = random_models.params(pair.base_config, 60)
    tuned = {"head": other["head"], "layers": {"mlp_norm": other["layers"]["mlp_norm"]}}
    return dataclasses.replace(pair, tuned=tuned)


def one_layer():
    return full_pair(2, random_models.config(depth=1, rope_index=(), windows=()))


PAIRS = {
    "adapter": adapter_pair,
    "configs": different_configs,
    "modules": replaced_modules,
    "one layer": one_layer,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAIRS)
def test_every_kind_of_pair_at_given_columns_and_chunks(kind):
    pair = PAIRS[kind]()
    tokens, mask = batch(4, 8)
    columns = jnp.asarray(np.random.default_rng(0).integers(0, 8, (4, 2)))
    columns = jnp.minimum(columns, mask.sum(axis=1)[:, None] - 1)
    want = one_by_one(pair, tokens, mask)
    picked = want[:, np.arange(4)[:, None], np.asarray(columns)]
    for chunk in (1, 3):
        close(grid_logits(pair, tokens, mask, ALPHAS, columns, chunk=chunk), picked)


def test_an_alpha_a_layer_and_left_padding():
    pair = adapter_pair(3)
    alphas = np.random.default_rng(0).normal(1, 0.5, (2, 3)).astype(np.float32)
    tokens, mask = batch(3, 9, side="left")
    want = last(one_by_one(pair, tokens, mask, alphas), mask)
    close(grid_logits(pair, tokens, mask, jnp.asarray(alphas)), want)


@pytest.mark.slow
def test_over_a_mesh():
    pair = adapter_pair(1)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    tokens, mask = batch(4, 8)
    placed = place(pair, mesh)
    got = grid_logits(placed, tokens, mask, ALPHAS, mesh=mesh)
    close(got, grid_logits(pair, tokens, mask, ALPHAS))


def test_alphas_are_data():
    pair = adapter_pair(1)
    tokens, mask = batch(2, 8)
    grid_logits(pair, tokens, mask, jnp.asarray([0.1, 0.2, 0.3]))
    jitted: Any = walk._run_stacked, engine._begin, alpha_grid._logits
    compiled = [function._cache_size() for function in jitted]
    grid_logits(pair, tokens + 1, mask, jnp.asarray([0.4, 0.5, 0.6]))
    assert [function._cache_size() for function in jitted] == compiled


def test_lowers_for_tpu_and_gpu():
    tokens, mask = batch(2, 8)
    traced = jax.jit(grid_logits).trace(adapter_pair(1), tokens, mask, ALPHAS)
    assert traced.lower(lowering_platforms=("tpu", "cuda")).as_text()


@pytest.mark.slow
def test_bad_arguments():
    pair = adapter_pair(1)
    tokens, mask = batch(2, 8)
    with pytest.raises(InputError, match=r"alphas have shape \[2, 2\]: give \[A\].*\[A, 3\]"):
        grid_logits(pair, tokens, mask, jnp.ones((2, 2)))
    with pytest.raises(InputError, match=r"alphas have shape \[0\]"):
        grid_logits(pair, tokens, mask, jnp.ones(0))
