"""What binds, from figures by hand; and a small program against what it takes when it is run."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common_jax.cost import Collective
from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from common_jax.plan import DEVICES, Device, Plan, abstract, devices, plan, rows

DEVICE = Device("D", 100.0, 10.0, 5.0, {"float32": 8.0, "bfloat16": 32.0}, "nowhere")
GATHER = Collective("all-gather", ((3, 2),), 2, 10.0)
PLAN = Plan(
    {"a": 40, "b": 30}, {"float32": 64.0}, 20.0, (GATHER,), "float32", {"data": 2, "fsdp": 1}
)


@pytest.mark.parametrize(
    ("changes", "binds"),
    [
        ({}, "compute"),  # 64 / 2 / 8 = 4 s, beside 2 and 4
        ({"products": {"float32": 48.0}}, "links"),  # 2 x 10 / 5 = 4 s
        ({"products": {"bfloat16": 64.0, "float32": 50.0}}, "compute"),  # 1 + 3.1 s
        ({"products": {"bfloat16": 64.0, "float32": 46.0}}, "links"),
        ({"products": {}, "exchanges": (), "traffic": 31.0}, "memory bandwidth"),
        ({"bytes": {"a": 101}}, "memory"),
    ],
)
def test_what_binds(changes, binds):
    found = dataclasses.replace(PLAN, **changes)
    assert found.binds(DEVICE) == binds
    assert json.loads(json.dumps(found.on(DEVICE)))["binds"] == binds
    assert found.lines(DEVICE)[-1].startswith(f"what binds: {binds}")


def test_figures():
    assert (PLAN.held, PLAN.size, PLAN.sent, PLAN.intensity) == (70, 2, 20.0, 64 / 2 / 20)
    assert PLAN.kinds() == {"all-gather": {"count": 2, "bytes": 20.0}}
    assert any(line.startswith("bytes a device: 70 B of 100 B") for line in PLAN.lines(DEVICE))
    for device in DEVICES.values():
        assert device.memory > 1e9
        assert device.rates.keys() == {"bfloat16", "float16", "float32"}


def test_a_program_takes_what_it_was_planned_to():
    """Its arguments and results as they lie, and what XLA says of the very program."""
    mesh = make_mesh(2, 2, 2)
    cut = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    tree = {"w": np.ones((64, 96), np.float32)}

    def program(weights, x):
        return jnp.tanh(x @ weights["w"])

    x = rows((16, 64), jnp.float32, mesh)
    given = {"weights": abstract(tree, lambda *_: cut), "x": x}
    found = plan(program, given, mesh, "float32", weights=("weights",))
    placed = jax.device_put(tree, cut), jax.device_put(np.ones(x.shape, np.float32), x.sharding)
    compiled = jax.jit(program).lower(*placed).compile()
    measured: Any = compiled.memory_analysis()
    out = compiled(*placed)
    assert found.bytes["weights"] + found.bytes["x"] == measured.argument_size_in_bytes
    assert found.bytes["weights"] == placed[0]["w"].addressable_shards[0].data.nbytes
    assert found.bytes["output"] == out.addressable_shards[0].data.nbytes
    assert found.bytes["temporaries"] == pytest.approx(measured.temp_size_in_bytes, rel=0.1)
    assert found.products == {"float32": 2 * 16 * 64 * 96}
    assert found.traffic == 64 * 96 * 4 / 2 + (16 * 64 + 16 * 96) * 4 / 8
    assert "precision" not in found.on(DEVICE) and found.lines(DEVICE)[0].endswith(", float32")


def test_weights_that_products_read_more_than_once():
    """Of x in two parts: each reads all of w on its shard, and gives a result."""

    def program(weights, x):
        part = x.astype(jnp.bfloat16)
        rest = (x - part.astype(jnp.float32)).astype(jnp.bfloat16)
        return sum(
            jnp.matmul(a, weights, preferred_element_type=jnp.float32) for a in (part, rest)
        )

    mesh = make_mesh(1, 1, 8)
    cut = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    given = {"weights": jax.ShapeDtypeStruct((64, 96), jnp.bfloat16, sharding=cut)}
    given["x"] = rows((16, 64), jnp.float32, mesh)
    of = {"precision": "bfloat16x2", "readings": {"weights": 2}}
    found = plan(program, given, mesh, "bfloat16", weights=("weights",), **of)
    assert found.products == {"bfloat16": 2 * 2 * 16 * 64 * 96}
    assert found.traffic == 2 * (64 * 96 * 2 + 16 * 64 * 2 + 16 * 96 * 4) / 8
    assert found.on(DEVICE)["precision"] == "bfloat16x2"
    assert found.lines(DEVICE)[0].endswith("bfloat16 weights, products in bfloat16x2")


def test_results_take_the_memory_of_what_they_follow():
    """Whatever its name: an average, which comes before the weights, is not copied for them."""

    def program(weights, average, x):
        weights = weights + x[None]
        return weights, 0.9 * average + 0.1 * weights

    mesh = make_mesh(1)
    given = {name: rows((512, 512), jnp.float32, mesh) for name in ("weights", "average")}
    given["x"] = rows((512,), jnp.float32, mesh)
    found = plan(program, given, mesh, "float32", donated=("weights", "average"))
    run: Any = jax.jit(program, donate_argnums=(0, 1)).lower(*given.values()).compile()
    assert found.bytes["output"] < 1000
    assert found.bytes["temporaries"] == run.memory_analysis().temp_size_in_bytes


def test_weights_are_gathered_as_they_are_stored():
    """A CPU casts bfloat16 before it multiplies, and may gather what it has cast."""
    mesh = make_mesh(1, 8)
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    tree = {"w": np.ones((3, 64, 64), np.float32)}

    def program(weights, x):
        def body(x, w):
            y = jnp.matmul(x.astype(w.dtype), w, preferred_element_type=jnp.float32)
            return jax.lax.with_sharding_constraint(y, given["x"].sharding), None

        return jax.lax.scan(body, x, weights["w"])[0]

    given = {"x": rows((16, 64), jnp.float32, mesh)}
    given["weights"] = abstract(tree, lambda *_: cut, jnp.bfloat16)
    found = plan(program, given, mesh, "bfloat16", weights=("weights",))
    assert found.kinds() == {"all-gather": {"count": 3, "bytes": 3 * 64 * 64 * 2 * 7 / 8}}


@pytest.mark.parametrize(("count", "said"), [(9, "this process has 8 in use"), (2000, "at most")])
def test_more_devices_than_can_be_had(count, said):
    with pytest.raises(InputError, match=said), devices(count):
        pass
