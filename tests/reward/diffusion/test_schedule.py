"""Tables against formulas in float64, and against Diffuser's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.diffusion.schedule import (
    Schedule,
    cosine_schedule,
    from_betas,
    linear_schedule,
    make_schedule,
)
from tests.reward import torch_reference as ref


@pytest.mark.parametrize("steps", [1, 2, 20, 100, 1000])
def test_cosine_is_the_formula_and_diffusers(steps):
    found = cosine_schedule(steps)

    def bar(t):
        return np.cos((t / steps + 0.008) / 1.008 * np.pi / 2) ** 2

    t = np.arange(steps)
    betas = np.minimum(1 - bar(t + 1) / bar(t), 0.999)
    np.testing.assert_allclose(found.betas, betas, rtol=1e-6)
    np.testing.assert_allclose(found.betas, ref.cosine_betas(steps), rtol=1e-6)
    uncut = betas < 0.999  # up to where betas are cut the product telescopes
    wanted = bar(t + 1) / bar(0)
    np.testing.assert_allclose(found.alphas_cumprod[uncut], wanted[uncut], rtol=1e-6)
    assert found.steps == steps


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_linear_is_the_usual_one_scaled(steps):
    found = linear_schedule(steps)
    ends = (0.1 / steps, min(20 / steps, 0.999))  # 1e-4 and .02 at 1000 steps
    np.testing.assert_allclose(found.betas, np.linspace(*ends, steps), rtol=1e-6)
    assert found.alphas_cumprod[-1] < 1e-4
    np.testing.assert_allclose(
        linear_schedule(7, 0.01, 0.3).betas, np.linspace(0.01, 0.3, 7), rtol=1e-6
    )


def test_tables_are_float64_formulas_cast_once():
    """Formed in float32, 1 - abar would be wrong in the third digit where abar is near 1."""
    rng = np.random.default_rng(0)
    betas = np.concatenate([[1e-5, 1e-4], rng.uniform(1e-3, 0.7, 20)])
    found = from_betas(betas)
    bar = np.array([np.prod(1 - betas[: t + 1]) for t in range(len(betas))])
    before = np.array([1.0, *bar[:-1]])
    wanted = {
        "betas": betas,
        "alphas_cumprod": bar,
        "sqrt_alphas_cumprod": bar**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - bar) ** 0.5,
        # From q(x_{t-1} | x_t, x_0), completing the square: precision of x_{t-1} is
        # alpha / beta + 1 / (1 - bar_before).
        "posterior_variance": 1 / ((1 - betas) / betas + 1 / np.maximum(1 - before, 1e-300)),
        "mean_per_score": betas / (1 - betas) ** 0.5,
    }
    variance = wanted["posterior_variance"]
    wanted["posterior_xt"] = variance * (1 - betas) ** 0.5 / betas
    wanted["posterior_x0"] = 1 - 0 * betas
    wanted["posterior_x0"][1:] = (variance * before**0.5)[1:] / (1 - before[1:])
    for name, table in wanted.items():
        got = getattr(found, name)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, table, rtol=2e-7, atol=1e-30, err_msg=name)


def test_tables_agree_with_the_reference():
    import torch

    betas = np.random.default_rng(1).uniform(1e-3, 0.5, 12).astype(np.float32)
    theirs = ref.GaussianDiffusion(torch.nn.Identity(), 2, 3, 1, 12, betas=torch.from_numpy(betas))
    ours = from_betas(betas)
    names = {
        "alphas_cumprod": "alphas_cumprod",
        "posterior_x0": "posterior_mean_coef1",
        "posterior_xt": "posterior_mean_coef2",
        "posterior_variance": "posterior_variance",
    }
    for our, their in names.items():
        np.testing.assert_allclose(
            getattr(ours, our), theirs.get_buffer(their), rtol=2e-5, atol=1e-9, err_msg=our
        )


def test_a_schedule_is_a_frozen_pytree():
    schedule = cosine_schedule(9)
    with pytest.raises(AttributeError):
        schedule.betas = 0  # pyright: ignore[reportAttributeAccessIssue]
    leaves, tree = jax.tree.flatten(schedule)
    assert len(leaves) == 8 and {x.shape for x in leaves} == {(9,)}
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, Schedule) and again.name == "cosine"
    t = jnp.array([0, 8, 3])
    x = jnp.ones((3, 4, 5))
    at = schedule.at(schedule.betas, t, x)
    assert at.shape == (3, 1, 1)
    np.testing.assert_array_equal(at[:, 0, 0], schedule.betas[t])


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: cosine_schedule(0), "1 diffusion step or more, not 0"),
        (lambda: linear_schedule(-3), "1 diffusion step or more, not -3"),
        (lambda: make_schedule("sine", 5), "schedule 'sine' is unknown; known are cosine, linear"),
        (lambda: from_betas(np.array([])), "above 0 and below 1"),
        (lambda: from_betas(np.array([0.1, 1.0])), "above 0 and below 1"),
        (lambda: from_betas(np.array([0.1, np.nan])), "above 0 and below 1"),
        (lambda: from_betas(np.array([[0.1]])), "above 0 and below 1"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_make_schedule_by_name():
    np.testing.assert_array_equal(make_schedule("linear", 8).betas, linear_schedule(8).betas)
    np.testing.assert_array_equal(make_schedule("cosine", 8).betas, cosine_schedule(8).betas)
