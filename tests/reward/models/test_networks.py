"""The networks: sizes as published, derivatives whatever the convolution, and lowering."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.process import FirstState, first_state
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.train import init_state, train_denoiser
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.reward.extract import extract_reward, init_params
from reward_jax.reward.guide import guided_sample
from reward_jax.reward.relative import RelativeReward
from tests.reward import torch_reference as ref

TINY = functools.partial(TemporalUnet, 3, dim=8, multipliers=(1, 2))


def count(module, horizon, width):
    x = jax.ShapeDtypeStruct((2, horizon, width), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.int32)
    made = jax.eval_shape(module.init, jax.random.key(0), x, t)
    return sum(leaf.size for leaf in jax.tree.leaves(made))


def numel(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_the_authors():
    hopper = TemporalUnet(14, 32, (1, 2, 4, 8))
    assert count(hopper, 32, 14) == 3_956_302 == numel(ref.TemporalUnet(14))
    cheetah = TemporalUnet(23, 32, (1, 4, 8), attention=True)
    assert count(cheetah, 4, 23) == 4_114_423
    for horizon, width in ((32, 14), (4, 23)):
        ours = HalfUnet(4, (16, 16, 32, 32), "leaky_relu", None, False)
        theirs = ref.ValueFunction(
            width, horizon, 4, (16, 16, 32, 32), act="leaky_relu", norm=False, bias=False
        )
        assert count(ours, horizon, width) == numel(theirs)


@functools.cache
def _random_params(module: Any, shape: tuple[int, ...]) -> Any:
    """Every parameter drawn anew: zeros and ones would hide mistakes."""
    x, t = jnp.zeros(shape), jnp.zeros(shape[0], jnp.int32)
    made = jax.eval_shape(module.init, jax.random.key(0), x, t)["params"]
    leaves, tree = jax.tree.flatten(made)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        jax.random.normal(k, s.shape) * (s.shape[0] * (s.shape[1] if s.ndim > 2 else 1)) ** -0.5
        for k, s in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def random_params(module: Any, shape: tuple[int, ...]) -> Any:
    return _random_params(module, shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, shape",
    [
        (TINY, (3, 4, 3)),
        (functools.partial(HalfUnet, 8, (4,)), (3, 5, 3)),
    ],
    ids=["unet", "half"],
)
def test_matmul_is_lax_in_a_network_and_its_derivatives(make, shape):
    params = random_params(make(method="lax"), shape)
    x, t = jax.random.normal(jax.random.key(2), shape), jnp.array([0, 3, 9])

    @jax.jit
    def both(params, x):
        found = []
        for method in ("matmul", "lax"):
            net = make(method=method)

            def out(params, x, net=net):
                return net.apply({"params": params}, x, t)

            def matched(params, x, out=out):
                return jnp.sum(jax.grad(lambda x: jnp.sum(out(params, x) ** 2))(x) ** 2)

            # A U-Net's derivatives would take long to compile; they are those of its layers.
            more = () if make is TINY else jax.grad(matched)(params, x)
            found.append((out(params, x), more))
        return found

    ours, wanted = both(params, x)

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1.0, np.abs(b).max()))

    jax.tree.map(check, ours, wanted)


def test_rows_do_not_see_each_other_and_time_is_an_input():
    x, t = jax.random.normal(jax.random.key(3), (3, 4, 3)), jnp.array([0, 5, 9])
    for net in (TINY(), HalfUnet(8, (4,)), WindowMLP(2), WindowMLP(None)):
        params = random_params(net, x.shape)
        run = jax.jit(lambda x, t, n=net, p=params: n.apply({"params": p}, x, t))
        whole = run(x, t)
        assert whole.shape == (x.shape if isinstance(net, TemporalUnet) else (3,))
        order = jnp.array([2, 0, 1])
        np.testing.assert_allclose(run(x[order], t[order]), whole[order], atol=1e-5)
        assert np.abs(run(x, t + 1) - whole).max() > 1e-4


# Lowering for accelerators that are not here


SCHEDULE = cosine_schedule(5)
PLATFORMS = ("tpu", "cuda")


def lowered(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=PLATFORMS).as_text()


def test_networks_lower():
    x, t = jnp.zeros((2, 4, 3)), jnp.zeros(2, jnp.int32)
    for net in (TINY(attention=True, method="lax"), HalfUnet(8, (4,), method="lax")):
        params = random_params(net, x.shape)
        text = lowered(lambda p, x, n=net: n.apply({"params": p}, x, t), params, x)
        assert "stablehlo.convolution" in text


@pytest.mark.slow
def test_training_extraction_and_sampling_lower():
    unet, half = TINY(method="lax"), HalfUnet(8, (4,), method="lax")
    data = jnp.zeros((8, 4, 3))
    model = score_from(unet, random_params(unet, data.shape), "v", SCHEDULE, clip=1.0)
    params, key, adam = random_params(half, data.shape), jax.random.key(0), optax.adam(1e-3)
    found = {}

    def catch(name):
        """The loop as far as its first compiled call: what would run, and is only lowered."""

        def run_loop(call, state, *, steps, **_):
            found[name] = lowered(lambda s: call(s, 0, steps), state)
            return state, {}

        return run_loop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reward_jax.reward.extract.run_loop", catch("extract"))
        patch.setattr("reward_jax.diffusion.train.run_loop", catch("train"))
        extract_reward(
            model, model, half, params, data, SCHEDULE, adam, steps=2, key=key, pin=FirstState(1)
        )
        state = init_state(unet, adam, data, key, params=model.params)
        train_denoiser(unet, state, data, SCHEDULE, adam, steps=2, key=key)

    def sample(model, reward, state):
        pinned = first_state(state, 4, 3)
        return guided_sample(model, SCHEDULE, (2, 4, 3), key=key, guide=reward, pinned=pinned)

    found["sample"] = lowered(
        sample, model, RelativeReward(params, SCHEDULE, half), jnp.zeros((2, 2))
    )
    for name, text in found.items():
        assert "stablehlo.convolution" in text and "stablehlo.while" in text, name
    assert set(found) == {"extract", "train", "sample"}


def test_seeds_get_parameters_of_their_own():
    net = WindowMLP(None, (4,), 8)
    init = jax.jit(functools.partial(init_params, net, seeds=3))
    made = init(jax.random.key(0), jnp.zeros((2, 3)))
    kernels = made["layer_0"]["kernel"]
    assert kernels.shape == (3, 11, 4)
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
