"""Sets of episodes: what they hold, replayed in the environment."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.tasks.locomotion import collect
from reward_jax.tasks.locomotion.robots import ROBOTS
from reward_jax.tasks.locomotion.simulator import Simulator
from tests.reward.tasks.locomotion.conftest import random_policy


@pytest.mark.parametrize("name", ["halfcheetah", "hopper"])
@pytest.mark.parametrize("which", collect.SETS)
def test_rows_are_what_the_world_does(name, which, shipped):
    shipped(name)
    found: Any = collect.collect(name, which, episodes=5, seed=3, steps=120)
    again = collect.collect(name, which, episodes=5, seed=3, steps=120)
    other = collect.collect(name, which, episodes=5, seed=4, steps=120)
    np.testing.assert_array_equal(found.actions, again.actions)
    assert found.actions.shape != other.actions.shape or (found.actions != other.actions).any()
    assert found.about["goal"] == which and found.about["task"] == name
    assert set(found.about["policies"]) <= {"early", "late", "medium", "expert"}

    assert found.lengths.sum() == len(found.observations) and found.lengths.min() > 0
    last = found.ends - 1
    ended = found.terminations | found.truncations
    assert ended.sum() == len(last) and ended[last].all()
    # The states that rows hold, and one step from each (float32 rows, so not to the last bit).
    simulator = Simulator(name, found.observations)
    step = simulator.step(found.actions)
    np.testing.assert_allclose(step.rewards, found.rewards, atol=2e-2)
    inside = np.setdiff1d(np.arange(len(ended)), last)
    np.testing.assert_allclose(
        step.observations[inside], found.observations[inside + 1], rtol=1e-2, atol=2e-2
    )
    np.testing.assert_allclose(step.observations[last], found.led_to, rtol=1e-2, atol=2e-2)
    assert (found.terminations.any()) <= ROBOTS[name].terminates


def test_recoveries_are_cut_out_of_disturbed_episodes(shipped):
    """No noise in what is kept, and stretches of the lengths that are wanted."""
    policy = shipped("halfcheetah")["expert"]
    part = collect.Part("expert", recovers=True)
    found = collect._record("halfcheetah", part, policy, 4, np.random.default_rng(0), 300)
    low, high = collect.RECOVERED
    lengths = found["lengths"]
    assert lengths.max() < high and np.median(lengths) >= low and len(lengths) > 8
    assert lengths.sum() < 0.9 * 4 * 300
    # What is kept is the policy's own: within its deviation (noise would add up to 1).
    x = found["observations"]
    spread = np.std([policy.act(x, np.random.default_rng(i)) for i in range(30)], axis=0)
    off = np.abs(found["actions"] - policy.act(x)) / (spread + 1e-2)
    assert np.quantile(off, 0.9) < 4


def test_noise_comes_in_stretches():
    noise = collect._Noise(5, 3, np.random.default_rng(1))
    steps = [noise.step() for _ in range(400)]
    added, calm = np.stack([a for a, _ in steps], axis=1), np.stack([c for _, c in steps], axis=1)
    assert (added[calm] == 0).all() and (added[~calm] != 0).all()
    for row in range(5):
        edges = np.flatnonzero(np.diff(calm[row].astype(int)))
        for start, stop in zip(edges, edges[1:], strict=False):
            low, high = collect.RECOVERED if calm[row, start + 1] else collect.DISTURBED
            assert low <= stop - start < high
    assert 0.2 < added[~calm].std() < 1.0


def test_too_few_episodes_and_a_stage_that_is_missing(shipped, tmp_path):
    from reward_jax.tasks.locomotion import policies

    stages = shipped("hopper")
    with pytest.raises(InputError, match="'medium-replay' has 4 parts"):
        collect.collect("hopper", "medium-replay", episodes=3, seed=0)
    del stages["expert"]
    policies.write_policies(tmp_path / "hopper.safetensors", stages)
    policies.policies.cache_clear()
    with pytest.raises(InputError, match="hopper has no policy 'expert': it has early, late"):
        collect.collect("hopper", "expert", episodes=3, seed=0)


def test_a_stage_that_is_missing_is_refused_before_anything_is_recorded(monkeypatch):
    monkeypatch.setattr(collect, "_record", None)
    own = {"early": random_policy("hopper", 1)}
    with pytest.raises(InputError, match="hopper has no policy 'late': it has early"):
        collect.collect("hopper", "medium-replay", episodes=4, seed=0, own=own)


def test_policies_of_one_s_own_act_in_place_of_the_shipped_ones(shipped):
    shipped("hopper")
    own = {"medium": random_policy("hopper", 21)}
    how: Any = {"episodes": 2, "seed": 0, "steps": 4}
    found = collect.collect("hopper", "medium", own=own, **how)
    assert found.about["policies"]["medium"]["steps"] == 21
    same, other = (collect.collect("hopper", "medium", own=x, **how) for x in (own, None))
    np.testing.assert_array_equal(found.actions, same.actions)
    assert (found.actions[0] != other.actions[0]).any()


def test_gymnasium_knows_the_robots():
    for robot in ROBOTS.values():
        assert gymnasium.spec(robot.environment).max_episode_steps == collect.STEPS
