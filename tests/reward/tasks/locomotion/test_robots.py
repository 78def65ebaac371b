"""Constants of robots against Gymnasium's environments, and D4RL's references."""

import importlib
from typing import Any

import numpy as np
import pytest

from reward_jax.tasks.locomotion.robots import ROBOTS, environment, quiet, robot_of


@pytest.mark.parametrize("name", ROBOTS)
def test_constants_are_the_environment_s(name):
    robot: Any = ROBOTS[name]
    made: Any = environment(name).unwrapped
    assert made.frame_skip == robot.frame_skip and made._ctrl_cost_weight == robot.control_cost
    assert made._forward_reward_weight == 1
    if robot.terminates:
        assert made._healthy_reward == robot.alive_bonus
        assert made._healthy_z_range == robot.height and made._healthy_angle_range == robot.angle
    if name == "hopper":
        assert made._healthy_state_range == (-robot.bound, robot.bound)


def test_normalized_scores():
    """D4RL's: 0 of a random policy, 100 of its expert."""
    for robot in ROBOTS.values():
        np.testing.assert_allclose(robot.normalized(np.array([robot.low, robot.high])), [0, 100])
    assert ROBOTS["halfcheetah"].normalized(np.array(4770.0)) == pytest.approx(40.677, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("HalfCheetah-v5", "halfcheetah"),
        ("HalfCheetah-v2", "halfcheetah"),
        ("halfcheetah-medium-replay-v2", "halfcheetah"),
        ("Walker2d-v4", "walker2d"),
        ("hopper-expert-v2", "hopper"),
        ("Ant-v5", None),
        ("Hopper", "hopper"),
        (None, None),
    ],
)
def test_names_of_others(given, name):
    assert robot_of(given) == name


def test_quiet_blocks_may_stand_in_one_another():
    """The outer one stays quiet after an inner one, and a caller's own handler comes back."""
    mujoco: Any = importlib.import_module("mujoco")
    said = []
    mujoco.set_mju_user_warning(said.append)
    try:
        own = mujoco.get_mju_user_warning()
        with quiet():
            ours = mujoco.get_mju_user_warning()
            with quiet():
                pass
            assert mujoco.get_mju_user_warning() is ours is not own
        assert mujoco.get_mju_user_warning() is own
    finally:
        mujoco.set_mju_user_warning(None)
