"""The mesh from settings, and the pmap wrapper on functions of its own."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from common_jax import mesh as mesh_module
from common_jax.cost import collectives
from common_jax.errors import InputError
from common_jax.mesh import (
    AXES,
    cores,
    cudnn_width,
    fetch_row,
    make_mesh,
    mesh_for,
    pmap,
    read_shards,
    replicate,
    traced_mesh,
)


@pytest.mark.parametrize(
    "settings, shape",
    [
        ({}, (1, 1, 1)),
        ({"data": 8}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": -1, "tensor": 3}, (2, 1, 3)),
        ({"fsdp": 2, "tensor": 2}, (1, 2, 2)),
    ],
)
def test_mesh_from_settings(settings, shape):
    mesh = make_mesh(**settings)
    assert mesh.axis_names == AXES and mesh.devices.shape == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_one_device_needs_no_mesh():
    for sizes in (None, {}, {"data": 1, "fsdp": 1, "tensor": 1}):
        assert mesh_for(sizes) is None
    mesh = mesh_for({"data": 2, "fsdp": -1})
    assert mesh is not None and dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(InputError, match="wants 9 devices, but there are 8"):
        mesh_for({"data": 9})


@pytest.mark.parametrize(
    "before, sizes, flags, devices",
    [
        ("", "{'data': 2}", "", 2),
        ("", "{'data': 1, 'fsdp': 2}", "", 2),
        ("", "None", "", 1),
        ("", f"{{'data': {cores() + 1}}}", "", None),  # more than there are cores
        ("jax.devices()", "{'data': 2}", "", None),  # in use
        ("", "{'data': 2}", "--xla_force_host_platform_device_count=3", 2),
    ],
)
@pytest.mark.skipif(cores() < 2, reason="a CPU of one core is one device")
def test_a_cpu_is_as_many_devices_as_a_mesh_has(before, sizes, flags, devices):
    code = f"""
import jax
from common_jax.errors import InputError
from common_jax.mesh import mesh_for
{before}
try:
    mesh = mesh_for({sizes})
    print(1 if mesh is None else mesh.size)
except InputError as error:
    print(error)
"""
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    said = done.stdout.strip()
    assert said == str(devices) if devices else "but there are 1: choose" in said, said


def test_mesh_over_given_devices():
    devices = jax.devices()[4:]
    assert set(make_mesh(data=2, tensor=2, devices=devices).devices.flat) == set(devices)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data": 3, "fsdp": 3}, "wants 9 devices, but there are 8"),
        ({"data": -1, "tensor": 16}, "wants 16 devices, but there are 8"),
        ({"data": 0}, "sizes are 1 or more"),
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
    ],
)
def test_impossible_meshes_say_why(settings, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**settings)


@pytest.mark.parametrize("rows", [1, 7, 8, 20])
def test_pmap_gives_what_the_function_gives(rows):
    rng = np.random.default_rng(rows)
    weight = {"w": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32)
    shift = {"b": jnp.asarray(rng.normal(size=(rows,)), jnp.float32), "none": None}

    def function(params, x, shift):
        y = x @ params["w"] + shift["b"][:, None]
        return {"rows": y, "layers": jnp.stack([y, 2 * y, 3 * y])}

    run = pmap(function, out_axes={"rows": 0, "layers": 1})
    expected = function(weight, x, shift)
    for params in (weight, replicate(weight)):
        got = run(params, x, shift)
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, expected)


def test_pmap_splits_over_the_devices_it_is_given():
    devices = jax.devices()[:2]
    run = pmap(lambda _, x: jnp.full_like(x, len(x)), devices=devices)
    np.testing.assert_array_equal(run((), jnp.zeros(6)), 3)


def test_pmap_refuses_a_ragged_batch():
    with pytest.raises(ValueError, match=r"\[4, 5\] rows"):
        pmap(lambda _, x, y: x + y)((), jnp.zeros(4), jnp.zeros(5))


@pytest.mark.parametrize(
    ("spec", "parts"),
    [(P("fsdp", "tensor"), 4), (P(("data", "tensor")), 4), (P(None, "data"), 2), (P(), 1)],
    ids=str,
)
def test_each_part_of_an_array_is_read_once(spec, parts):
    whole, asked = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32), []

    def read(place):
        asked.append(whole[place].size)
        return whole[place]

    where = NamedSharding(make_mesh(2, 2, 2), spec)
    found = read_shards(whole.shape, where, read)
    assert found.sharding == where and asked == [whole.size // parts] * parts
    np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(read_shards(whole.shape, None, read), whole)
    scalar = read_shards((), NamedSharding(make_mesh(2, 2, 2), P()), lambda place: whole[0, 0])
    assert scalar.shape == () and scalar == whole[0, 0]


@pytest.mark.parametrize(
    "spec",
    [P(None, "fsdp", "tensor"), P("tensor", "fsdp"), P(("data", "fsdp")), P(None, None, "data")],
    ids=str,
)
def test_a_large_array_is_fetched_some_rows_at_a_time(spec, monkeypatch):
    """No device holds more of what is others' at once; the last rows are as many as the first."""
    where = NamedSharding(make_mesh(2, 2, 2), spec)
    whole = np.random.default_rng(0).normal(size=(28, 4, 6)).astype(np.float32)
    x, once, copied = jax.device_put(whole, where), whole.nbytes * 3 // 14, []
    replicated = mesh_module._whole

    def seen(part):
        copied.append(part.nbytes)
        return replicated(part)

    monkeypatch.setattr(mesh_module, "_AT_ONCE", once)
    monkeypatch.setattr(mesh_module, "_whole", seen)
    np.testing.assert_array_equal(mesh_module._gathered(x), whole)
    assert len(copied) >= 5 and max(copied) <= once
    cut = mesh_module._cut(where, 1)
    assert not collectives(str(cut.lower(x, np.int32(0)).compile().as_text()))
    monkeypatch.setattr(mesh_module, "_AT_ONCE", 1)  # less than a row of each part
    copied.clear()
    np.testing.assert_array_equal(mesh_module._gathered(x), whole)
    assert len(copied) == where.shard_shape(x.shape)[0]


@pytest.mark.parametrize("spec", [P(None, "fsdp", "tensor"), P(), None], ids=str)
def test_a_row_is_fetched_by_itself(spec):
    whole = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    where = None if spec is None else NamedSharding(make_mesh(2, 2, 2), spec)
    x = jax.device_put(whole, where)
    for index in (0, 4):
        np.testing.assert_array_equal(fetch_row(x, index), whole[index])


def test_types_tell_the_mesh():
    seen, mesh = [], make_mesh(2, 2, 2)

    @jax.jit
    def look(tree):
        seen.append(traced_mesh(tree))
        return tree

    x = jnp.ones(8)
    look({"w": jax.device_put(x, NamedSharding(mesh, P("fsdp")))})
    look({"w": x})
    assert seen == [mesh.abstract_mesh, None]


@pytest.mark.parametrize(
    ("devices", "width"),
    [
        ([("gpu", "9.0")], 256),
        ([("gpu", "9.0"), ("gpu", "8.6")], 128),
        ([("gpu", "7.5")], 0),
        ([("gpu", "gfx90a")], 0),
        ([("cpu", "9.0")], 0),
    ],
)
def test_heads_that_cudnn_takes(monkeypatch, devices, width):
    found = [SimpleNamespace(platform=p, compute_capability=c) for p, c in devices]
    monkeypatch.setattr(jax, "devices", lambda: found)
    assert cudnn_width() == width
