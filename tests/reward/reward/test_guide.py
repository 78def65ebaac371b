"""Steered sampling: Diffuser's step in PyTorch, and distributions that are known."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import struct

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.process import first_state
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.reward.extract import RelativeReward, init_params
from reward_jax.reward.guide import guided_sample, sweep
from tests.reward import torch_reference as ref
from tests.reward.closed_forms import LogRatio, Mixture, mixture

H, D, A, T = 4, 5, 2, 10
SCHEDULE = cosine_schedule(T)
SHAPE = (6, H, D)
NET = WindowMLP(None, (16,))


class Linear:
    """A denoiser that both sides can have without weights to carry over: x_0 = tanh(x M)."""

    def apply(self, variables, x, t):
        return jnp.tanh(x @ variables["params"])


LINEAR = Linear()  # one for all tests: static arguments are told apart by identity


@pytest.fixture(scope="module")
def base():
    matrix = jax.random.normal(jax.random.key(0), (D, D))
    return score_from(LINEAR, matrix, "x0", SCHEDULE, clip=0.9)


@pytest.fixture(scope="module")
def reward():
    params = jax.jit(functools.partial(init_params, NET))(jax.random.key(1), jnp.zeros(SHAPE))
    return RelativeReward(params, SCHEDULE, NET)


@struct.dataclass
class Bowl:
    """-|x - centre|^2 / 2, with a unit of its own: a guide whose gradient is known."""

    centre: Any

    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.learned(x, t) * (1 + t)

    def learned(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return -jnp.square(x - self.centre).reshape(len(x), -1).sum(1) / 2


class TorchBowl(torch.nn.Module):
    def __init__(self, centre: np.ndarray) -> None:
        super().__init__()
        self.centre = torch.from_numpy(np.array(centre))

    def forward(self, x, cond, t):
        return -((x - self.centre) ** 2).flatten(1).sum(1, True) / 2


class TorchLinear(torch.nn.Module):
    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__()
        self.matrix = torch.from_numpy(np.array(matrix))

    def forward(self, x, cond, t):
        return torch.tanh(x @ self.matrix)


def test_scale_zero_is_unguided_to_the_last_bit(base, reward):
    key = jax.random.key(2)
    pinned = first_state(jnp.full((6, D - A), 0.3), H, D)
    plain = guided_sample(base, SCHEDULE, SHAPE, key=key, pinned=pinned)
    none = guided_sample(base, SCHEDULE, SHAPE, key=key, pinned=pinned, reward=reward, scale=0.0)
    late = guided_sample(
        base, SCHEDULE, SHAPE, key=key, pinned=pinned, reward=reward, scale=2.0, t_stopgrad=T
    )
    np.testing.assert_array_equal(plain, none)
    np.testing.assert_array_equal(plain, late)
    some = guided_sample(base, SCHEDULE, SHAPE, key=key, pinned=pinned, reward=reward, scale=5.0)
    assert np.abs(some - plain).max() > 1e-3


def test_a_gradient_that_is_not_finite_stays_out_where_there_is_no_guidance(base):
    key = jax.random.key(2)
    bad = Bowl(jnp.full((H, D), jnp.nan))
    got = guided_sample(base, SCHEDULE, SHAPE, key=key, reward=bad, scale=0.0)
    assert np.isfinite(got).all()


@functools.cache
def steered_gaussians(seed: int, dimensions: int, scale: float) -> tuple[Mixture, np.ndarray]:
    schedule = cosine_schedule(150)
    base, expert = (
        mixture(seed + i, schedule, dimensions=dimensions, components=1, apart=1.5) for i in (0, 1)
    )
    x = guided_sample(
        base,
        schedule,
        (8000, dimensions),
        key=jax.random.key(seed),
        reward=LogRatio(base, expert),
        scale=scale,
    )
    return (expert if scale else base), np.asarray(x, np.float64)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_exact_reward_makes_the_base_sample_the_expert(scale):
    """Scale 1 of the step "posterior_mean": mean and covariance are the expert's."""
    wanted, x = steered_gaussians(3, 2, scale)
    covariance = np.asarray((wanted.axes * wanted.spread[:, None]) @ wanted.axes.mT)[0]
    np.testing.assert_allclose(x.mean(0), wanted.means[0], atol=0.06)
    # 150 steps, and the expert's mean taken a little off x_t: a few hundredths are lost.
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.08)


@pytest.mark.parametrize("by_variance", [False, True])
@pytest.mark.parametrize("guide_steps, t_stopgrad", [(1, 0), (2, 4), (3, 9)])
def test_a_chain_is_the_references_step_by_step(by_variance, guide_steps, t_stopgrad):
    """step="learned" is the authors' guide, which adds the network's own gradient."""
    keys = jax.random.split(jax.random.key(4), 4)
    matrix = jax.random.normal(keys[0], (D, D)) / 2
    centre = jax.random.normal(keys[1], (H, D))
    state = jax.random.normal(keys[2], (6, D - A))
    chain = guided_sample(
        score_from(LINEAR, matrix, "x0", SCHEDULE, clip=1.0),
        SCHEDULE,
        SHAPE,
        key=keys[3],
        reward=Bowl(centre),
        scale=0.13,
        t_stopgrad=t_stopgrad,
        n_guide_steps=guide_steps,
        step="learned",
        scale_by_variance=by_variance,
        pinned=first_state(state, H, D),
        chain=True,
    )
    assert chain.shape == (T + 1, *SHAPE)
    theirs = ref.GaussianDiffusion(TorchLinear(matrix), H, D, A, T, clip=True)  # pyright: ignore[reportArgumentType]
    cond = {0: torch.from_numpy(np.array(state))}
    noise = jax.random.split(jax.random.split(keys[3])[1], T)
    for i, level in enumerate(range(T - 1, -1, -1)):
        drawn = jax.random.normal(noise[i], SHAPE)
        x, z = (torch.from_numpy(np.array(v)) for v in (chain[i], drawn))
        wanted = ref.guided_p_sample(
            theirs,
            TorchBowl(centre),  # pyright: ignore[reportArgumentType]
            x,
            cond,
            torch.full((6,), level),
            z,
            scale=0.13,
            t_stopgrad=t_stopgrad,
            guide_steps=guide_steps,
            by_variance=by_variance,
        )
        np.testing.assert_allclose(chain[i + 1], theirs.impose(wanted, cond), atol=2e-5)


@pytest.mark.parametrize("step", ["posterior_mean", "variance", "score", "learned"])
def test_how_far_scale_1_goes(step):
    """On a base of one point, x_{t-1} - x_{t-1 unguided} is the climb times a known factor."""
    base = score_from(LINEAR, jnp.zeros((D, D)), "x0", SCHEDULE)
    common: Any = dict(key=jax.random.key(5), chain=True, step=step)
    bowl = Bowl(jnp.ones((H, D)))
    x = guided_sample(base, SCHEDULE, SHAPE, reward=bowl, t_stopgrad=T - 1, **common)
    y = guided_sample(base, SCHEDULE, SHAPE, reward=bowl, scale=0.0, **common)
    table = {
        "posterior_mean": SCHEDULE.mean_per_score,
        "variance": SCHEDULE.posterior_variance,
        "score": jnp.ones(T),
        "learned": jnp.ones(T),
    }[step]
    far = table[-1] * (1 if step == "learned" else T) * SCHEDULE.posterior_xt[-1]
    np.testing.assert_allclose(x[1] - y[1], far * (1 - y[0]), rtol=1e-4, atol=1e-5)


def test_sweep_is_single_calls(base, reward):
    key = jax.random.key(6)
    scales, stops = [0.0, 1.5, 8.0], [0, 5]
    pinned = first_state(jax.random.normal(key, (6, D - A)), H, D)
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **facts: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(facts["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(listen)
    got = sweep(
        base,
        SCHEDULE,
        SHAPE,
        key=key,
        reward=reward,
        scales=scales,
        t_stopgrads=stops,
        pinned=pinned,
        n_guide_steps=2,
    )
    jax.monitoring.unregister_event_duration_listener(listen)
    assert [name for name in compiled if "_sample" in name] == ["jit(_sample)"]
    assert got.shape == (3, 2, *SHAPE)
    for i, scale in enumerate(scales):
        for j, stop in enumerate(stops):
            one = guided_sample(
                base,
                SCHEDULE,
                SHAPE,
                key=key,
                reward=reward,
                scale=scale,
                t_stopgrad=stop,
                pinned=pinned,
                n_guide_steps=2,
            )
            np.testing.assert_allclose(got[i, j], one, atol=2e-5)
    np.testing.assert_allclose(got[0, 0], got[0, 1], atol=1e-6)
    assert np.abs(got[2, 0] - got[0, 0]).max() > 1e-3
    np.testing.assert_array_equal(
        got[:, :, :, 0, A:], np.broadcast_to(pinned.value[:, 0, A:], (3, 2, 6, D - A))
    )


def test_a_scale_for_every_row(base, reward):
    key, scales = jax.random.key(7), jnp.array([0.0, 1.0, 0.0, 3.0, 10.0, 0.5])
    got = guided_sample(base, SCHEDULE, SHAPE, key=key, reward=reward, scale=scales)
    for scale in (0.0, 3.0, 10.0):
        one = guided_sample(base, SCHEDULE, SHAPE, key=key, reward=reward, scale=scale)
        rows = np.asarray(scales) == scale
        np.testing.assert_allclose(got[rows], one[rows], atol=2e-5)


def test_chain_ends_in_the_samples_and_temperature_scales_the_noise(base):
    key = jax.random.key(8)
    chain = guided_sample(base, SCHEDULE, SHAPE, key=key, chain=True)
    np.testing.assert_array_equal(chain[-1], guided_sample(base, SCHEDULE, SHAPE, key=key))
    cold = guided_sample(base, SCHEDULE, SHAPE, key=key, temperature=0.0, chain=True)
    half = guided_sample(base, SCHEDULE, SHAPE, key=key, temperature=0.5, chain=True)
    np.testing.assert_array_equal(cold[0], chain[0])
    np.testing.assert_allclose(half[1] - cold[1], (chain[1] - cold[1]) / 2, atol=1e-5)
    assert np.abs(chain[1] - cold[1]).max() > 0.1


def test_a_condition_reaches_the_base():
    class Told:
        def apply(self, variables, x, t, cond):
            return jnp.zeros_like(x) + cond[:, None, None]

    cond = jnp.arange(6.0)
    x = guided_sample(
        score_from(Told(), {}, "x0", SCHEDULE), SCHEDULE, SHAPE, key=jax.random.key(9), cond=cond
    )
    np.testing.assert_allclose(x, jnp.broadcast_to(cond[:, None, None], SHAPE), atol=1e-5)


def test_bad_input(base, reward):
    key = jax.random.key(0)
    with pytest.raises(InputError, match="step 'mean' is unknown; known are posterior_mean,"):
        guided_sample(base, SCHEDULE, SHAPE, key=key, reward=reward, step="mean")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="n_guide_steps must be 1 or more, not 0"):
        guided_sample(base, SCHEDULE, SHAPE, key=key, reward=reward, n_guide_steps=0)
