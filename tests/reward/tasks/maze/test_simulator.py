"""The batched simulator against the environment's own step."""

from typing import Any

import numpy as np
import pytest

from reward_jax.tasks.maze.mazes import ENVIRONMENTS, environment, maze, uniform_starts
from reward_jax.tasks.maze.planner import DT
from reward_jax.tasks.maze.simulator import Simulator


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("balls", [1, 6])
def test_states_are_bit_equal_to_the_environment_s(name, balls):
    steps = 250
    rng = np.random.default_rng(balls)
    starts = np.zeros((balls, 4))
    starts[:, :2] = uniform_starts(maze(name), balls, rng)
    starts[:, 2:] = rng.normal(0, 1, (balls, 2))
    # Long pushes, into walls and beyond the speed limit, and beyond the limit of forces.
    pushes = rng.normal(0, 1.5, (balls, steps // 50, 2)).repeat(50, axis=1)
    actions = pushes + rng.normal(0, 0.3, pushes.shape)

    simulator = Simulator(maze(name), starts)
    assert simulator.dt == DT
    got = np.stack([simulator.step(actions[:, t]) for t in range(steps)], axis=1)

    expected = np.empty_like(got)
    contacts = 0
    with environment(name) as env:
        made: Any = env.unwrapped
        point = made.point_env
        for ball in range(balls):
            env.reset(seed=0)
            point.set_state(starts[ball, :2], starts[ball, 2:])
            for t in range(steps):
                expected[ball, t] = env.step(actions[ball, t])[0]["observation"]
                contacts += point.data.ncon > 1  # one contact is the floor's
    assert contacts > 0 and np.abs(expected[..., 2:]).max() > 5
    np.testing.assert_array_equal(got, expected)
