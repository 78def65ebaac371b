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
from reward_jax.reward.targets import (
    Drawn,
    ExtractionOptions,
    Feed,
    Targets,
    draw_targets,
    origin,
    unit,
)

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


@pytest.mark.parametrize(
    ("batches", "held", "size"),
    [(5, 0, 1), (6, 2000, 3), (5, 2000, 1), (6, 1500, 2), (6, 9999, 6)],
)
def test_draws_in_parts_are_the_same_draws(monkeypatch, batches, held, size):
    """In parts of one size, of which each program is compiled once: 5 in two were 3 and 2."""
    whole = drawn(batches * B)
    counts = []
    evaluate = reward_jax.reward.targets._evaluate

    def counted(model, schedule, draws, mesh):
        counts.append(len(draws.t))
        return evaluate(model, schedule, draws, mesh=mesh)

    monkeypatch.setattr(reward_jax.reward.targets, "_BYTES_AT_ONCE", held + 1)
    monkeypatch.setattr(reward_jax.reward.targets, "_evaluate", counted)
    found = drawn(batches * B)
    assert set(counts) == {size} and sum(counts) == 2 * batches  # of both models
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, whole)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (np.zeros((9, 4, 2), np.uint8), "x_0 is uint8, not floating numbers"),
        ((DATA.astype(int), DATA), "x_0 is int32, not floating numbers"),
        (lambda step: np.zeros((B, 4, 2), np.int64), "x_0 is int64, not floating"),
        ([np.zeros((B, 4, 2), np.uint8)], "x_0 is uint8"),
        (7, "batches: int is no array, source, callable or iterable"),
        (np.array(3.0), "x_0 has shape []: give one row or more"),
        ((DATA, 3), "batches: arrays of one data set have ['no', 32] rows"),
        ((DATA, np.array(["a"] * 32)), "a condition is no array of numbers"),
        (np.zeros((0, 4, 2)), "batches: arrays of one data set have [0] rows"),
        (np.zeros((4, 0, 2)), "x_0 has shape [4, 0, 2]: give one row or more"),
        ([1.0, 2.0], "x_0 is a float, not an array"),
        ([np.float32(1)], "x_0 is a float32, not an array"),
        (["a", "b"], "x_0 is a str, not an array"),
        ({"x": DATA}, "x_0 is a str, not an array"),
        (lambda step: jnp.float32(3), "x_0 has shape []: give one row or more"),
        (lambda step: DATA[:0], "x_0 has shape [0, 4, 2]: give one row"),
        (lambda step: None, "x_0 is a NoneType, not an array"),
        (
            DATA.at[3, 0].set(np.nan).at[5, 1].set(np.inf),
            "2 of 32 rows of x_0 hold NaN or infinity, the first is row 3",
        ),
    ],
)
def test_data_that_are_none(batches, said):
    params = init_params(NET, KEY, DATA[:2])
    with pytest.raises(InputError, match=re.escape(said)):
        extract_reward(own, own, NET, params, batches, SCHEDULE, ADAM, steps=1, key=KEY)


def test_batches_of_several_shapes_are_refused():
    """It ended in a message of JAX's insides; a last batch is often smaller."""
    params = init_params(NET, KEY, DATA[:2])
    batches = [DATA[:8], DATA[8:16], DATA[16:20]]
    said = "that of step 3 has the shape (4, 4, 2), that of step 1 (8, 4, 2): give batches of one"
    with pytest.raises(InputError, match=re.escape(said)):
        extract_reward(own, own, NET, params, batches, SCHEDULE, ADAM, steps=3, key=KEY)


@pytest.mark.parametrize("score", [None, 3.0, DATA])
def test_what_is_no_score(score):
    with pytest.raises(InputError, match="base_score is a .*: give a callable"):
        draw_targets(score, own, DATA, SCHEDULE, count=B, key=KEY)
    with pytest.raises(InputError, match="expert_score is a .*: give a callable"):
        draw_targets(own, score, DATA, SCHEDULE, count=B, key=KEY)


@pytest.mark.parametrize("count", [0, -1, 2.5, None])
def test_a_count_that_is_none(count):
    with pytest.raises(InputError, match="count must be a whole number, 1 or more"):
        drawn(count)


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
    assert feed.checksums(2) == Feed([DATA[:2]]).checksums(2) != Feed([DATA[2:4]]).checksums(2)
    _, taken = feed.take(0, 2)
    np.testing.assert_array_equal(taken, jnp.stack([DATA[:2], DATA[2:4]]))
    assert isinstance(Feed(drawn()).example(), Targets)


def test_targets_are_known_by_what_they_were_drawn_from():
    """Rounding, which another number of devices changes, tells none from another."""

    def of(base=own, data=DATA, others=(KEY, 8)):
        options = ExtractionOptions(batch_size=B)
        return origin(base, shifted, data, SCHEDULE, options=options, others=others)

    assert of() == of()
    others = of(base=shifted), of(data=DATA[::-1]), of(others=(KEY, 9))
    assert len({of(), *others}) == 4
    targets = drawn()
    rounded = targets.replace(value=targets.value * (1 + 1e-6))  # pyright: ignore[reportAttributeAccessIssue]
    found = [Feed(Drawn(x, of())) for x in (targets, rounded)]
    assert found[0].checksums(B) == found[1].checksums(B) != Feed(targets).checksums(B)
    assert isinstance(found[0].example(), Targets)
