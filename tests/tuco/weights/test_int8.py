"""Matrices as int8: what rounding costs, and that nothing else does, in every engine."""

import dataclasses
import functools
import json
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from common_jax.cost import collectives
from common_jax.errors import InputError
from common_jax.mesh import batch_sharding, make_mesh
from tests.tuco import random_models as rm
from tests.tuco.cli_pair import read_jsonl, run_in_process, save_pair, write_jsonl
from tests.tuco.test_parallel import CONFIG
from tests.tuco.tiny import save_tiny, tiny_tokenizer
from tests.tuco.weights.peft import test_adapter, test_read
from tuco_jax.core.decompose import decompose
from tuco_jax.core.last_token import last_token, tuco
from tuco_jax.core.streamed import Streamed
from tuco_jax.core.walk import Split, Stacked
from tuco_jax.finetune.finetune import run_finetune
from tuco_jax.finetune.options import FinetuneConfig
from tuco_jax.generation.generate import generate_tokens
from tuco_jax.models.sharding import place, placement
from tuco_jax.weights import int8
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.load import load_model, load_pair, open_model
from tuco_jax.weights.orbax import store
from tuco_jax.weights.precision import Wanted


def in_int8(params):
    """A tree of parameters as int8 holds it."""
    flat = {}
    for path, x in flatten_dict(params, sep="/").items():
        flat[path] = x
        if int8.holds(path):
            flat[path], flat[int8.scale_of(path)] = map(jnp.asarray, int8.rounded(np.asarray(x)))
    return unflatten_dict(flat, sep="/")


def both(pair):
    """The pair in int8, and the float32 pair of the numbers that it stands for."""
    short = dataclasses.replace(pair, base=in_int8(pair.base), tuned=in_int8(pair.tuned))
    return short, dataclasses.replace(
        short, base=int8.widened(short.base), tuned=int8.widened(short.tuned)
    )


MIXTURE = rm.config(mlp_bias=False, experts=4, experts_used=2)
PAIRS = {
    "full": rm.full_pair,
    "experts": functools.partial(rm.adapter_pair, base=MIXTURE),
}
last = jax.jit(last_token)


@functools.cache
def pairs(name):
    return both(PAIRS[name]())


def test_a_number_is_off_by_half_a_step():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(2, 40, 7)).astype(np.float32) * rng.uniform(0.1, 9, (2, 1, 7))
    matrix[0, :, 2], matrix[1, :, 3] = 0, 1e-41
    integers, scale = int8.rounded(matrix)
    assert integers.dtype == np.int8 and np.abs(integers).max() == 127
    wide = integers * scale[..., None, :].astype(np.float64)
    assert (np.abs(wide - matrix) <= 0.5001 * scale[..., None, :]).all()
    assert (wide[0, :, 2] == 0).all() and (scale > 0).all()
    again, same = int8.rounded(wide.astype(np.float32))
    np.testing.assert_array_equal(again, integers)
    np.testing.assert_allclose(same, scale, rtol=1e-6)


def test_what_is_held_so():
    for path in ("layers/attention/q/kernel", "tuned/layers/mlp/down/kernel"):
        assert int8.holds(path)
    for path in ("layers/mlp/router/kernel", "layers/mlp/up/bias", "head/kernel", "embed/table"):
        assert not int8.holds(path)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_that_of_the_numbers_it_stands_for(name):
    """Every source and engine, to rounding."""
    short, wide = pairs(name)
    tokens, mask = rm.batch()
    expected = last(wide, tokens, mask)
    for source in (Stacked.of(short), Split(short), Streamed.of(short)):
        got = last_token(source, tokens, mask)
        np.testing.assert_allclose(got.tuco, expected.tuco, atol=1e-6)
        np.testing.assert_allclose(got.layers, expected.layers, atol=1e-6)
    full = jax.jit(decompose)
    parts = [full(p, tokens, mask, 0.7) for p in (short, wide)]
    chex.assert_trees_all_close(*parts, rtol=1e-4, atol=1e-4)
    prompts = [np.arange(3, 9), np.arange(20, 24)]
    new = [generate_tokens(p, prompts, alpha=0.6, max_new_tokens=4) for p in (short, wide)]
    chex.assert_trees_all_equal(*new)


def test_tuco_is_close_to_what_it_was():
    was, now = (last(p, *rm.batch()).tuco for p in (rm.full_pair(), pairs("full")[1]))
    assert 0 < np.abs(was - now).max() < 0.02


def test_over_a_mesh():
    short, wide = pairs("experts")
    given = rm.batch(rows=8)
    mesh = make_mesh(2, 2, 2)
    spread = place(short, mesh)
    down, up = (spread.base["layers"]["mlp"][n] for n in ("down", "up"))
    assert up["kernel"].addressable_shards[0].data.size == up["kernel"].size // 4
    for scale in (up["scale"], down["scale"]):  # as their outputs are
        assert scale.addressable_shards[0].data.size == scale.size // 2
    run = jax.jit(lambda p, t, m: last_token(p, t, m, mesh=mesh))
    got = run(spread, *jax.device_put(given, batch_sharding(mesh, 8)))
    np.testing.assert_allclose(got.tuco, last(wide, *given).tuco, atol=1e-6)


@pytest.mark.parametrize("layout", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_devices_exchange_integers_of_one_layer(layout):
    """fsdp gathers each matrix where it is used: a byte a number, and never of all layers."""
    short, mesh = both(rm.full_pair(base=CONFIG))[0], make_mesh(*layout)
    rows = jax.device_put(rm.batch(rows=8, vocab=64), batch_sharding(mesh))
    lowered = jax.jit(lambda *a: tuco(*a, mesh=mesh)).lower(place(short, mesh), *rows)
    found = collectives(str(lowered.compile().as_text()))
    layers: Any = flatten_dict(short.base["layers"])
    matrices = {x.shape for x in layers.values() if x.dtype == jnp.int8}
    scales = {layers[*path[:-1], "scale"].shape for path in layers if path[-1] == "kernel"}
    assert not [one for one in found if (matrices | scales) & set(one.shapes)]
    gathered = [one for one in found if one.kind == "all-gather" and one.times > 1]
    assert {math.prod(shape) for one in gathered for shape in one.shapes if len(shape) > 2} == {
        math.prod(shape[1:]) // layout[2] for shape in matrices
    }
    for one in gathered:
        (shape,) = one.shapes
        assert one.size == math.prod(shape) * (1 if len(shape) > 2 else 4)  # a matrix, or scales


def test_gradients_go_through():
    """By inputs, as attacks take them, and by an adapter's factors, as training does."""
    tokens, mask = rm.batch(rows=2, length=5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 24)), jnp.float32)

    @jax.jit
    def slopes(pair):
        def loss(x, lora):
            out = decompose(dataclasses.replace(pair, lora=lora), mask=mask, embeddings=x)
            return jnp.sum(jnp.sin(out.hidden))

        return jax.grad(loss, (0, 1))(x, pair.lora)

    got, want = map(slopes, pairs("experts"))
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", [None, (2, 2, 2), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_matrices_are_rounded_on_the_way(tmp_path, monkeypatch, family, layout):
    """A few outputs at a time, each device its own; what else there is stays as published."""
    monkeypatch.setattr(int8, "_BLOCK", 200)
    save_tiny(tmp_path, family, dtype="bfloat16", tokenizer=False)
    where = None if layout is None else placement(make_mesh(*layout))
    got = load_model(str(tmp_path), dtype="int8", placement=where).params
    want = in_int8(load_model(str(tmp_path), dtype="bfloat16").params)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal_dtypes(got, want)
    one = open_model(str(tmp_path), dtype="int8").weights.layer(1)
    chex.assert_trees_all_equal(one, jax.tree.map(lambda x: x[1], want["layers"]))


def test_what_an_adapter_replaces_is_rounded_too(tmp_path):
    family, config, changes = test_adapter.CASES["dora"]
    test_read.write_any(tmp_path, family, config, **changes)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    names = str(tmp_path / "base"), str(tmp_path / "adapter")
    short, wide = (load_pair(*names, dtype=d)[0].tuned for d in ("int8", "float32"))
    got, want = (flatten_dict(tree, sep="/") for tree in (int8.widened(short), wide))
    assert got.keys() == want.keys() and any(x.dtype == jnp.int8 for x in jax.tree.leaves(short))
    for path, x in want.items():
        gap = np.abs(np.asarray(got[path]) - np.asarray(x)).max()
        assert gap <= 0.02 * np.abs(np.asarray(x)).max()


def test_half_the_memory_of_bfloat16(tmp_path):
    save_tiny(tmp_path, "llama", hidden_size=256, intermediate_size=512, tokenizer=False)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(load_model(str(tmp_path), dtype=d).params["layers"]))
        for d in ("int8", "bfloat16")
    ]
    assert sizes[0] <= 0.55 * sizes[1]


def test_stores(tmp_path, pair_folder):
    """Written in int8 and read so, or written in float32 and rounded; no other dtype is that."""
    base, tuned = pair_folder
    pair, tokenizer = load_pair(base, tuned, dtype="int8")
    store.save_pair(tmp_path / "short", pair, tokenizer)
    store.save_pair(tmp_path / "wide", *load_pair(base, tuned))
    for name in ("short", "wide"):
        for mesh in (None, make_mesh(2, 2, 2)):
            found = load_pair(*(str(tmp_path / name),) * 2, dtype="int8", mesh=mesh)[0]
            chex.assert_trees_all_equal((found.base, found.tuned), (pair.base, pair.tuned))
            chex.assert_trees_all_equal_dtypes(found.base, pair.base)
        opened = store.OpenPair(tmp_path / name, dtype="int8")
        for got, whole in zip(opened.layer(1)[:2], (pair.base, pair.tuned), strict=True):
            chex.assert_trees_all_equal(got, jax.tree.map(lambda x: x[1], whole["layers"]))
    with pytest.raises(InputError, match="short: holds int8 weights: give --dtype int8, or"):
        load_pair(*(str(tmp_path / "short"),) * 2)


def test_a_store_without_its_scales(tmp_path, pair_folder):
    model = load_model(pair_folder[0], dtype="int8")
    flat = flatten_dict(model.params, sep="/")
    del flat["layers/mlp/up/scale"]
    store.save(tmp_path / "s", model._replace(params=unflatten_dict(flat, sep="/")))
    with pytest.raises(InputError, match="layers/mlp/up/scale is missing"):
        load_model(str(tmp_path / "s"), dtype="int8")


@pytest.fixture(scope="module")
def pair_folder(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def test_by_command(tmp_path, pair_folder, capsys, monkeypatch):
    base, tuned = pair_folder
    main = functools.partial(run_in_process, monkeypatch, tmp_path / "cache")
    folder, out = str(tmp_path / "store"), str(tmp_path / "o.jsonl")
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "what tuning changed"}])
    short = ["--dtype", "int8"]
    assert main(["import", "--model", base, "--tuned", tuned, "--out", folder, *short]) == 0
    score = ["score", "--prompts", prompts, "--out"]
    stored, streamed = (
        [out, "--base", folder, "--tuned", folder],
        ["--base", base, "--tuned", tuned],
    )
    assert main([*score, *stored]) == 2
    assert "holds int8 weights" in capsys.readouterr().err
    assert main([*score, *stored, *short]) == 0
    meta = json.loads((tmp_path / "o.jsonl.meta.json").read_text())
    assert meta["dtype"] == "int8" and meta["precision"] == Wanted("int8", "auto").settled({})
    (row,) = read_jsonl(out)
    assert main([*score, str(tmp_path / "s.jsonl"), *streamed, *short, "--stream"]) == 0
    assert read_jsonl(tmp_path / "s.jsonl")[0]["tuco"] == pytest.approx(row["tuco"], abs=1e-6)


def test_every_precision_is_for_int8():
    stored = {"a": frozenset({"Q4_1"}), "b": frozenset({"float32"})}
    for asked in ("float32", "bfloat16x3", "bfloat16x2", "bfloat16"):
        assert Wanted("int8", asked).settled(stored) == asked


def test_what_int8_is_not_for(tmp_path, pair_folder):
    out = str(tmp_path / "r")
    with pytest.raises(InputError, match="dtype: int8 weights are not trained themselves: give"):
        run_finetune(FinetuneConfig(base="b", data="d", out=out, dtype="int8", method="full"))
    model = load_model(pair_folder[0], dtype="int8")
    assert model.hf_config is not None
    given = model.config, model.params, model.tokenizer, model.hf_config
    with pytest.raises(InputError, match="int8 weights are no others' format; load another"):
        huggingface.export(tmp_path / "out", *given)


def test_shapes_before_there_are_weights():
    for config in (rm.config(), MIXTURE):
        pair = both(rm.full_pair(base=config))[0]
        shapes = int8.abstract(jax.eval_shape(lambda c=config: rm.params(c, 0)), "float32")
        chex.assert_trees_all_equal_shapes_and_dtypes(pair.base, shapes)
