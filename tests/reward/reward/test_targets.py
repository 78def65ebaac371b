"""Targets: their unit goes with them, and what they are drawn from is held in parts."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import reward_jax.reward.targets
from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import Denoiser
from reward_jax.diffusion.schedule import cosine_schedule, linear_schedule
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.reward.extract import extract_reward, init_params
from reward_jax.reward.targets import ExtractionOptions, Feed, Targets, draw_targets, unit

SCHEDULE = cosine_schedule(6)
KEY = jax.random.key(2)
DATA = jax.random.normal(KEY, (32, 4, 2))
B = 8
NET, ADAM = WindowMLP(2, (8,), embedding=8), optax.adam(1e-2)


def own(x, t, cond=None):
    return -x


def shifted(x, t, cond=None):
    return 0.5 - x


def drawn(count=B, **given):
    own_options: Any = {"batch_size": B} | {
        k: given.pop(k) for k in ("gradient_at",) if k in given
    }
    options = ExtractionOptions(**own_options)
    return draw_targets(
        own, shifted, DATA, SCHEDULE, count=count, key=KEY, options=options, **given
    )


@pytest.mark.parametrize("target", ["epsilon", "score", "posterior_mean"])
def test_a_target_is_its_unit_times_the_difference_and_says_so(target):
    found = drawn(target=target)
    assert (found.target, found.gradient_at) == (target, "x_t")
    wanted = jnp.broadcast_to(unit(SCHEDULE, target)[found.t][:, None, None] * 0.5, found.x.shape)
    np.testing.assert_allclose(found.value, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["all", "callable", "iterable"])
def test_targets_of_another_unit_are_refused(form):
    params = init_params(NET, KEY, DATA[:2])
    targets = drawn(target="epsilon")
    batches = {"all": targets, "callable": lambda step: targets, "iterable": [targets] * 3}[form]

    def match(**given):
        return extract_reward(
            own, own, NET, params, batches, SCHEDULE, ADAM, steps=1, key=KEY, **given
        )

    with pytest.raises(InputError, match="targets were drawn with target 'epsilon', not 'score'"):
        match(target="score")
    options = ExtractionOptions(gradient_at="posterior_mean")
    with pytest.raises(InputError, match="drawn with gradient_at 'x_t', not 'posterior_mean'"):
        match(options=options)
    assert match(target="epsilon")[1].target == "epsilon"


@pytest.mark.parametrize("held", [0, 2000])
def test_draws_in_parts_are_the_same_draws(monkeypatch, held):
    whole = drawn(5 * B)
    counts = []
    evaluate = reward_jax.reward.targets._evaluate

    def counted(model, schedule, draws):
        counts.append(len(draws.t))
        return evaluate(model, schedule, draws)

    monkeypatch.setattr(reward_jax.reward.targets, "_BYTES_AT_ONCE", held + 1)
    monkeypatch.setattr(reward_jax.reward.targets, "_evaluate", counted)
    found = drawn(5 * B)
    assert max(counts) == (1 if held == 0 else 3) and sum(counts) == 10  # of both models
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, whole)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (np.zeros((9, 4, 2), np.uint8), "x_0 is uint8, not floating numbers"),
        ((DATA.astype(int), DATA), "x_0 is int32, not floating numbers"),
        (lambda step: np.zeros((B, 4, 2), np.int64), "x_0 is int32, not floating"),
        ([np.zeros((B, 4, 2), np.uint8)], "x_0 is uint8"),
        (7, "batches: int is no array, source, callable or iterable"),
    ],
)
def test_data_that_are_none(batches, said):
    params = init_params(NET, KEY, DATA[:2])
    with pytest.raises(InputError, match=re.escape(said)):
        extract_reward(own, own, NET, params, batches, SCHEDULE, ADAM, steps=1, key=KEY)


def test_a_score_of_another_shape_is_refused():
    """It would be broadcast."""

    def flat(x, t, cond=None):
        return x.mean(-1, keepdims=True)

    with pytest.raises(InputError, match=r"a score gives \[8, 4, 1\] for x_t of \[8, 4, 2\]"):
        draw_targets(
            own, flat, DATA, SCHEDULE, count=B, key=KEY, options=ExtractionOptions(batch_size=B)
        )


def test_models_of_another_schedule_are_refused():
    class Half:
        def apply(self, variables, x, t):
            return variables["params"] * x

    for schedule, said in (
        (cosine_schedule(9), "base_score has 9 diffusion steps, the schedule 6; give the"),
        (linear_schedule(6), "base_score was made for another schedule (linear; this is cosine"),
    ):
        base = Denoiser(jnp.float32(0.5), schedule, Half(), "x0")
        with pytest.raises(InputError, match=re.escape(said)):
            draw_targets(base, own, DATA, SCHEDULE, count=B, key=KEY)


def test_an_example_of_an_iterable_is_given_again():
    feed = Feed(iter([DATA[:2], DATA[2:4]]))
    np.testing.assert_array_equal(feed.example(), DATA[:2])
    assert feed.digest() == Feed([DATA[:2]]).digest() != Feed([DATA[2:4]]).digest()
    _, taken = feed.take(0, 2)
    np.testing.assert_array_equal(taken, jnp.stack([DATA[:2], DATA[2:4]]))
    assert isinstance(Feed(drawn()).example(), Targets)
