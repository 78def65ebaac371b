"""Orbax stores: round trips, shards, and that nothing is overwritten by accident."""

import dataclasses
import json
import pathlib
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from tests.tuco import random_models as rm
from tests.tuco.tiny import save_tiny, tiny_tokenizer
from tuco_jax import tuco
from tuco_jax.models.pair import Notes
from tuco_jax.models.sharding import place, placement, shardings
from tuco_jax.weights import arrays
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.model import Model
from tuco_jax.weights.orbax import store

CONFIG = rm.config(vocab_size=64, width=32, rope_index=(0, 1, 1), norm_eps=1.2345678912345e-5)


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG, rm.params(CONFIG, 0), tiny_tokenizer(), "owner/name")


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("store") / "model"
    store.save(directory, model)
    return directory


def test_a_huggingface_config_goes_along(tmp_path):
    save_tiny(tmp_path / "hf", "gemma3_text", 3)
    one = huggingface.load(str(tmp_path / "hf"))
    store.save(tmp_path / "store", one)
    other = store.load(tmp_path / "store")
    assert other.hf_config is not None
    huggingface.export(
        tmp_path / "out", other.config, other.params, other.tokenizer, other.hf_config
    )
    assert huggingface.load(str(tmp_path / "out")).config == one.config
    chex.assert_trees_all_equal(huggingface.load(str(tmp_path / "out")).params, one.params)


def test_round_trip(model, stored):
    again = store.load(stored)
    chex.assert_trees_all_equal(again.params, model.params)
    assert again.config == model.config and hash(again.config) == hash(model.config)
    assert again.name == model.name and store.read_config(stored) == model.config
    assert again.tokenizer is not None
    assert again.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == model.tokenizer.chat_template
    assert store.load(stored, tokenizer=False).tokenizer is None
    assert store.is_store(stored) and not store.holds_pair(stored)
    assert not store.is_store(stored.parent)


@pytest.mark.parametrize("layout", [(1, 2, 4), (2, 4, 1), (8, 1, 1)], ids=str)
def test_restores_to_its_shards_under_any_mesh(model, stored, layout):
    mesh = make_mesh(*layout)
    again = store.load(stored, placement=placement(mesh))
    chex.assert_trees_all_equal(again.params, model.params)
    assert jax.tree.map(lambda x: x.sharding, again.params) == shardings(model.params, mesh)


def test_written_from_shards_and_cast_to_bfloat16(model, tmp_path):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    store.save(tmp_path / "low", model._replace(params=place(low, make_mesh(2, 2, 2))))
    chex.assert_trees_all_equal(store.load(tmp_path / "low", dtype="bfloat16").params, low)
    high = store.load(tmp_path / "low", dtype="float32").params
    chex.assert_trees_all_equal(high, jax.tree.map(lambda x: x.astype(jnp.float32), low))


@pytest.mark.parametrize("kind", ["full", "adapter", "mixed"])
def test_pairs(kind, tmp_path):
    pair = rm.adapter_pair(base=CONFIG) if kind == "adapter" else rm.full_pair(base=CONFIG)
    if kind == "mixed":  # an adapter that also replaces the embedding; empty branches
        tuned = {"embed": pair.tuned["embed"], "layers": {"mlp": {}}}
        config = dataclasses.replace(CONFIG, windows=(0, 0, 3))
        pair = dataclasses.replace(pair, tuned=tuned, tuned_config=config)
    pair = dataclasses.replace(pair, notes=Notes(["RoPE bases differ", "ünïcode"]))
    store.save_pair(tmp_path / "pair", pair, tiny_tokenizer())
    mesh = make_mesh(1, 4, 2)
    again, tokenizer = store.load_pair(tmp_path / "pair", placement=placement(mesh))
    chex.assert_trees_all_equal(jax.tree.leaves(again), jax.tree.leaves(pair))
    chex.assert_trees_all_equal(again.tuned_params, pair.tuned_params)
    assert (again.base_config, again.tuned_config) == (pair.base_config, pair.tuned_config)
    assert list(again.notes) == list(pair.notes)
    assert jax.tree.leaves(again)[0].sharding.mesh == mesh
    assert tokenizer is not None and len(tokenizer) == len(tiny_tokenizer())
    assert store.holds_pair(tmp_path / "pair")


def test_nothing_is_overwritten_unless_told(model, stored, tmp_path):
    before = sorted(stored.rglob("*"))
    with pytest.raises(InputError, match="exists; name a new directory, or allow overwriting"):
        store.save(stored, model)
    assert sorted(stored.rglob("*")) == before
    store.save(tmp_path / "store", model)
    other = model._replace(params=rm.params(CONFIG, 9), tokenizer=None)
    store.save(tmp_path / "store", other, overwrite=True)
    again = store.load(tmp_path / "store")
    chex.assert_trees_all_equal(again.params, other.params)
    assert again.tokenizer is None
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not a store, so it is not overwritten"):
        store.save(precious, model, overwrite=True)
    assert (precious / "thesis.txt").exists()


def test_a_save_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays, "save", fail)
    with pytest.raises(
        InputError, match="store: cannot be written: No space left on device; make"
    ):
        store.save(tmp_path / "store", model)
    assert not list(tmp_path.iterdir())


def test_a_store_whose_huggingface_config_is_spoilt_or_another_s_still_scores(tmp_path):
    """It is for an export alone, which then writes a store."""
    save_tiny(tmp_path / "hf", "llama", 3)
    one = huggingface.load(str(tmp_path / "hf"))
    store.save(tmp_path / "store", one)
    path = tmp_path / "store" / "config.json"
    other = json.loads(path.read_text()) | {"rms_norm_eps": 0.5}
    for text in (json.dumps(other), "{", ""):
        path.write_text(text)
        again = store.load(tmp_path / "store")
        assert again.hf_config is None and again.config == one.config
    path.unlink()
    assert store.load(tmp_path / "store").hf_config is None


@pytest.mark.parametrize("field", ["config", "name"])
def test_a_description_that_lacks_a_field(model, tmp_path, field):
    store.save(tmp_path / "store", model)
    path = tmp_path / "store" / "store.json"
    found = json.loads(path.read_text())
    del found[field]
    path.write_text(json.dumps(found))
    with pytest.raises(InputError, match=f"store.json: not the description .*it has no '{field}'"):
        store.load(tmp_path / "store")


def test_stores_of_the_first_version_are_read(tmp_path):
    """Written by the code of November 27, 2026: a model and a pair, their layers in one chunk."""
    with zipfile.ZipFile(pathlib.Path(__file__).parent / "version_1.zip") as file:
        file.extractall(tmp_path)
    wanted = np.load(tmp_path / "outputs.npz")
    tokens = wanted["tokens"]
    pair, tokenizer = store.load_pair(tmp_path / "pair")
    got = tuco(pair, jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
    np.testing.assert_allclose(got, wanted["tuco"], rtol=1e-5)
    assert list(pair.notes) == ["a note"] and tokenizer is None
    one = store.load(tmp_path / "model")
    assert one.config == pair.base_config and one.name == "owner/name"
    chex.assert_trees_all_equal(one.params, pair.base)
    opened = store.OpenPair(tmp_path / "pair")
    for index in range(pair.base_config.depth):
        base, tuned, _ = opened.layer(index)
        chex.assert_trees_all_equal(base, jax.tree.map(lambda x: x[index], pair.base["layers"]))  # noqa: B023
        chex.assert_trees_all_equal(tuned, jax.tree.map(lambda x: x[index], pair.tuned["layers"]))  # noqa: B023


def test_spoilt_stores_say_so(model, tmp_path):
    store.save(tmp_path / "store", model)
    description = tmp_path / "store" / "store.json"
    text = description.read_text()
    (tmp_path / "store" / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(InputError, match="params: incomplete or corrupt") as caught:
        store.load(tmp_path / "store")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="dtype 'int4' is not one of float32"):
        store.load(tmp_path / "store", dtype="int4")
    description.write_text(text.replace("version 2", "version 9"))  # one yet to come
    with pytest.raises(InputError, match="store.json: not the .*; import it again") as caught:
        store.load(tmp_path / "store")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the store holds one model, not a pair"):
        description.write_text(text)
        store.load_pair(tmp_path / "store")
