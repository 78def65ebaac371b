"""Where parameters go on a mesh, under any prefix, and what stays whole."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from common_jax.mesh import make_mesh
from tests.tuco import random_models as rm
from tuco_jax.models.sharding import batch_width, mesh_of, place, placement, put_rows

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
