"""Robots stepped together against Gymnasium's own environments, to the last bit."""

import importlib
import os
from typing import Any

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.tasks.locomotion.robots import ROBOTS, environment
from reward_jax.tasks.locomotion.simulator import Simulator, resets
from tests.reward.tasks.locomotion.conftest import another


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ROBOTS)
def test_steps_are_bit_equal_to_the_environment_s(name, threads):
    count, steps = 5, 60
    starts = resets(name, count, seed=1)
    rng = np.random.default_rng(2)
    # Held for some steps, so that robots fall, and beyond the limits of actions.
    space: Any = environment(name).action_space
    width = space.shape[0]
    actions = rng.normal(0, 1, (steps // 5, count, width)).repeat(5, axis=0).astype(np.float32)
    simulator = Simulator(name, starts, threads=threads)
    got = [simulator.step(a) for a in actions]

    env = another(name)
    made = env.unwrapped
    ended = 0
    for row in range(count):
        env.reset(seed=0)
        positions = made.model.nq
        state = np.concatenate([[0.0], starts[row]])
        # As a reset does, which forgets the forces of the last episode.
        importlib.import_module("mujoco").mj_resetData(made.model, made.data)
        made.set_state(state[:positions], state[positions:])
        for t in range(steps):
            seen, reward, terminated, _, _ = env.step(np.clip(actions[t, row], -1, 1))
            np.testing.assert_array_equal(got[t].observations[row], seen)
            assert (got[t].rewards[row], got[t].terminated[row]) == (reward, terminated)
            if terminated:
                ended += 1
                for later in got[t + 1 :]:
                    np.testing.assert_array_equal(later.observations[row], seen)
                    assert later.rewards[row] == 0 and not later.terminated[row]
                break
    assert (ended > 0) == ROBOTS[name].terminates


@pytest.mark.parametrize("name", ROBOTS)
def test_resets_are_the_environment_s(name):
    seeds = np.random.SeedSequence(3).generate_state(4)
    env = another(name)
    expected = np.stack([env.reset(seed=int(s))[0] for s in seeds])
    np.testing.assert_array_equal(resets(name, 4, seed=3), expected)
    np.testing.assert_array_equal(Simulator(name, expected).observations, expected)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"Hopper-v5 has observations \[B, 11\], not \[2, 17\]"):
        Simulator("hopper", np.zeros((2, 17)))
    simulator = Simulator("hopper", resets("hopper", 2, seed=0))
    with pytest.raises(InputError, match=r"has actions \[B, 3\], not \[2, 6\]"):
        simulator.step(np.zeros((2, 6)))
    with pytest.raises(InputError, match="not finite"):
        simulator.step(np.full((2, 3), np.nan))


def test_nothing_is_printed_or_left(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    environment.cache_clear()
    for name in ROBOTS:
        simulator = Simulator(name, resets(name, 2, seed=0))
        simulator.step(np.zeros((2, simulator.actions)))
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_a_system_without_affinity_has_all_processors(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    simulator = Simulator("hopper", resets("hopper", 2, seed=0))
    assert simulator._threads == os.cpu_count()
    simulator.step(np.zeros((2, 3)))
