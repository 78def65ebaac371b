"""Layouts as the environment has them; goals, starts, and what a user can get wrong."""

import glob
import tempfile
from typing import Any

import matplotlib.figure
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.tasks.maze.mazes import (
    BALL,
    ENVIRONMENTS,
    START_MARGIN,
    check_goal,
    draw_maze,
    environment,
    goals,
    maze,
    maze_of,
    uniform_starts,
)

FREE = {"open": 15, "umaze": 7, "medium": 26, "large": 46}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_cells_and_metres_are_the_environment_s(name):
    layout = maze(name)
    with environment(name) as env:
        made: Any = env.unwrapped
        theirs = made.maze
        for row, column in np.ndindex(layout.walls.shape):
            xy = theirs.cell_rowcol_to_xy((row, column))
            np.testing.assert_allclose(layout.centres[row, column], xy)
            assert layout.walls[row, column] == (theirs.maze_map[row][column] == 1)
            assert layout.inside(xy) == (not layout.walls[row, column])
        points = np.random.default_rng(0).uniform(-4, 4, (200, 2))
        expected = np.stack([theirs.cell_xy_to_rowcol(xy) for xy in points])
    np.testing.assert_array_equal(layout.cell_of(points), expected)
    assert len(layout.free) == FREE[name]


def test_the_environment_keeps_its_goal_and_leaves_no_file():
    pattern = tempfile.gettempdir() + "/ant_maze*.xml"
    before = set(glob.glob(pattern))
    with environment("umaze") as env:
        first, _ = env.reset(seed=1)
        made: Any = env.unwrapped
        made.point_env.set_state(first["desired_goal"], np.zeros(2))
        for _ in range(400):  # the registered environment would truncate after 300
            seen, _, terminated, truncated, info = env.step(np.zeros(2))
            assert info["success"] and not terminated and not truncated
        np.testing.assert_array_equal(seen["desired_goal"], first["desired_goal"])
    assert set(glob.glob(pattern)) <= before


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_goals_are_apart_and_clear_of_every_border(name):
    layout = maze(name)
    points = goals(layout)
    assert points.shape == (8, 2)
    np.testing.assert_array_equal(points, goals(layout))
    apart = np.linalg.norm(points[:, None] - points, axis=-1)[~np.eye(8, dtype=bool)]
    assert apart.min() > (0.5 if name == "umaze" else 1.4)
    centres = layout.centres[tuple(layout.cell_of(points).T)]
    assert np.abs(points - centres).max() < 0.2 + 1e-6
    for point in points:
        np.testing.assert_array_equal(check_goal(layout, point), point)


def test_clearance_is_the_distance_to_the_walls():
    layout = maze("medium")
    rng = np.random.default_rng(0)
    points = rng.uniform(-4, 4, (60, 2))
    ticks = np.linspace(-3.98, 3.98, 200)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    walls = grid[~layout.inside(grid)]
    brute = np.linalg.norm(points[:, None] - walls, axis=-1).min(axis=1)
    np.testing.assert_allclose(layout.clearance(points), brute, atol=0.06)
    assert (layout.clearance(points)[~layout.inside(points)] == 0).all()


def test_starts_are_uniform_and_legal():
    layout = maze("umaze")
    points = uniform_starts(layout, 7000, np.random.default_rng(0))
    assert layout.clearance(points).min() >= START_MARGIN > BALL
    counts = np.unique(layout.cell_of(points), axis=0, return_counts=True)[1]
    # Corridor cells lose 0.3 of their 1 m2 to the margin; ends and corners a little more or less.
    share = counts / counts.sum()
    assert len(counts) == 7 and share.min() > 0.11 and share.max() < 0.17


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ((0, 0), "goal (0, 0) lies in a wall of the maze 'umaze'; the nearest free cell"),
        ((9, 0), "goal (9, 0) lies outside the maze 'umaze', which spans x -2.5 to 2.5"),
        ((0.95, -0.05), None),
        ((1.0, 1.45), "is 0.05 m from a wall of the maze 'umaze', nearer than the ball's radius"),
        ((np.nan, 0), "give x and y in metres"),
        ((1, 2, 3), "give x and y in metres"),
    ],
)
def test_goals_where_the_ball_cannot_be(goal, message):
    layout = maze("umaze")
    if message is None:
        check_goal(layout, goal)
        return
    with pytest.raises(InputError) as error:
        check_goal(layout, goal)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "near"), [("Umaze", "umaze"), ("lagre", "large"), ("zzz", None)])
def test_an_unknown_environment_names_the_nearest(name, near):
    with pytest.raises(InputError) as error:
        maze(name)
    hint = f" (did you mean {near!r}?)" if near else ""
    assert str(error.value) == (
        f"environment {name!r} is unknown{hint}: choose from open, umaze, medium, large"
    )


def test_the_drawing_is_in_metres():
    figure = matplotlib.figure.Figure()
    axes = figure.subplots()
    layout = maze("large")
    draw_maze(axes, layout)
    assert axes.get_xlim() + axes.get_ylim() == layout.extent
    assert axes.get_aspect() == 1
    (walls,) = axes.collections
    assert len(walls.get_paths()) == layout.walls.sum()
    corners = np.stack([np.asarray(path.vertices)[:4].mean(axis=0) for path in walls.get_paths()])
    np.testing.assert_allclose(corners, layout.centres[layout.walls])


def test_mazes_are_known_by_their_environment():
    known = {"PointMaze_UMaze-v3": "umaze", "PointMaze_LargeDense-v1": "large"}
    known |= {"PointMaze_Large_Diverse_G-v3": None, "Hopper-v4": None}
    assert {name: maze_of(name) for name in known} == known
    assert maze_of(None) is None
