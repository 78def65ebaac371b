"""Rules as data: which parameters they name, what stays whole, and that compiled programs obey."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from common_jax.mesh import make_mesh
from common_jax.partition import gathered, keep, place, placement, shardings

RULES = ((r"(in|out)/kernel", P("fsdp", "tensor")), (r"kernel", P("tensor", None)))
MESH = make_mesh(2, 2, 2)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("in/kernel", (4, 6), ("fsdp", "tensor")),
        ("0/mu/layers/in/kernel", (3, 4, 6), (None, "fsdp", "tensor")),  # stacked, in moments
        ("begin/kernel", (4, 6), ("tensor", None)),  # a name is whole, or it is another
        ("in/kernel", (5, 6), (None, "tensor")),  # 5 rows are not halved
        ("in/kernel", (6,), ()),  # fewer axes than the rules say
        ("in/bias", (6,), ()),
        ("in/kernel/mask", (4, 6), ()),
    ],
)
def test_the_first_rule_that_matches(path, shape, spec):
    assert placement(RULES, MESH)(path, shape).spec == P(*spec)


def test_a_tree_is_placed_kept_and_gathered():
    rng = np.random.default_rng(0)
    tree = {"in": {"kernel": rng.normal(size=(4, 6)), "bias": rng.normal(size=6)}}
    tree = jax.tree.map(jnp.float32, tree)
    placed = place(tree, RULES, MESH)
    where = shardings(tree, RULES, MESH)
    stays = jax.jit(lambda x: keep(jax.tree.map(lambda x: x + 1, x), RULES, MESH))(tree)
    whole = jax.jit(lambda x: gathered(x, RULES, MESH))(placed)
    assert jax.tree.map(lambda x: x.sharding, (placed, stays)) == (where, where)
    assert whole["in"]["kernel"].sharding.spec == P(None, "tensor")
    jax.tree.map(np.testing.assert_array_equal, (placed, whole), (tree, tree))
    for function in (place, keep, gathered):
        assert function(tree, RULES, None) is tree
