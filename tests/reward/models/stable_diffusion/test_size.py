"""Stable Diffusion 1.5's real size, without its weights: nothing is computed or held."""

from collections.abc import Iterator
from typing import Any

import diffusers as untyped
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax._src.cudnn import fused_attention_stablehlo as fused
from torch.utils.flop_counter import FlopCounterMode

from common_jax.cost import _programs, each_product, products
from reward_jax.models.stable_diffusion import attention
from reward_jax.models.stable_diffusion.config import UNetConfig, VAEConfig
from reward_jax.models.stable_diffusion.unet import UNet
from reward_jax.models.stable_diffusion.vae import Decoder, Encoder

diffusers: Any = untyped  # its lazy names are unknown to a type checker

# unet/config.json of Stable Diffusion 1.5; all else is diffusers' default.
STATED = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
AUTOENCODER = VAEConfig.of(  # likewise
    {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    },
    "here",
)


def traced(dtype: Any):
    """The U-Net's parameters' shapes and its program at one latent of 64 x 64."""
    module = UNet(UNetConfig.of(STATED, "here"))
    of = jax.ShapeDtypeStruct
    given = of((1, 64, 64, 4), jnp.float32), of((1,), jnp.int32), of((1, 77, 768), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given)["params"]
    params = jax.tree.map(lambda x: of(x.shape, dtype), shapes)
    run = jax.jit(lambda params, *given: module.apply({"params": params}, *given))
    return shapes, jax.make_jaxpr(run)(params, *given[:2], of(given[2].shape, dtype))


@pytest.fixture(scope="module")
def program():
    """In float32, whose attention is in parts everywhere."""
    return traced(jnp.float32)


@pytest.fixture(scope="module")
def program_of_a_tpu():
    """In bfloat16, whose attention is in parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        return traced(jnp.bfloat16)


@pytest.fixture(scope="module")
def program_of_a_gpu():
    """In bfloat16, whose attention is cuDNN's where its heads are not too wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "cudnn_width", lambda: 256)
        patch.setattr(fused, "check_cudnn_version", lambda: 91000)
        return traced(jnp.bfloat16)


def test_flops_are_those_of_the_reference(program):
    shapes, jaxpr = program
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel(**STATED)
        given = torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(*given)
    count = sum(np.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert count == sum(p.numel() for p in reference.parameters()) == 859_520_964
    assert products(jaxpr).flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def equations(program: Any) -> Iterator[Any]:
    """All of a program's, those of loops, branches and calls too."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for inside in _programs(equation.params):
            yield from equations(inside)


@pytest.mark.parametrize(
    ("which", "by_cudnn"),
    [
        ("program", 0),
        pytest.param("program_of_a_tpu", 0, marks=pytest.mark.slow),
        pytest.param("program_of_a_gpu", 2 * 10, marks=pytest.mark.slow),
    ],
    ids=["anywhere", "tpu", "gpu"],
)
def test_no_array_is_larger_than_twice_the_largest_activation(which, by_cudnn, request):
    """Attention over 4096 places, for one, is in parts."""
    _, jaxpr = request.getfixturevalue(which)
    names = [one.primitive.name for one in equations(jaxpr)]
    assert names.count("dot_product_attention_fwd_wrapper") == by_cudnn
    check_sizes(jaxpr, 4096 * 8 * 320)  # of an MLP, with its gate


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("make", "given", "largest"),
    [
        (Encoder, (1, 512, 512, 3), 512 * 512 * 128),
        (Decoder, (1, 64, 64, 4), 512 * 512 * 256),
    ],
    ids=["encoder", "decoder"],
)
def test_nor_in_the_autoencoder(make, given, largest, dtype):
    module, of = make(AUTOENCODER), jax.ShapeDtypeStruct
    shapes = jax.eval_shape(module.init, jax.random.key(0), of(given, jnp.float32))["params"]
    params = jax.tree.map(lambda p: of(p.shape, dtype), shapes)
    x = of(given, dtype)
    run = jax.jit(lambda params, x: module.apply({"params": params}, x))
    check_sizes(jax.make_jaxpr(run)(params, x), largest)


def check_sizes(jaxpr: Any, largest: int) -> None:
    """Bytes of all that is computed, beside those of the largest activation, of so many numbers.

    Activations are what weights give, convolutions and products of a layer.
    """
    activations = [
        x.outvars[0].aval
        for x, _ in each_product(jaxpr)
        if x.primitive.name != "dot_general" or not x.params["dimension_numbers"][1][0]
    ]
    most = max(x.size * x.dtype.itemsize for x in activations)
    assert most == largest * activations[0].dtype.itemsize
    for one in equations(jaxpr):
        for out in one.outvars:
            assert out.aval.size * out.aval.dtype.itemsize <= 2 * most, one
