"""Where parameters go on a mesh, under any prefix, what stays whole, and what lookups take."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from common_jax.cost import collectives
from common_jax.mesh import make_mesh
from tests.tuco import random_models as rm
from tests.tuco.cli_pair import ROOT
from tuco_jax.models.sharding import (
    batch_width,
    gathered,
    looked_up,
    mesh_of,
    place,
    placement,
    put_rows,
)

MESH = make_mesh(2, 2, 2)


@pytest.mark.parametrize("prefix", ["", "base/", "tuned/", "lora/"])
def test_matrices_by_what_they_read_and_write(prefix):
    where = placement(MESH)
    for path, shape, spec in (
        ("layers/attention/q/kernel", (3, 24, 32), (None, "fsdp", "tensor")),
        ("layers/attention/o/kernel", (3, 32, 24), (None, "tensor", "fsdp")),
        ("layers/mlp/up/b", (3, 4, 40), (None, None, "tensor")),
        ("embed/table", (60, 24), ("tensor", "fsdp")),
        ("embed/table", (61, 24), (None, "fsdp")),  # 61 rows are not halved
        ("final_norm/scale", (24,), ()),
    ):
        assert where(prefix + path, shape).spec == PartitionSpec(*spec), path


def test_a_pair_is_placed_and_found_again():
    pair = rm.adapter_pair()
    placed = place(pair, MESH)
    assert mesh_of(placed) == MESH and mesh_of(pair) is None
    jax.tree.map(np.testing.assert_array_equal, placed, pair)
    assert batch_width(MESH) == 4 and batch_width(None) == 1
    rows = put_rows(np.zeros((8, 3)), MESH)
    assert {s.data.shape for s in rows.addressable_shards} == {(2, 3)}


def test_gathered_is_whole_along_fsdp_alone():
    mesh = make_mesh(2, 2, 2)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    placed = place({"embed": {"table": table}}, mesh)["embed"]["table"]
    found = gathered("embed/table", placed, mesh)
    assert tuple(placed.sharding.spec) == ("tensor", "fsdp")
    assert found.addressable_shards[0].data.shape == (32, 32)
    np.testing.assert_array_equal(found, table)
    assert gathered("embed/table", table, None) is table
    odd = rm.params(rm.config(vocab_size=61), 0)["embed"]["table"]
    assert gathered("embed/table", odd, mesh).addressable_shards[0].data.shape == odd.shape


@pytest.mark.parametrize("layout", [(1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("rows", [8, 6])
def test_rows_are_looked_up_where_they_lie(layout, rows):
    """Exchanges are of what is looked up, never of the table, also of rows that do not divide."""
    mesh, rng = make_mesh(*layout), np.random.default_rng(0)
    table, weights = (jnp.float32(rng.normal(size=s)) for s in ((512, 32), (rows, 5, 32)))
    index = jnp.asarray(rng.integers(0, 512, (rows, 5)))
    placed = place({"embed": {"table": table}}, mesh)["embed"]["table"]

    def look(table, index):
        return looked_up("embed/table", table, index, mesh)

    given = placed, put_rows(index, mesh)
    compiled = jax.jit(look).lower(*given).compile()
    np.testing.assert_array_equal(compiled(*given), table[index])
    exchanged = [one.size for one in collectives(str(compiled.as_text()))]
    assert exchanged and max(exchanged) <= weights.nbytes
    got = jax.jit(jax.grad(lambda *given: jnp.sum(weights * look(*given))))(*given)
    wanted = jnp.zeros_like(table).at[index].add(weights)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_no_lookup_is_copied_to_every_device():
    """XLA says so on stderr, from its C++: in a process of its own."""
    code = """
        from common_jax.mesh import make_mesh
        from tests.tuco import random_models as rm
        from tests.tuco.tiny_tokenizer import bos_tokenizer
        from tuco_jax.core.trajectories import output_co
        from tuco_jax.generation.generate import generate_tokens
        from tuco_jax.models.sharding import place, put_rows
        from tuco_jax.scoring.score import score

        mesh = make_mesh(2, 2, 2)
        for changes in ({}, {"ropes": (), "rope_index": (), "norm": "layer", "gated": False}):
            config = rm.config(vocab_size=272, width=32, heads=8, kv_heads=8, head_dim=4, **(
                changes or {"ropes": (rm.rope(4), rm.rope(4, 500.0))}
            ))
            pair = place(rm.full_pair(base=config), mesh)
            found = score(pair, bos_tokenizer(), ["a" * n for n in (3, 9, 20)] * 8)
            rows = put_rows(rm.batch(rows=8), mesh)
            output_co(pair, *rows, mesh=mesh)
            generate_tokens(pair, [[3, 4, 5]] * 8, 0.5, max_new_tokens=2)
            print(float(found.tuco.mean()))
    """
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
    assert "rematerialization" not in done.stderr, done.stderr
