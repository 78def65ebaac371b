"""Targets on guided paths: at the chains' own points, of the two scores there."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.process import FirstState
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.models.reward_nets import WindowMLP
from reward_jax.reward.diagnostics import explained_fraction, explained_of
from reward_jax.reward.extract import extract_reward, init_params
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from reward_jax.reward.paths import draw_path_targets, join_targets
from reward_jax.reward.relative import RelativeReward
from reward_jax.reward.targets import ExtractionOptions, draw_targets, unit

H, D, A, T = 4, 5, 2, 6
SCHEDULE = cosine_schedule(T)
PIN = FirstState(A)
DATA = jax.random.normal(jax.random.key(0), (40, H, D))
OPTIONS = ExtractionOptions(batch_size=8)


class Linear:
    """x_0 = tanh(x M)."""

    def apply(self, variables, x, t):
        return jnp.tanh(x @ variables["params"])


LINEAR = Linear()
BASE, EXPERT = (
    score_from(LINEAR, jax.random.normal(jax.random.key(i), (D, D)), "x0", SCHEDULE)
    for i in (1, 2)
)
RAW = ScoreDifference(BASE, EXPERT)


def drawn(**changes):
    given: dict[str, Any] = dict(
        guide=RAW, count=90, key=jax.random.key(3), options=OPTIONS, pin=PIN
    )
    return draw_path_targets(BASE, EXPERT, DATA, SCHEDULE, **(given | changes))


@pytest.mark.parametrize("target", ["epsilon", "posterior_mean"])
@pytest.mark.parametrize("sampler", [{}, {"sampler": "ddim", "sampling_steps": 3}], ids=str)
def test_values_are_the_differences_at_points_of_the_chains(target, sampler):
    guidance = GuidanceOptions(scale=2.0, **sampler)
    found = drawn(target=target, guidance=guidance)
    steps = 3 if sampler else T
    assert len(found.t) == -(-90 // (8 * steps)) * 8 * steps
    assert set(np.asarray(found.t).tolist()) == ({1, 3, 5} if sampler else set(range(T)))
    difference = EXPERT(found.x, found.t) - BASE(found.x, found.t)
    expected = SCHEDULE.at(unit(SCHEDULE, target), found.t, found.x) * PIN(found.x).free(
        difference
    )
    np.testing.assert_allclose(found.value, expected, rtol=1e-4, atol=1e-5)
    # A row is followed through its chain, guided and pinned as samples are.
    rows = found.x.reshape(-1, steps, 8, H, D)[0]
    for_rows, for_chain = jax.random.split(jax.random.fold_in(jax.random.key(3), 0))
    index = jax.random.randint(for_rows, (8,), 0, len(DATA))
    chain = guided_sample(
        BASE, SCHEDULE, (8, H, D), key=for_chain, guide=RAW, options=guidance,
        pinned=PIN(DATA[index]), chain=True,
    )  # fmt: skip
    np.testing.assert_allclose(rows, chain[:-1], atol=1e-5)
    np.testing.assert_array_equal(rows[:, :, 0, A:], jnp.stack([DATA[index][:, 0, A:]] * steps))


def test_a_reward_is_matched_to_both_kinds():
    paths = drawn(guidance=GuidanceOptions(scale=2.0))
    noised = draw_targets(
        BASE, EXPERT, DATA, SCHEDULE, count=64, key=jax.random.key(4), options=OPTIONS, pin=PIN
    )
    both = join_targets(noised, paths)
    assert len(both.t) == len(noised.t) + len(paths.t)
    net, adam = WindowMLP(None, (32,)), optax.adam(1e-2)
    params = init_params(net, jax.random.key(5), DATA[:1])
    found = {}
    for name, targets in (("noised", noised), ("both", both)):
        trained, _ = extract_reward(
            BASE, EXPERT, net, params, targets, SCHEDULE, adam, steps=150, key=jax.random.key(6),
            options=OPTIONS, pin=PIN,
        )  # fmt: skip
        reward = RelativeReward(trained, SCHEDULE, net, "epsilon")
        found[name] = np.asarray(explained_of(reward, paths, SCHEDULE, pin=PIN))
    assert found["both"].mean() > found["noised"].mean() + 0.05
    with pytest.raises(InputError, match="targets of 2 units cannot be joined"):
        join_targets(noised, drawn(target="score"))


def test_what_targets_explain_is_what_their_points_do():
    """The same points as `explained_fraction` takes, given as targets."""
    net = WindowMLP(None, (8,))
    params = init_params(net, jax.random.key(5), DATA[:1])
    reward = RelativeReward(params, SCHEDULE, net, "epsilon")
    noised = draw_targets(
        BASE, EXPERT, DATA, SCHEDULE, count=4000, key=jax.random.key(4), pin=PIN,
        options=ExtractionOptions(batch_size=500),
    )  # fmt: skip
    expected = explained_fraction(
        reward, BASE, EXPERT, jnp.tile(DATA, (50, 1, 1)), SCHEDULE, key=jax.random.key(8), pin=PIN
    )
    found = explained_of(reward, noised, SCHEDULE, pin=PIN, batch=700)
    np.testing.assert_allclose(found, expected, atol=0.05, rtol=0.1)  # other noise
    exact = explained_of(RAW, noised, SCHEDULE, pin=PIN)
    np.testing.assert_allclose(exact, np.ones(T), atol=1e-5)
    some = jax.tree.map(lambda x: x[noised.t < 3], noised)
    assert np.isnan(np.asarray(explained_of(RAW, some, SCHEDULE, pin=PIN))).tolist() == [
        *[False] * 3, *[True] * 3,
    ]  # fmt: skip


def test_chains_that_run_away_are_named():
    with pytest.raises(InputError, match="guided chains are not finite: lower guidance.scale"):
        drawn(guidance=GuidanceOptions(scale=1e38))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(count=0), "count must be a whole number, 1 or more, not 0"),
        (dict(count=1.5), "count must be a whole number, 1 or more, not 1.5"),
        (dict(count=True), "count must be a whole number, 1 or more, not True"),
        (dict(key=0), "key is 0: give one key"),
        (dict(options=3), "options are 3: give an object of the class of options"),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_draws_that_cannot_be(changes, said):
    with pytest.raises(InputError, match=said):
        drawn(**changes)
