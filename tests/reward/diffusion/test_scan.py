"""Convolutions in loops: the same numbers, and no form of them that a CPU computes slowly."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.loop import LoopOptions
from reward_jax.diffusion.scan import canonical, scan
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.train import TrainingOptions, init_state, train_denoiser
from reward_jax.reward.discriminator import train_discriminator
from reward_jax.reward.extract import ExtractionOptions, extract_reward, init_params
from reward_jax.reward.guide import guided_sample
from reward_jax.reward.relative import RelativeReward

X = jax.random.normal(jax.random.key(0), (3, 5, 4, 2))
SCHEDULE, KEY, ADAM = cosine_schedule(3), jax.random.key(1), optax.adam(1e-3)


class Convolutions(nn.Module):
    """A user's own network, of flax's convolutions; scalar: a reward."""

    scalar: bool = False

    @nn.compact
    def __call__(self, x, t):
        y = nn.silu(nn.Conv(4, (3, 3), strides=2)(x + t.astype(x.dtype)[:, None, None, None]))
        y = nn.silu(nn.Conv(4, (3, 2), kernel_dilation=(1, 2), feature_group_count=2)(y))
        y = nn.ConvTranspose(2, (2, 2), strides=(2, 2))(y)[:, : x.shape[1], : x.shape[2]]
        return y.mean((1, 2, 3)) if self.scalar else y


def slow_convolutions(text: str | None) -> list[str]:
    """Forms of a compiled program's convolutions that the CPU's library does not compute."""
    assert text is not None
    return [form for form in re.findall(r"dim_labels=(\S+?),", text) if form != "b01f_01io->b01f"]


def step(net):
    """Gradient matching: derivatives of the second order, those of kernels among them."""

    def one(params, x):
        def matched(params):
            slope = jax.grad(lambda x: net.apply({"params": params}, x, jnp.zeros(3)).sum())
            return jnp.square(slope(x)).sum()

        loss, grads = jax.value_and_grad(matched)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    return one


@pytest.mark.parametrize("seeds", [False, True])
def test_a_loop_gives_what_it_did_in_the_quick_form(seeds):
    net: Any = Convolutions(scalar=True)
    params, one = net.init(KEY, X, jnp.zeros(3))["params"], step(net)
    if seeds:
        params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
        one = jax.vmap(one, in_axes=(0, None))
    xs = jnp.stack([X, 1 - X])
    run = jax.jit(lambda params: scan(one, params, xs)).lower(params).compile()
    plain = jax.jit(lambda params: jax.lax.scan(one, params, xs)).lower(params).compile()
    assert not slow_convolutions(run.as_text()) and slow_convolutions(plain.as_text())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        run(params),
        plain(params),
    )


def test_loops_and_branches_within_are_rewritten_too():
    net: Any = Convolutions(scalar=True)
    params = net.init(KEY, X, jnp.zeros(3))["params"]

    @jax.checkpoint
    def energy(x):
        return jax.jit(net.apply)({"params": params}, x, jnp.zeros(3)).sum()

    def one(x, on):
        x = jax.lax.cond(on, lambda x: x - jax.grad(energy)(x), lambda x: x, x)
        x = jax.lax.fori_loop(0, 2, lambda _, x: x + jax.grad(energy)(x), x)
        return jax.lax.scan(lambda x, _: (x + jax.grad(energy)(x), x.sum()), x, None, 2)

    given = X, jnp.array([True, False])
    run = jax.jit(lambda x, on: scan(one, x, on)).lower(*given).compile()
    assert not slow_convolutions(run.as_text())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        run(*given),
        jax.jit(lambda x, on: jax.lax.scan(one, x, on))(*given),
    )


def kernels_turned(x, kernel):
    """A convolution whose form is slow in a loop."""
    axes = ("NHWC", "OIHW", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes)


by_vjp = jax.custom_vjp(kernels_turned)
by_vjp.defvjp(
    lambda *given: (kernels_turned(*given), given),
    lambda given, g: jax.tree.map(jnp.negative, jax.vjp(kernels_turned, *given)[1](g)),
)
by_jvp = jax.custom_jvp(kernels_turned)


@by_jvp.defjvp
def _reversed(primals, tangents):
    value, slope = jax.jvp(kernels_turned, primals, tangents)
    return value, -slope


@pytest.mark.parametrize("reversing", [by_vjp, by_jvp])
def test_a_rule_for_derivatives_is_kept(reversing):
    """One that reverses them, of a loop from outside it and of a function alone."""
    kernel = jax.random.normal(KEY, (2, 2, 3, 3))

    def loop(scan, convolve):
        def run(x, kernel):
            return scan(lambda x, _: (jnp.tanh(convolve(x, kernel)), x.sum()), x, jnp.arange(3))

        return run

    found, wanted, plain = (
        jax.jit(jax.grad(lambda *given, run=run: run(*given)[0].sum(), (0, 1)))(X, kernel)
        for run in (
            loop(scan, reversing),
            loop(jax.lax.scan, reversing),
            loop(jax.lax.scan, kernels_turned),
        )
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)
    np.testing.assert_allclose(found[0], -plain[0], atol=1e-4)  # thrice reversed
    alone = jax.grad(lambda x, f: (f(x, kernel) ** 2).sum())
    np.testing.assert_allclose(
        alone(X, canonical(reversing)), -alone(X, kernels_turned), rtol=1e-4, atol=1e-4
    )
    run = jax.jit(loop(scan, reversing)).lower(X, kernel).compile()
    assert not slow_convolutions(run.as_text())


def test_what_has_no_convolution_is_left_as_it_is():
    def one(x):
        return {"sum": x.sum(), "x": x @ x.T}

    programs = [str(jax.make_jaxpr(f)(jnp.eye(3))) for f in (one, canonical(one))]
    assert programs[0] == programs[1]


def test_every_loop_of_the_package_is_quick_with_a_users_convolutions(monkeypatch):
    """Training, extraction, a discriminator and guided sampling, by what they would run."""
    net: Any = Convolutions()
    reward: Any = Convolutions(scalar=True)
    params = init_params(reward, KEY, X)
    model = score_from(net, init_params(net, KEY, X), "v", SCHEDULE)
    found = {}

    def catch(name):
        def run_loop(call, state, *, steps, **_):
            lowered = jax.jit(lambda s: call(s, 0, steps)).lower(state)
            found[name] = lowered.compile().as_text()
            return state, {}

        return run_loop

    for name in ("diffusion.train", "reward.extract", "reward.discriminator"):
        monkeypatch.setattr(f"reward_jax.{name}.run_loop", catch(name))
    state = init_state(net, ADAM, X, KEY)
    given: Any = {"steps": 2, "key": KEY}
    train_denoiser(net, state, X, SCHEDULE, ADAM, options=TrainingOptions(2), **given)
    extract_reward(
        model, model, reward, params, X, SCHEDULE, ADAM, options=ExtractionOptions(2), **given
    )
    train_discriminator(reward, params, X, X, SCHEDULE, ADAM, options=LoopOptions(2), **given)
    guide = RelativeReward(params, SCHEDULE, reward)
    sample = jax.jit(lambda m, g: guided_sample(m, SCHEDULE, X.shape, key=KEY, guide=g))
    found["guided_sample"] = sample.lower(model, guide).compile().as_text()
    assert len(found) == 4
    for name, text in found.items():
        assert "b01f_01io->b01f" in text and " while(" in text, name
        assert not slow_convolutions(text), name
