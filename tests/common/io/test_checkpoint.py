"""A run goes on where it stopped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common_jax.io import checkpoint
from common_jax.mesh import make_mesh


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)
    return {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16),
        "step": jnp.asarray(7),
        "key": jax.random.key_data(jax.random.key(3)),
    }


def test_a_run_resumes_exactly(tree, tmp_path):
    mesh = make_mesh(1, 2, 4)
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    state = tree | {"layers": jax.device_put(tree["layers"], cut)}
    with checkpoint.Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            state = jax.tree.map(lambda x: x + 1, state)
            checkpoints.save(step, state)
        checkpoints.save(3, jax.tree.map(jnp.zeros_like, state))  # there already: kept
    like = jax.tree.map(jnp.zeros_like, state)
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest() == 3
        again, older = checkpoints.restore(3, like), checkpoints.restore(2, like)
    chex.assert_trees_all_equal(again, state)
    np.testing.assert_array_equal(older["key"], state["key"] - 1)
    assert again["layers"]["kernel"].sharding.is_equivalent_to(cut, 3)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["2", "3"]
