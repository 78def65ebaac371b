"""Rules of denoisers and rewards: every kernel of every network is spread, whatever holds it."""

import jax
import jax.numpy as jnp
import optax
import pytest

from common_jax.mesh import make_mesh
from common_jax.partition import shardings
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.models.temporal.mlp import ResidualMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.reward.extract import init_params
from reward_jax.sharding import RULES

NETWORKS = {
    "unet": TemporalUnet(8, 16, (1, 2), attention=True),
    "mlp": ResidualMLP(64),
    "half_unet": HalfUnet(8, (8, 8)),
    "window": WindowMLP(),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kernel_is_cut_and_its_moments_alike(name):
    params = jax.eval_shape(
        lambda: init_params(NETWORKS[name], jax.random.key(0), jnp.zeros((1, 8, 8)), 3)
    )
    moments = jax.eval_shape(optax.adam(1e-3).init, params)
    mesh = make_mesh(1, 2, 4)
    where, of_moments = (shardings(tree, RULES, mesh) for tree in (params, moments))
    assert of_moments[0].mu == where and of_moments[0].nu == where
    for path, sharding in jax.tree_util.tree_leaves_with_path(where):
        cut = any(sharding.spec)
        assert cut == (path[-1].key == "kernel"), jax.tree_util.keystr(path)


def test_the_second_layer_of_a_block_takes_what_the_first_gives():
    params = jax.eval_shape(
        lambda: init_params(NETWORKS["unet"], jax.random.key(0), jnp.zeros((1, 8, 8)))
    )
    block = shardings(params, RULES, make_mesh(1, 2, 4))["down_0_0"]
    first, second = (block[name]["conv"]["kernel"].spec for name in ("first", "second"))
    assert first[-1] == second[-2] == "tensor" and first[-2] == second[-1] == "fsdp"
