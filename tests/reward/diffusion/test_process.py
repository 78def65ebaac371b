"""Conversions, losses and the posterior, against Diffuser's in PyTorch and against themselves."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import estimate_x0, score_from
from reward_jax.diffusion.process import (
    FirstState,
    Pinned,
    action_weights,
    convert,
    draw_noise,
    first_state,
    posterior_mean,
    prediction_loss,
    q_sample,
    score_to_x0,
    x0_to_score,
)
from reward_jax.diffusion.schedule import cosine_schedule
from tests.reward import torch_reference as ref

B, H, D, A, T = 6, 5, 7, 3, 20
SCHEDULE = cosine_schedule(T)
T_ROWS = jnp.array([0, 3, 7, 11, 15, 19])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape or (B, H, D))


class Fixed(torch.nn.Module):
    """A model whose answer is given, whatever it is asked."""

    def __init__(self, output):
        super().__init__()
        self.output = torch.from_numpy(np.array(output))

    def forward(self, x, cond, t):
        return self.output.clone()


class Answer:
    """The same for us."""

    def apply(self, variables, x_t, t):
        return variables["params"]


def reference(output, **options):
    return ref.GaussianDiffusion(Fixed(output), H, D, A, T, **options)


def tensors(*arrays):
    return [torch.from_numpy(np.array(x)) for x in arrays]


def test_predictions_convert_as_they_are_defined():
    x_0, noise = normal(0), normal(1)
    x_t = q_sample(SCHEDULE, x_0, T_ROWS, noise)
    bar = np.asarray(SCHEDULE.alphas_cumprod, np.float64)[np.asarray(T_ROWS)][:, None, None]
    np.testing.assert_allclose(x_t, bar**0.5 * x_0 + (1 - bar) ** 0.5 * noise, atol=1e-6)
    values: dict[Any, Any] = {
        "x0": x_0,
        "epsilon": noise,
        "v": bar**0.5 * noise - (1 - bar) ** 0.5 * x_0,
    }
    loss_of_digits = {"epsilon": (1 - bar) ** -0.5, "x0": bar**-0.5}
    for source, target in itertools.product(values, values):
        got = convert(
            SCHEDULE, jnp.asarray(values[source], jnp.float32), x_t, T_ROWS, source, target
        )
        # x_0 of an epsilon where nothing of x_0 is left is as imprecise as float32 makes it.
        scale = loss_of_digits["x0"] if source == "epsilon" else loss_of_digits["epsilon"]
        off = np.abs(np.asarray(got) - np.asarray(values[target])) / np.maximum(scale, 1)
        assert off.max() < 3e-6, (source, target)


def test_scores_round_trip_and_match_their_definition():
    x_0, noise = normal(2), normal(3)
    x_t = q_sample(SCHEDULE, x_0, T_ROWS, noise)
    bar = np.asarray(SCHEDULE.alphas_cumprod, np.float64)[np.asarray(T_ROWS)][:, None, None]
    score = x0_to_score(SCHEDULE, x_0, x_t, T_ROWS)
    np.testing.assert_allclose(score, -noise / (1 - bar) ** 0.5, rtol=2e-4, atol=2e-5)
    v = bar**0.5 * noise - (1 - bar) ** 0.5 * x_0
    by_v = -np.asarray(x_t) - (bar / (1 - bar)) ** 0.5 * np.asarray(v)  # reward.md
    np.testing.assert_allclose(score, by_v, rtol=2e-4, atol=2e-4)
    wide = np.asarray(bar)[:, 0, 0] > 1e-3
    back = score_to_x0(SCHEDULE, score, x_t, T_ROWS)
    np.testing.assert_allclose(back[wide], x_0[wide], atol=1e-4)


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_denoiser_is_its_models_score(prediction, clip):
    x_t, output = normal(4), normal(5)
    denoiser = score_from(Answer(), output, prediction, SCHEDULE, clip=clip)
    x_0 = convert(SCHEDULE, output, x_t, T_ROWS, prediction, "x0")
    x_0 = x_0 if clip is None else jnp.clip(x_0, -clip, clip)
    score = denoiser(x_t, T_ROWS)
    np.testing.assert_array_equal(score, x0_to_score(SCHEDULE, x_0, x_t, T_ROWS))
    np.testing.assert_array_equal(estimate_x0(denoiser, SCHEDULE, x_t, T_ROWS), x_0)
    plain: Any = lambda x, t: denoiser(x, t)  # noqa: E731
    by_tweedie = estimate_x0(plain, SCHEDULE, x_t, T_ROWS)
    size = np.abs(x_0).max(axis=(1, 2), keepdims=True)
    bar = np.asarray(SCHEDULE.alphas_cumprod)[np.asarray(T_ROWS)][:, None, None]
    assert (np.abs(by_tweedie - x_0) / (size + bar**-0.5)).max() < 1e-5
    with pytest.raises(InputError, match="prediction 'mean' is unknown; known are x0, epsilon, v"):
        score_from(Answer(), output, "mean", SCHEDULE)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("epsilon", [False, True])
def test_loss_is_diffusers(epsilon):
    x_0, noise, output = normal(6), normal(7), normal(8)
    theirs = reference(output, epsilon=epsilon, action_weight=10.0)
    state = x_0[:, 0, A:]
    x, n, first, t = tensors(x_0, noise, state, T_ROWS)
    wanted = theirs.p_losses(x, {0: first}, t, n).item()
    if epsilon:  # they leave a constant in, see the reference
        wanted -= float(((state - noise[:, 0, A:]) ** 2).sum() / x_0.size)
    pinned = FirstState(A)(x_0)
    got = prediction_loss(
        SCHEDULE,
        output,
        x_0,
        T_ROWS,
        noise,
        prediction="epsilon" if epsilon else "x0",
        weights=action_weights(H, D, A, 10.0),
        pinned=pinned,
    )
    assert got.shape == (B,)
    np.testing.assert_allclose(got.mean(), wanted, rtol=1e-5)
    ours, x_t = q_sample(SCHEDULE, x_0, T_ROWS, noise), theirs.q_sample(x, t, n)
    np.testing.assert_allclose(pinned(ours), theirs.impose(x_t, {0: first}), atol=2e-6)


def test_the_loss_of_v_is_that_of_x0_in_another_unit():
    """v - v* = -(x_0 - x_0*) / sqrt(1 - abar), whatever the prediction."""
    x_0, noise, output = normal(9), normal(10), normal(11)
    x_t = q_sample(SCHEDULE, x_0, T_ROWS, noise)
    weights = jax.random.uniform(jax.random.key(12), (H, D))
    as_x0 = convert(SCHEDULE, output, x_t, T_ROWS, "v", "x0")

    def loss(value, prediction):
        return prediction_loss(
            SCHEDULE, value, x_0, T_ROWS, noise, prediction=prediction, weights=weights
        )

    wanted = loss(as_x0, "x0") / (1 - SCHEDULE.alphas_cumprod[T_ROWS])
    np.testing.assert_allclose(loss(output, "v"), wanted, rtol=1e-4)
    with pytest.raises(InputError, match="prediction 'noise' is unknown"):
        loss(output, "noise")


@pytest.mark.parametrize("epsilon, clip", [(False, False), (False, True), (True, True)])
def test_posterior_mean_is_diffusers(epsilon, clip):
    x_t, output = normal(13), normal(14)
    theirs = reference(output, epsilon=epsilon, clip=clip)
    denoiser = score_from(
        Answer(), output, "epsilon" if epsilon else "x0", SCHEDULE, clip=1.0 if clip else None
    )
    x, t = tensors(x_t, T_ROWS)
    mean, variance, _ = theirs.p_mean_variance(x, {}, t)
    got = posterior_mean(SCHEDULE, denoiser.x0(x_t, T_ROWS), x_t, T_ROWS)
    np.testing.assert_allclose(got, mean, atol=2e-5)
    np.testing.assert_allclose(
        SCHEDULE.posterior_variance[T_ROWS], variance[:, 0, 0], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(got[0], denoiser.x0(x_t, T_ROWS)[0], atol=1e-6)  # t = 0


def test_difference_of_means_is_the_difference_of_scores_scaled():
    x_t = normal(15)
    one, two = (score_from(Answer(), normal(s), "v", SCHEDULE, clip=1.0) for s in (16, 17))
    means = [posterior_mean(SCHEDULE, d.x0(x_t, T_ROWS), x_t, T_ROWS) for d in (one, two)]
    scores = one(x_t, T_ROWS) - two(x_t, T_ROWS)
    scaled = SCHEDULE.at(SCHEDULE.mean_per_score, T_ROWS, x_t) * scores
    np.testing.assert_allclose(means[0] - means[1], scaled, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (5, 4, 3), (2, 3, 4, 5)])
def test_noise_is_jaxs_own(shape):
    key = jax.random.key(5)
    wanted = jax.random.normal(key, shape)
    np.testing.assert_array_equal(jax.jit(draw_noise, static_argnums=1)(key, shape), wanted)


def test_pinned_entries():
    x = normal(18)
    observations = normal(19, B, D - A)
    pinned = first_state(observations, H, D)
    put = pinned(x)
    np.testing.assert_array_equal(put[:, 0, A:], observations)
    np.testing.assert_array_equal(put[:, 1:], x[:, 1:])
    np.testing.assert_array_equal(put[:, 0, :A], x[:, 0, :A])
    free = pinned.free(x)
    assert not free[:, 0, A:].any()
    np.testing.assert_array_equal(free[:, 1:], x[:, 1:])
    np.testing.assert_array_equal(free[:, 0, :A], x[:, 0, :A])
    np.testing.assert_array_equal(FirstState(A)(put)(x), put)
    whole = FirstState()(x)  # no actions: all of the first step
    assert whole.mask[0].all() and not whole.mask[1:].any()
    some = Pinned(x > 0, jnp.full_like(x, 9.0))
    assert ((some(x) == 9) == (x > 0)).all()
    jax.jit(lambda p, x: p(x))(pinned, x)  # a pytree


def test_action_weights():
    weights = action_weights(H, D, A, 10.0)
    assert (weights[0, :A] == 10).all() and weights.sum() == H * D + 9 * A


def test_an_output_of_another_shape_is_refused():
    """It would be broadcast, and the loss be of something else."""
    x, t = jnp.ones((2, 4, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(InputError, match=r"a denoiser gives \[2, 4, 1\] for x_t of \[2, 4, 3\]"):
        prediction_loss(cosine_schedule(4), x[..., :1], x, t, x, prediction="v")
