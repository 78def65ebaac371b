"""A world in closed form: ways arrive, keep off the discs, and can be followed."""

import numpy as np
import pytest

from reward_jax.tasks.obstacles.world import (
    DT,
    SPEED,
    WORLDS,
    follow,
    longest_walk,
    move,
    walk,
)


@pytest.mark.parametrize("name", WORLDS)
def test_ways_arrive_and_keep_off_the_discs(name):
    world, rng = WORLDS[name], np.random.default_rng(0)
    starts, goals = world.uniform(300, rng), world.uniform(300, rng)
    assert world.clearance(starts).min() > 0
    positions, velocities = walk(world, starts, goals, longest_walk(world))
    np.testing.assert_allclose(positions[:, -1], goals, atol=1e-9)
    assert world.clearance(positions).min() > 0
    pace = np.linalg.norm(np.diff(positions, axis=1), axis=-1)
    assert pace.max() < SPEED * DT + 1e-9
    again = move(world, positions[:, 3], velocities[:, 3], SPEED)
    np.testing.assert_array_equal(again, positions[:, 4])
    straight = np.linalg.norm(goals - starts, axis=1)
    assert (pace.sum(axis=1) >= straight - 1e-9).all()
    around = pace.sum(axis=1) > straight + 0.05
    assert 0.05 < around.mean() < 0.95  # some had to go around


@pytest.mark.parametrize("stride", [1, 4])
def test_a_plan_that_is_a_way_is_followed_to_its_end(stride):
    world, rng = WORLDS["discs"], np.random.default_rng(1)
    starts, goals = world.uniform(50, rng), world.uniform(50, rng)
    positions, _ = walk(world, starts, goals, longest_walk(world))
    ends = follow(world, positions[:, ::stride], starts, stride)
    np.testing.assert_allclose(ends, goals, atol=0.02)


def test_nothing_passes_a_disc():
    world = WORLDS["disc"]
    plan = np.linspace([-1.9, 0.0], [1.9, 0.0], 8)[None]
    # Straight at the middle: the point is stopped there, and slides nowhere.
    (end,) = follow(world, plan, plan[:, 0], 8)
    assert world.clearance(end) > -1e-9 and end[0] < 0
