"""Whether two models are one before and after tuning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tuco import random_models as rm
from tests.tuco.tiny import save_tiny, tiny_tokenizer
from tuco_jax.core.decompose import decompose
from tuco_jax.models.pair import single
from tuco_jax.weights import kinship
from tuco_jax.weights.load import load_pair

CONFIG = rm.config(width=64, mlp_width=128)


def pair_of(base, tuned):
    return dataclasses.replace(single(CONFIG, base), tuned=tuned)


def notes(base, tuned):
    """Of layers by themselves; those of stacked ones are the same."""
    params = base["layers"], tuned["layers"]

    def layer(index):
        return kinship.matrices(*jax.tree.map(lambda x: x[index], params))

    found = kinship.notes(layer, CONFIG.depth)
    whole = kinship.notes(lambda _: kinship.matrices(*params), CONFIG.depth, stacked=True)
    assert found == whole
    return found


def changed(params, seed, size):
    """Every tensor with noise of so many times its own size."""
    rng = np.random.default_rng(seed)

    def leaf(x):
        noise = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        return x + size * jnp.sqrt(jnp.mean(x**2)) * noise

    return jax.tree.map(leaf, params)


def test_strangers_are_named_and_a_tuned_model_is_not():
    base, other = rm.params(CONFIG, 0), rm.params(CONFIG, 1)
    (note,) = notes(base, other)
    assert "unrelated" in note and "layers 0, 1, 2" in note and "0.0% of their" in note
    assert notes(base, changed(base, 2, 0.05)) == []
    assert notes(base, changed(base, 2, 2.0)) == []  # more noise than weights: correlation .45


def test_the_value_for_strangers_is_what_strangers_give():
    """.59, where both models' blocks add vectors of one size, at many widths of any norm."""
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2, 10_000))
    ftc = np.abs(new - old).sum()
    assert ftc / (ftc + np.abs(old).sum()) == pytest.approx(0.59, abs=0.01)
    tokens = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (4, 12)))
    out = decompose(pair_of(rm.params(CONFIG, 0), rm.params(CONFIG, 1)), tokens)
    ptc, ftc = (np.abs(x[:, -1]).sum(-1) for x in (out.ptc, out.ftc))
    assert np.mean(ftc / (ptc + ftc)) == pytest.approx(0.59, abs=0.05)


def test_one_model_twice_is_named():
    base = rm.params(CONFIG, 0)
    (note,) = notes(base, jax.tree.map(jnp.array, base))
    assert "all matrices in layers 0, 1, 2 are equal" in note
    other = jax.tree.map(jnp.array, base)
    kernel = other["layers"]["mlp"]["down"]["kernel"]
    other["layers"]["mlp"]["down"]["kernel"] = kernel.at[2, 5, 3].add(1e-3)
    assert notes(base, other) == []


def test_matrices_in_another_order_are_named():
    base = rm.params(CONFIG, 0)
    tuned = changed(base, 1, 0.01)
    kernel = tuned["layers"]["attention"]["q"]["kernel"]
    order = np.random.default_rng(0).permutation(kernel.shape[-1])
    tuned["layers"]["attention"]["q"]["kernel"] = kernel[..., order]
    (note,) = notes(base, tuned)
    assert "attention.q (" in note and "attention.k" not in note and "order" in note


def test_many_layers_are_sampled():
    seen = []

    def layer(index):
        seen.append(index)
        params = jax.tree.map(lambda x: x[0], rm.params(CONFIG, 0)["layers"])
        return kinship.matrices(params, params)

    kinship.notes(layer, 31)
    assert seen == [0, 15, 30]


def test_files_of_strangers_are_noted_when_loaded(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        save_tiny(tmp_path / name, "llama", seed=seed)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    pair, _ = load_pair(str(tmp_path / "base"), str(tmp_path / "tuned"))
    assert any("unrelated" in note for note in pair.notes)
    same, _ = load_pair(str(tmp_path / "base"), str(tmp_path / "base"))
    assert any("are equal" in note for note in same.notes)
