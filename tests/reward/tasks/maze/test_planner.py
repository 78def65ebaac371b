"""Shortest ways, walks that arrive and stay, and plans executed in the simulator."""

import numpy as np
import pytest
import scipy.sparse.csgraph

from common_jax.errors import InputError
from reward_jax.tasks.maze import planner
from reward_jax.tasks.maze.mazes import BALL, ENVIRONMENTS, Maze, goals, maze, uniform_starts


def length(path):
    return np.linalg.norm(np.diff(path, axis=0), axis=1).sum()


def steps_between_cells(layout):
    """Moves to one of four neighbours between free cells, by scipy."""
    apart = np.abs(layout.free[:, None] - layout.free).sum(axis=-1)
    return scipy.sparse.csgraph.shortest_path((apart == 1).astype(float), unweighted=True)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_ways_are_no_longer_than_moves_between_cells(name):
    layout = maze(name)
    centres = layout.centres[tuple(layout.free.T)]
    starts, ends = np.random.default_rng(0).integers(len(centres), size=(2, 200))
    paths = planner.shortest_paths(layout, centres[starts], centres[ends])
    lengths = np.array([length(path) for path in paths])
    moves = steps_between_cells(layout)[starts, ends]
    straight = np.linalg.norm(centres[starts] - centres[ends], axis=1)
    assert (lengths <= moves + 1e-9).all() and (lengths >= straight - 1e-9).all()
    if name == "umaze":  # corridors alone: there is no shorter way
        np.testing.assert_allclose(lengths, moves)
    if name == "open":
        np.testing.assert_allclose(lengths, straight)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_no_corner_is_cut(name):
    layout = maze(name)
    rng = np.random.default_rng(3)
    starts, ends = uniform_starts(layout, 60, rng), uniform_starts(layout, 60, rng)
    for path, start, end in zip(
        planner.shortest_paths(layout, starts, ends), starts, ends, strict=True
    ):
        np.testing.assert_array_equal(path[[0, -1]], [start, end])
        share = np.linspace(0, 1, 50)[:, None]
        line = np.concatenate(
            [a + share * (b - a) for a, b in zip(path[:-1], path[1:], strict=True)]
        )
        room = min(planner.COMFORT, layout.clearance(start), layout.clearance(end))
        assert layout.clearance(line).min() > room / np.sqrt(2) - 1e-9


def test_visibility_against_points_along_the_line():
    rng = np.random.default_rng(0)
    walls = rng.random((7, 9)) < 0.3
    walls[[0, -1]] = walls[:, [0, -1]] = True
    layout = Maze("random", walls, 1.0)
    starts, ends = (uniform_starts(layout, 200, rng) for _ in range(2))
    ends[::10, 0] = starts[::10, 0]  # some lines along an axis
    keep = layout.clearance(ends) > BALL
    starts, ends = starts[keep], ends[keep]

    def room(points):
        beyond = np.abs(points[..., None, :] - layout.centres[walls]).max(axis=-1) - 0.5
        return beyond.min(axis=-1)

    share = np.linspace(0, 1, 501)[:, None, None]
    along = room((starts + share * (ends - starts)).reshape(-1, 2)).reshape(501, -1).min(axis=0)
    wanted = np.minimum(planner.COMFORT, np.minimum(room(starts), room(ends)))
    clear = np.abs(along - wanted) > 1e-2  # where sampling decides
    clear |= along >= wanted - 1e-12
    got = planner._visible(layout, starts, ends)
    assert 0.1 < got.mean() < 0.9 and clear.mean() > 0.95
    np.testing.assert_array_equal(got[clear], (along >= wanted - 1e-9)[clear])


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_walks_arrive_smoothly_and_stay(name):
    layout = maze(name)
    rng = np.random.default_rng(7)
    ends = np.concatenate([uniform_starts(layout, 80, rng), goals(layout)])
    starts = uniform_starts(layout, len(ends), rng)
    arrived = planner.longest_walk(layout)
    states, actions = planner.walk(layout, starts, ends, arrived + 50)
    assert actions.dtype == np.float32 and np.abs(actions).max() < 1  # no force is clipped
    positions = states[..., :2]
    assert layout.clearance(positions).min() > BALL  # never touches a wall
    distance = np.linalg.norm(positions - ends[:, None], axis=-1)
    assert distance[:, arrived:].max() < 0.01
    # Whoever was within 5 cm of the goal never leaves it by 15 cm again: no overshoot.
    reached = np.maximum.accumulate(distance < 0.05, axis=1)
    straight = np.array([len(path) == 2 for path in planner.shortest_paths(layout, starts, ends)])
    assert straight.any() and distance[straight][reached[straight]].max() < 0.15
    ways = [length(path) for path in planner.shortest_paths(layout, starts, ends)]
    walked = np.linalg.norm(np.diff(positions, axis=1), axis=-1).sum(axis=1)
    assert (walked < 1.02 * np.array(ways) + 0.05).all()
    jerk = np.abs(np.diff(actions, axis=1)).max()
    assert jerk < 0.4


@pytest.mark.parametrize("stride", [1, 13])
def test_plans_that_are_walks_end_where_they_should(stride):
    layout = maze("umaze")
    rng = np.random.default_rng(0)
    starts, ends = uniform_starts(layout, 20, rng), uniform_starts(layout, 20, rng)
    horizon = 32 if stride > 1 else 400
    states, _ = planner.walk(layout, starts, ends, 420)
    plans = states[:, : horizon * stride : stride, :2]
    visited = planner.follow(layout, plans, states[:, 0], stride)
    assert visited.shape == (20, (horizon - 1) * stride + 51, 2)
    assert np.linalg.norm(visited[:, -1] - ends, axis=-1).max() < 0.05
    off = np.linalg.norm(visited[:, : horizon * stride : stride] - plans, axis=-1)
    assert off.max() < 0.1
    assert layout.inside(visited).all()


def test_a_plan_through_a_wall_does_not_pass_in_the_simulator():
    layout = maze("umaze")
    start, end = np.array([-1.0, 1.0]), np.array([-1.0, -1.0])
    plan = np.linspace(start, end, 32)[None]
    visited = planner.follow(layout, plan, np.r_[start, 0, 0][None], 10)
    assert layout.inside(visited).all()
    assert np.linalg.norm(visited[0, -1] - end) > 1.2


def test_plans_and_ends_that_cannot_be_followed():
    layout = maze("umaze")
    with pytest.raises(InputError, match=r"plans must be finite positions \[B, H, 2\]"):
        planner.follow(layout, np.full((1, 4, 2), np.nan), np.zeros((1, 4)), 2)
    with pytest.raises(InputError, match=r"start \(0, 0\) is in no free cell of the maze 'umaze'"):
        planner.shortest_paths(layout, np.zeros((1, 2)), np.ones((1, 2)))
