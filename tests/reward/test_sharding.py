"""Denoisers and rewards over a mesh: every kernel of every network is spread, whatever holds it.

Of images, whole runs: what several devices give is what one does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from common_jax.mesh import make_mesh
from common_jax.partition import shardings
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.train import TrainingOptions, init_state, train_denoiser
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.models.stable_diffusion.config import UNetConfig
from reward_jax.models.stable_diffusion.unet import UNet
from reward_jax.models.temporal.mlp import ResidualMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.models.unet2d.unet import UNet2D
from reward_jax.planning.chain_cost import STATED
from reward_jax.reward.extract import init_params
from reward_jax.reward.guide import guided_sample
from reward_jax.reward.relative import RelativeReward
from reward_jax.sharding import RULES

NETWORKS = {
    "unet": TemporalUnet(8, 16, (1, 2), attention=True),
    "mlp": ResidualMLP(64),
    "half_unet": HalfUnet(8, (8, 8)),
    "window": WindowMLP(),
    "unet_2d": UNet2D(8, 16, attention=(2,), classes=3),
    "half_unet_2d": HalfUNet2D(8, 16),
}
SHAPES = {"unet_2d": (1, 8, 8, 8), "half_unet_2d": (1, 8, 8, 8)}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kernel_is_cut_and_its_moments_alike(name):
    params = jax.eval_shape(
        lambda: init_params(
            NETWORKS[name], jax.random.key(0), jnp.zeros(SHAPES.get(name, (1, 8, 8))), 3
        )
    )
    moments = jax.eval_shape(optax.adam(1e-3).init, params)
    mesh = make_mesh(1, 2, 4)
    where, of_moments = (shardings(tree, RULES, mesh) for tree in (params, moments))
    assert of_moments[0].mu == where and of_moments[0].nu == where
    for path, sharding in jax.tree_util.tree_leaves_with_path(where):
        cut = any(sharding.spec)
        assert cut == (path[-1].key == "kernel"), jax.tree_util.keystr(path)


def test_every_kernel_of_stable_diffusion_is_cut():
    """Of 1.5's own size, whose last layer's four outputs four devices cut, too."""
    module, of = UNet(UNetConfig.of(STATED, "here")), jax.ShapeDtypeStruct
    given = of((1, 8, 8, 4), jnp.float32), of((1,), jnp.int32), of((1, 7, 768), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), *given)["params"]
    for path, where in jax.tree_util.tree_leaves_with_path(
        shardings(params, RULES, make_mesh(1, 2, 4))
    ):
        cut = {axis for axis in where.spec if axis}
        whole = {"fsdp", "tensor"} if path[-1].key == "kernel" else set()
        assert cut == whole, jax.tree_util.keystr(path)


def test_the_second_layer_of_a_block_takes_what_the_first_gives():
    params = jax.eval_shape(
        lambda: init_params(NETWORKS["unet"], jax.random.key(0), jnp.zeros((1, 8, 8)))
    )
    block = shardings(params, RULES, make_mesh(1, 2, 4))["down_0_0"]
    first, second = (block[name]["conv"]["kernel"].spec for name in ("first", "second"))
    assert first[-1] == second[-2] == "tensor" and first[-2] == second[-1] == "fsdp"


def _run_of_images(mesh: Mesh | None) -> Any:
    """A denoiser's parameters and losses, and guided samples, of images, over a mesh or not."""
    net, reward = UNet2D(2, 8, (1, 1), groups=4, patch=2), HalfUNet2D(2, 8, (1,), groups=4)
    schedule, sgd, key = cosine_schedule(5), optax.sgd(0.1), jax.random.key(0)
    x_0 = jax.random.normal(jax.random.key(1), (32, 8, 4, 2))
    state = init_state(net, sgd, x_0[:1], key)
    options = TrainingOptions(16, 2)
    trained, metrics = train_denoiser(
        net, state, x_0, schedule, sgd, steps=2, key=key, options=options, mesh=mesh
    )
    score = score_from(net, trained.params, "v", schedule, clip=1.0)
    guide = RelativeReward(init_params(reward, key, x_0[:1]), schedule, reward)
    samples = guided_sample(score, schedule, (8, 8, 4, 2), key=key, guide=guide, mesh=mesh)
    if mesh is not None:
        kernel = trained.params["middle_0"]["first"]["kernel"]
        assert len(kernel.sharding.device_set) == mesh.size and not kernel.is_fully_replicated
    return jax.tree.map(np.asarray, (trained.params, metrics["loss"], samples))


@pytest.mark.slow
def test_images_over_devices_are_what_one_gives():
    one, spread = _run_of_images(None), _run_of_images(make_mesh(2, 2, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), spread, one)
    assert np.abs(one[-1]).max() > 0.5
