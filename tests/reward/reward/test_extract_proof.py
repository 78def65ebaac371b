"""The proof on closed forms: where the log ratio of two densities is known, it is what is learned.

At every t with abar_t >= .01, on points that were not trained on: correlation with the log ratio
0.99 or more, relative error of the gradient under 0.1. Of mixtures no quadratic reward comes near
that: it is their modes that are learned.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.linalg import solve_continuous_lyapunov

from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.reward.extract import extract_reward, init_params
from reward_jax.reward.relative import RelativeReward, reward_gradient
from reward_jax.reward.targets import ExtractionOptions, draw_targets
from tests.reward.closed_forms import LinearScore, LogRatio, at_level, both, mixture

SCHEDULE = cosine_schedule(20)
MANY = ExtractionOptions(2000)


def adam(rate, steps):
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)


def pair(seed, dimensions, components, apart):
    """Two Gaussians; or a mixture and the same one with modes moved a little, and other weights.

    Every other mode is likelier, by e^1.5 against the rest: the log ratio goes up and down from
    mode to mode.
    """
    base, other = (
        mixture(s, SCHEDULE, dimensions=dimensions, components=components, apart=apart)
        for s in (seed, seed + 1)
    )
    if components == 1:
        return base, other
    weights = base.log_weights + 0.75 * (-1.0) ** np.arange(components)
    moved = base.means + 0.2 * other.means / apart
    return base, dataclasses.replace(base, log_weights=weights, means=moved)


def judge(learned, base, expert, x_0):
    """Correlations of a reward and of a quadratic one, relative error of the reward's gradient.

    Each at every t with abar_t >= .01. The quadratic's gradient is fitted by least squares at each
    t alone, to the very points that it is judged on.
    """

    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def compare(learned, level, key):
        x, t = at_level(SCHEDULE, x_0, level, key)
        value, ratio = learned(x, t), LogRatio(base, expert)(x, t)
        wanted = expert(x, t) - base(x, t)
        away = jax.grad(lambda x: learned(x, t).sum())(x) - wanted
        error = jnp.linalg.norm(away) / jnp.linalg.norm(wanted)
        return jnp.corrcoef(value, ratio)[0, 1], error, x, wanted, ratio

    levels = np.flatnonzero(np.asarray(SCHEDULE.alphas_cumprod) >= 0.01)
    keys = jax.random.split(jax.random.key(9), len(levels))
    correlation, error, *known = jax.jit(compare)(learned, jnp.asarray(levels), keys)
    return (
        correlation,
        error,
        [quadratic(*map(np.asarray, one)) for one in zip(*known, strict=True)],
    )


def quadratic(x, wanted, ratio):
    """Correlation of b x + x' M x with a ratio [B], fitted by its gradient to wanted [B, D]."""
    i, j = np.triu_indices(x.shape[1])
    unit = np.eye(x.shape[1])
    squares = unit[:, i] * x[:, None, j] + unit[:, j] * x[:, None, i]
    gradients = np.concatenate([np.broadcast_to(unit, (len(x), *unit.shape)), squares], axis=2)
    flat = gradients.reshape(wanted.size, -1)
    weights = np.linalg.lstsq(flat, wanted.ravel(), rcond=None)[0]
    value = np.concatenate([x, x[:, i] * x[:, j]], axis=1) @ weights
    return np.corrcoef(value, ratio)[0, 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed, dimensions, components, steps, width, apart",
    [
        (10, 1, 1, 600, 48, 1.0),
        (10, 3, 1, 600, 48, 1.0),
        (10, 8, 1, 600, 48, 1.0),
        (20, 1, 4, 900, 64, 1.0),
        (10, 3, 3, 900, 64, 1.0),
        (20, 8, 2, 1000, 64, 0.5),
    ],
)
def test_log_density_ratio(seed, dimensions, components, steps, width, apart):
    base, expert = pair(seed, dimensions, components, apart)
    data, held_out = (both(base, expert, jax.random.key(k), n) for k, n in ((0, 20000), (1, 500)))
    # The teachers are asked once: drawing anew at each step would take most of the time.
    targets = draw_targets(
        base, expert, data, SCHEDULE, count=40000, key=jax.random.key(2), options=MANY
    )
    net = WindowMLP(None, (width,) * 3, embedding=16)
    start = jax.jit(functools.partial(init_params, net))(jax.random.key(3), data[:2])
    params, history = extract_reward(
        base,
        expert,
        net,
        start,
        targets,
        SCHEDULE,
        adam(2e-2, steps),
        steps=steps,
        key=jax.random.key(4),
        options=ExtractionOptions(256, steps),
    )
    learned = RelativeReward(params, SCHEDULE, net)
    correlation, error, of_quadratic = judge(learned, base, expert, held_out)
    assert len(correlation) >= 15
    assert correlation.min() >= 0.99, np.round(correlation, 4)
    assert error.max() < 0.1, np.round(error, 3)
    assert history.explained[-20:].mean() > 0.99
    if components == 1:  # a quadratic is what there is to learn
        assert min(of_quadratic) > 0.999
    else:
        assert min(of_quadratic) < 0.95, np.round(of_quadratic, 3)


def test_a_difference_that_is_no_gradient_is_projected():
    """Of A x under N(0, S) the gradient M x with M S + S M = A S + S A^T is left, not (A + A^T)/2.

    At the highest t, x_t is standard normal whatever the data: there it is (A + A^T) / 2.
    """
    rng = np.random.default_rng(0)
    half = rng.normal(size=(3, 3))
    matrix = 2 * half - half.T
    root = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag([0.5, 1.0, 3.0])
    covariance = root @ root.T
    data = jnp.asarray(rng.multivariate_normal(np.zeros(3), covariance, 50000), jnp.float32)
    zero, field = (LinearScore(jnp.asarray(m, jnp.float32)) for m in (0 * matrix, matrix))

    class Quadratic:
        """x' M_t x / 2, one free matrix for each t: what is learned can be read off."""

        def apply(self, variables, x, t):
            m = variables["params"]["m"][t]
            return jnp.einsum("bi,bij,bj->b", x, m, x) / 2

    params, _ = extract_reward(
        zero,
        field,
        Quadratic(),
        {"m": jnp.zeros((20, 3, 3))},
        data,
        SCHEDULE,
        adam(5e-2, 600),
        steps=600,
        key=jax.random.key(0),
        target="score",
        options=ExtractionOptions(2000, 600),
    )
    for t in (0, 8, 19):
        bar = float(SCHEDULE.alphas_cumprod[t])
        s = bar * covariance + (1 - bar) * np.eye(3)
        wanted = solve_continuous_lyapunov(s, matrix @ s + s @ matrix.T)
        got = np.asarray(params["m"][t] + params["m"][t].T) / 2
        np.testing.assert_allclose(got, wanted, atol=0.1)
    symmetric = (matrix + matrix.T) / 2
    s0 = solve_continuous_lyapunov(covariance, matrix @ covariance + covariance @ matrix.T)
    assert np.abs(s0 - symmetric).max() > 0.5  # the two are far apart here
    np.testing.assert_allclose(wanted, symmetric, atol=0.02)


@pytest.mark.slow
def test_all_targets_give_the_same_reward():
    """In three units, the same rho once the unit is undone."""
    base, expert = (mixture(s, SCHEDULE, dimensions=2, components=1, apart=0.7) for s in (20, 21))
    data, held_out = (both(base, expert, jax.random.key(k), n) for k, n in ((5, 8000), (6, 500)))
    net = WindowMLP(None, (32, 32), embedding=16)
    start = jax.jit(functools.partial(init_params, net))(jax.random.key(7), data[:2])
    x, t = at_level(SCHEDULE, held_out, 8, jax.random.key(8))
    gradients = {}
    for target in ("score", "epsilon", "posterior_mean"):
        targets = draw_targets(
            base,
            expert,
            data,
            SCHEDULE,
            count=16000,
            key=jax.random.key(9),
            options=MANY,
            target=target,
        )
        params, history = extract_reward(
            base,
            expert,
            net,
            start,
            targets,
            SCHEDULE,
            adam(2e-2, 700),
            steps=700,
            key=jax.random.key(10),
            target=target,
            options=ExtractionOptions(steps_per_call=700),
        )
        assert history.target == target
        learned = RelativeReward(params, SCHEDULE, net, target)
        gradients[target] = jax.grad(lambda x, r=learned: r(x, t).sum())(x)
        raw = reward_gradient(net, params, x, t)
        unit = {"score": 1.0, "epsilon": (1 - SCHEDULE.alphas_cumprod[8]) ** 0.5}.get(
            target, SCHEDULE.betas[8] / (1 - SCHEDULE.betas[8]) ** 0.5
        )
        np.testing.assert_allclose(raw, gradients[target] * unit, rtol=1e-4, atol=1e-5)
    wanted = expert(x, t) - base(x, t)
    for target, gradient in gradients.items():
        error = jnp.linalg.norm(gradient - wanted) / jnp.linalg.norm(wanted)
        assert error < 0.1, (target, error)
