"""Denoisers and rewards over a mesh: every kernel of every network is spread, whatever holds it.

Of images, whole runs: what several devices give is what one does.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common_jax.cost import collectives
from common_jax.mesh import batch_sharding, make_mesh
from common_jax.partition import shardings, whole_along_fsdp
from common_jax.plan import abstract
from reward_jax.diffusion.denoiser import as_argument, score_from
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
from reward_jax.reward import targets
from reward_jax.reward.extract import extract_reward, init_params
from reward_jax.reward.guide import guided_sample
from reward_jax.reward.relative import RelativeReward
from reward_jax.reward.targets import ExtractionOptions
from reward_jax.sharding import RULES, in_use, place, placement

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


def test_types_tell_where_parameters_are_used():
    """Whole along fsdp, cut along tensor; arrays without a mesh as they are."""
    tree, mesh = {"first": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}, make_mesh(1, 2, 4)
    placed = place(tree, mesh)
    assert placed["first"]["kernel"].sharding == placement(mesh)("first/kernel", (4, 8))
    found = jax.jit(in_use)(placed)["first"]["kernel"].sharding
    assert found.shard_shape((4, 8)) == (4, 2)
    alone = jax.jit(in_use)(tree)["first"]["kernel"].sharding
    assert alone.device_set == {jax.devices()[0]}
    assert placement(None)("first/kernel", (4, 8)) is None


def test_the_second_layer_of_a_block_takes_what_the_first_gives():
    params = jax.eval_shape(
        lambda: init_params(NETWORKS["unet"], jax.random.key(0), jnp.zeros((1, 8, 8)))
    )
    block = shardings(params, RULES, make_mesh(1, 2, 4))["down_0_0"]
    first, second = (block[name]["conv"]["kernel"].spec for name in ("first", "second"))
    assert first[-1] == second[-2] == "tensor" and first[-2] == second[-1] == "fsdp"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_kernels_that_are_whole(layout):
    """Of a teacher's program: along fsdp all at once, as docs/rewards.md says; no more than that.

    Along tensor none but the first, whose inputs are as few as numbers of a row.
    """
    net, mesh, rows = TemporalUnet(6, 64, (1, 3)), make_mesh(*layout), 16
    x, t = jax.ShapeDtypeStruct((1, 8, 6), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
    schedule = cosine_schedule(5)
    where: Any = placement(mesh)
    make = functools.partial(score_from, net, prediction="x0", schedule=schedule)
    model = abstract(jax.eval_shape(lambda p: as_argument(make(p)), params), where)
    by_row = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh, rows).spec))
    x, t = (
        jax.ShapeDtypeStruct((2, rows, *one.shape[1:]), one.dtype, sharding=by_row)
        for one in (x, t)
    )
    run = jax.jit(targets._evaluate.__wrapped__, static_argnames="mesh")  # pyright: ignore
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    draws: Any = targets._Draws(x, t, None)  # pyright: ignore[reportArgumentType]
    compiled = run.lower(model, schedule, draws, mesh=mesh).compile(compiler_options=options)
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): one
        for path, one in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    }
    used = [
        whole_along_fsdp(where(path, one.shape)).shard_shape(one.shape)
        for path, one in kernels.items()
    ]
    used = 4 * sum(math.prod(shape) for shape in used)
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 2 * used + 200_000
    if layout[2] > 1:
        exchanged = collectives(str(compiled.as_text()))
        gathered = [sorted(s) for one in exchanged if one.kind == "all-gather" for s in one.shapes]
        whole = [sorted(one.shape) for one in kernels.values()]
        assert [shape for shape in whole if shape in gathered] in ([], [[5, 6, 64]])


@pytest.mark.slow
def test_guided_trajectories_over_either_axis_of_weights():
    """A U-Net steered by a reward, each kernel cut by eight along fsdp, or along tensor."""
    net, reward = TemporalUnet(8, 32, (1,)), WindowMLP(2, (8, 8), embedding=8)
    schedule = cosine_schedule(3)
    x, key = jnp.zeros((1, 8, 8)), jax.random.key(0)
    params = init_state(net, optax.sgd(1.0), x, key).params
    learned = init_params(reward, key, x)

    def sampled(mesh: Mesh | None) -> jax.Array:
        base = score_from(net, place(params, mesh), "v", schedule, clip=2.0)
        guide = RelativeReward(place(learned, mesh), schedule, reward)
        given: dict[str, Any] = dict(key=key, mesh=mesh)
        found = guided_sample(base, schedule, (8, 8, 8), guide=guide, **given)
        if mesh is None:  # it steers
            assert np.abs(found - guided_sample(base, schedule, (8, 8, 8), **given)).max() > 0.1
        return found

    wanted = sampled(None)
    for layout in ((1, 8, 1), (1, 1, 8)):
        np.testing.assert_allclose(sampled(make_mesh(*layout)), wanted, rtol=1e-5, atol=1e-5)


TEXT = 6, 8  # tokens, width
SD = UNetConfig.of(
    {
        "sample_size": 4,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "in_channels": 2,
        "out_channels": 2,
        "cross_attention_dim": TEXT[1],
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    "here",
)
IMAGES = {"unet_2d": UNet2D(2, 8, (1, 1), groups=4, patch=2), "stable_diffusion": UNet(SD)}


def _run_of_images(net: Any, mesh: Mesh | None, made: Any = None) -> Any:
    """A denoiser that is trained, the reward of it and how it began, and samples so guided.

    made: such a run's, with whose models each stage begins, so that no rounding adds up.
    """
    # In groups of two channels the slopes of biases are what two large ones leave: digits lost.
    reward, schedule = HalfUNet2D(2, 8, (1,), groups=2), cosine_schedule(5)
    sgd, key = optax.sgd(0.1), jax.random.key(0)
    x_0 = jax.random.normal(jax.random.key(1), (32, 8, 4, 2))
    cond = jax.random.normal(jax.random.key(2), (32, *TEXT)) if isinstance(net, UNet) else None
    data = x_0 if cond is None else (x_0, cond)
    state = init_state(net, sgd, jax.tree.map(lambda x: x[:1], data), key)
    given: dict[str, Any] = dict(steps=2, key=key, mesh=mesh)
    trained, metrics = train_denoiser(
        net, state, data, schedule, sgd, options=TrainingOptions(16, 2), **given
    )
    denoisers = state.params, place(made[0], mesh) if made else trained.params
    base, expert = (score_from(net, params, "v", schedule, clip=1.0) for params in denoisers)
    learned, history = extract_reward(
        base,
        expert,
        reward,
        init_params(reward, key, x_0[:1]),
        data,
        schedule,
        sgd,
        options=ExtractionOptions(16, 2),
        **given,
    )
    guide = RelativeReward(place(made[2], mesh) if made else learned, schedule, reward)
    samples = guided_sample(
        expert,
        schedule,
        (8, *x_0.shape[1:]),
        key=key,
        guide=guide,
        cond=None if cond is None else cond[:8],
        mesh=mesh,
    )
    if mesh is not None:
        for path, x in jax.tree_util.tree_leaves_with_path((trained.params, learned)):
            if path[-1].key == "kernel":
                assert len(x.sharding.device_set) == 8 and not x.is_fully_replicated
    found = trained.params, metrics["loss"], learned, history.loss, samples
    return jax.tree.map(np.asarray, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_images_over_eight_devices_are_what_one_gives(name):
    """Training, extraction and sampling, over all three axes."""
    one = _run_of_images(IMAGES[name], None)
    spread = _run_of_images(IMAGES[name], make_mesh(2, 2, 2), one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), spread, one)
    assert np.abs(one[-1]).max() > 0.5
