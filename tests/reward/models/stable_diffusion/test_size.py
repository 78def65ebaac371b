"""Stable Diffusion 1.5's real size, without its weights: nothing is computed or held."""

from typing import Any

import diffusers as untyped
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common_jax.cost import each_product, products
from reward_jax.models.stable_diffusion.config import UNetConfig
from reward_jax.models.stable_diffusion.unet import UNet

diffusers: Any = untyped  # its lazy names are unknown to a type checker

# unet/config.json of Stable Diffusion 1.5; all else is diffusers' default.
STATED = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


@pytest.fixture(scope="module")
def program():
    """The U-Net's parameters' shapes and its program at one latent of 64 x 64."""
    module = UNet(UNetConfig.of(STATED, "here"))
    of = jax.ShapeDtypeStruct
    given = of((1, 64, 64, 4), jnp.float32), of((1,), jnp.int32), of((1, 77, 768), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *given)["params"]
    run = jax.jit(lambda params, *given: module.apply({"params": params}, *given))
    return shapes, jax.make_jaxpr(run)(shapes, *given)


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


def test_no_logits_are_larger_than_twice_the_largest_activation(program):
    """Attention over 4096 places is computed for some of them at a time."""
    _, jaxpr = program
    logits = activations = 0
    for equation, _ in each_product(jaxpr):
        size, numbers = equation.outvars[0].aval.size, equation.params["dimension_numbers"]
        if equation.primitive.name == "dot_general" and numbers[1][0]:
            logits = max(logits, size)
        else:
            activations = max(activations, size)
    assert 0 < logits <= 2 * activations
