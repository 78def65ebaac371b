"""Classifier-free guidance: two scores in one call of the model; what a score is given."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import (
    ClassifierFree,
    as_argument,
    estimate_x0,
    score_and_x0,
    score_from,
    steps_of,
)
from reward_jax.diffusion.process import convert
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from reward_jax.reward.targets import ExtractionOptions, draw_targets

B, H, D, T = 6, 3, 2, 12
SCHEDULE = cosine_schedule(T)
LEVELS = jnp.array([0, 2, 4, 7, 9, 11])
X = jax.random.normal(jax.random.key(0), (B, H, D))
COND = {
    "tokens": jax.random.normal(jax.random.key(1), (B, 4, 2)),
    "mask": jnp.arange(24).reshape(B, 4) % 3 > 0,
}
NULL = {"tokens": 0.3 * jnp.ones((1, 4, 2)), "mask": jnp.zeros(4, bool)}  # one row, or none
FULL = jax.tree.map(lambda n, c: jnp.broadcast_to(n, c.shape), NULL, COND)


class Conditional:
    """A model that is given tokens and their mask; each row's answer is that row's alone."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def apply(self, variables: Any, x: jax.Array, t: jax.Array, cond: Any) -> jax.Array:
        self.rows.append(len(x))
        weights = jnp.where(cond["mask"][..., None], 2.0, 1.0)
        said = jnp.sum(cond["tokens"] * weights, axis=1)
        return jnp.tanh(x * variables["params"][None, None] + said[:, None, :])


PARAMS = jnp.array([0.7, -0.4])


def ask(score: Any, cond: Any = COND) -> np.ndarray:
    return np.asarray(jax.jit(lambda s, c: s(X, LEVELS, c))(as_argument(score), cond))


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v"])
def test_it_is_the_papers_combination_of_two_noises(prediction):
    """epsilon_u + s (epsilon_c - epsilon_u), with a scale for every row."""
    model = score_from(Conditional(), PARAMS, prediction, SCHEDULE)
    scale = jnp.array([0.0, 1.0, 2.5, -1.0, 7.5, 0.5])

    def noise(cond: Any) -> np.ndarray:
        output = model.model.apply({"params": PARAMS}, X, LEVELS, cond)
        return np.asarray(convert(SCHEDULE, output, X, LEVELS, prediction, "epsilon"), np.float64)

    s = np.asarray(scale, np.float64)[:, None, None]
    wanted = noise(FULL) + s * (noise(COND) - noise(FULL))
    spread = np.asarray(SCHEDULE.sqrt_one_minus_alphas_cumprod)[LEVELS][:, None, None]
    got = -ask(ClassifierFree(model, NULL, scale)) * spread
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("plain", [False, True])
def test_scales_1_and_0_are_both_scores_to_the_last_bit(clip, plain):
    model: Any = score_from(Conditional(), PARAMS, "v", SCHEDULE, clip=clip)
    if plain:  # any function (x_t, t, cond)
        model = functools.partial(type(model).__call__, model)
    np.testing.assert_array_equal(ask(ClassifierFree(model, NULL, 1.0)), ask(model))
    np.testing.assert_array_equal(ask(ClassifierFree(model, NULL, 0.0)), ask(model, FULL))
    rows = jnp.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    got = ask(ClassifierFree(model, NULL, rows))
    np.testing.assert_array_equal(got[1::2], ask(model)[1::2])
    np.testing.assert_array_equal(got[::2], ask(model, FULL)[::2])


def test_estimates_are_clipped_once_they_are_combined():
    free = score_from(Conditional(), PARAMS, "x0", SCHEDULE)
    clipped = score_from(Conditional(), PARAMS, "x0", SCHEDULE, clip=0.4)
    wanted = jnp.clip(ClassifierFree(free, NULL, 3.0).x0(X, LEVELS, COND), -0.4, 0.4)
    guided = ClassifierFree(clipped, NULL, 3.0)
    np.testing.assert_allclose(guided.x0(X, LEVELS, COND), wanted, atol=1e-6)
    score, x_0 = score_and_x0(guided, SCHEDULE, X, LEVELS, COND)
    np.testing.assert_array_equal(x_0, estimate_x0(guided, SCHEDULE, X, LEVELS, COND))
    np.testing.assert_allclose(score, guided(X, LEVELS, COND), rtol=1e-5, atol=1e-5)
    # A plain score has no estimate to give: Tweedie's formula takes its place.
    plain = ClassifierFree(functools.partial(type(free).__call__, free), NULL, 3.0)
    got = estimate_x0(plain, SCHEDULE, X[:4], LEVELS[:4], jax.tree.map(lambda c: c[:4], COND))
    wanted = ClassifierFree(free, NULL, 3.0).x0(X, LEVELS, COND)[:4]
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)


def test_both_halves_are_one_call():
    network = Conditional()
    guided = ClassifierFree(score_from(network, PARAMS, "v", SCHEDULE), NULL, 2.0)
    for function in (type(guided).__call__, type(guided).x0):
        network.rows.clear()
        jax.jit(function)(guided, X, LEVELS, COND)
        assert network.rows == [2 * B]


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
def test_it_samples_steers_and_teaches_as_any_score_does(sampler):
    models = [score_from(Conditional(), p, "x0", SCHEDULE, clip=1.0) for p in (PARAMS, -PARAMS)]
    base, expert = (ClassifierFree(m, NULL, 2.0) for m in models)
    run = functools.partial(
        guided_sample, schedule=SCHEDULE, shape=X.shape, key=jax.random.key(3), cond=COND
    )
    options = GuidanceOptions(sampler=sampler)
    one = run(ClassifierFree(models[0], NULL, 1.0), options=options)
    np.testing.assert_array_equal(one, run(models[0], options=options))
    own, steered = (
        run(base, options=options),
        run(base, guide=ScoreDifference(base, expert), options=options),
    )
    assert np.abs(own - one).max() > 1e-2 and np.abs(steered - own).max() > 1e-2
    if sampler == "ddim":
        np.testing.assert_allclose(steered, run(expert, options=options), atol=1e-4)
    drawn = draw_targets(
        base, expert, (X, COND), SCHEDULE, count=8, key=jax.random.key(4), target="score",
        options=ExtractionOptions(8),
    )  # fmt: skip
    assert drawn.value.shape == (8, H, D) and np.isfinite(drawn.value).all()


def test_without_a_condition():
    guided = ClassifierFree(score_from(Conditional(), PARAMS, "v", SCHEDULE), NULL, 2.0)
    with pytest.raises(InputError, match="classifier-free guidance needs a condition: give cond"):
        guided(X, LEVELS)
    for null in ({"tokens": NULL["tokens"]}, NULL | {"mask": jnp.zeros(5, bool)}, 0.0):
        other: Any = ClassifierFree(score_from(Conditional(), PARAMS, "v", SCHEDULE), null)
        with pytest.raises(InputError, match="null is .* where the condition is .*: give a tree"):
            other(X, LEVELS, COND)
    short = cosine_schedule(T - 2)
    wrong: Any = ClassifierFree(score_from(Conditional(), PARAMS, "v", short), NULL)
    with pytest.raises(InputError, match="base_score has 10 diffusion steps, the schedule 12"):
        draw_targets(wrong, wrong, (X, COND), SCHEDULE, count=8, key=jax.random.key(0))


@pytest.mark.parametrize("x", [None, 1.0, [1.0, 2.0], jnp.float32(3)])
def test_what_is_no_array(x):
    with pytest.raises(InputError, match=r"x_t is a .* of shape \(.*\): give an array \[B, ...\]"):
        score_from(Conditional(), PARAMS, "v", SCHEDULE)(x, LEVELS)


class Half:
    """Halves, and tells what step it is given."""

    def apply(self, variables: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        assert t.shape == x.shape[:1]
        return x * 0.5 + t[:, None, None].astype(x.dtype)


HALF = score_from(Half(), {}, "x0", SCHEDULE)


def test_one_step_stands_for_all_rows():
    wanted = HALF(X, jnp.full(B, 5))
    for t in (5, np.int32(5), jnp.asarray(5), np.full(B, 5)):
        np.testing.assert_array_equal(HALF(X, t), wanted)  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(jax.jit(lambda x, t: HALF(x, t))(X, 5), wanted, rtol=1e-6)
    assert steps_of(X, 3).shape == (B,)


@pytest.mark.parametrize(
    ("x", "t", "said"),
    [
        (np.zeros((2, 3, 2), np.uint8), 0, "x_t is uint8, not floating numbers: scale it as"),
        (jnp.zeros((2, 3, 2), int), 0, "x_t is int32, not floating numbers"),
        (X, 5.0, "t is float32 of shape []: give a diffusion step, a whole number, for each of"),
        (X, jnp.zeros(B), "t is float32 of shape [6]: give a diffusion step"),
        (X, jnp.zeros(B - 1, int), "t is int32 of shape [5]: give a diffusion step, a whole num"),
        (X, jnp.zeros((B, 1), int), "t is int32 of shape [6, 1]: give"),
        (X, T, "t is 12, where the schedule has the steps 0 to 11"),
        (X, jnp.array([0, 1, -1, 2, 3, 4]), "t is -1, where the schedule has the steps 0 to 11"),
    ],
)
def test_what_is_no_x_t_or_no_step(x, t, said):
    for call in (HALF, HALF.x0):
        with pytest.raises(InputError, match=re.escape(said)):
            call(x, t)


def test_a_network_of_another_shape_is_refused():
    class Narrow:
        def apply(self, variables: Any, x: jax.Array, t: jax.Array) -> jax.Array:
            return x[..., :1]

    narrow = score_from(Narrow(), {}, "epsilon", SCHEDULE)
    said = r"a denoiser \(Narrow\) gives \[6, 3, 1\] for x_t of \[6, 3, 2\]: its output must have"
    with pytest.raises(InputError, match=said):
        narrow(X, LEVELS)
