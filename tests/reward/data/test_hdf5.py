"""Own files there and back, and files as D4RL publishes them."""

from typing import Any

import h5py
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data import hdf5
from reward_jax.data.files import read_episodes
from reward_jax.tasks.maze.collect import collect
from reward_jax.tasks.maze.mazes import maze

STEPS = 40
REACHED = [9, 17, 30]  # steps at which D4RL's walker has reached its goal and gets another


def d4rl(path, **changes):
    """A file with the arrays and dtypes of maze2d-*-sparse-v1.hdf5; None removes an array."""
    rng = np.random.default_rng(0)
    timeouts = np.zeros(STEPS, bool)
    timeouts[REACHED] = True
    observations = rng.normal(size=(STEPS, 4)).astype(np.float32)
    targets = rng.normal(size=(len(REACHED) + 1, 2)).astype(np.float32)
    segments = np.concatenate([[0], np.cumsum(timeouts)[:-1]])
    arrays = {
        "observations": observations,
        "actions": rng.uniform(-1, 1, (STEPS, 2)).astype(np.float32),
        "rewards": np.zeros(STEPS, np.float32),
        "terminals": np.zeros(STEPS, bool),
        "timeouts": timeouts,
        "infos/goal": targets[segments],
        "infos/qpos": observations[:, :2],
        "infos/qvel": observations[:, 2:],
    }
    arrays.update({name.replace("__", "/"): values for name, values in changes.items()})
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if values is not None:
                file[name] = values
    return arrays


def test_own_files_there_and_back(tmp_path):
    layout = maze("umaze")
    data = collect(layout, goal=(1, 1), episodes=3, steps=400, seed=0)
    path = tmp_path / "deep" / "expert.hdf5"
    hdf5.write(path, data)
    read = read_episodes(path)
    for name in ("observations", "actions", "lengths", "arrivals", "goals"):
        np.testing.assert_array_equal(getattr(read, name), getattr(data, name))
        assert getattr(read, name).dtype == getattr(data, name).dtype
    assert read.about == data.about
    assert [p.name for p in path.parent.iterdir()] == ["expert.hdf5"]
    file: Any
    with h5py.File(path) as file:  # what D4RL's own loader wants
        assert {"observations", "actions", "rewards", "terminals", "timeouts"} <= set(file)
        assert not file["terminals"][()].any()
        assert np.flatnonzero(file["timeouts"][()]).tolist() == [399, 799, 1199]


@pytest.mark.parametrize(
    ("ends", "changes", "lengths"),
    [
        ("auto", {}, [10, 8, 13, 9]),
        ("marks", {}, [10, 8, 13, 9]),
        ("none", {}, [40]),
        ("auto", {"timeouts": None}, [10, 8, 13, 9]),  # by the goal: files of D4RL's generator
        ("goal", {"timeouts": np.zeros(STEPS, bool)}, [10, 8, 13, 9]),
        ("marks", {"timeouts": None}, [40]),
        ("none", {"timeouts": None, "infos__goal": None}, [40]),
        ("auto", {"terminals": np.arange(STEPS) == 3}, [4, 6, 8, 13, 9]),
        ("auto", {"terminals": (np.arange(STEPS) == 39)[:, None]}, [10, 8, 13, 9]),
    ],
)
def test_d4rl_s_endless_walk_is_cut_into_episodes(tmp_path, ends, changes, lengths):
    arrays = d4rl(tmp_path / "maze2d.hdf5", **changes)
    data = hdf5.read(tmp_path / "maze2d.hdf5", ends=ends)
    assert data.lengths.tolist() == lengths
    np.testing.assert_array_equal(data.observations, arrays["observations"])
    np.testing.assert_array_equal(data.actions, arrays["actions"])
    assert data.arrivals is None
    if arrays["infos/goal"] is None or lengths == [40]:
        assert data.goals is None
    else:
        np.testing.assert_array_equal(data.goals, arrays["infos/goal"][data.starts])


def nan_at(row, column):
    rows = np.zeros((STEPS, 4), np.float32)
    rows[row, column] = np.nan
    return rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": None}, "has no 'actions', which D4RL's layout asks for"),
        ({"observations": None, "actions": None}, "has no 'observations', which"),
        ({"observations__deep": np.zeros(3), "observations": None}, "is a group, not a data set"),
        ({"infos__goal": nan_at(3, 1)}, "infos/goal row 3, column 1 (from 0) is nan"),
        ({"infos__goal": np.zeros((9, 2))}, "infos/goal is float64 of shape (9, 2); give a goal"),
        ({"timeouts": None, "infos__goal": None}, "has neither 'timeouts' nor 'infos/goal'"),
        ({"metadata__about": "[]"}, "metadata/about is no JSON object"),
        ({"metadata__arrivals": np.zeros(9, int)}, "metadata/arrivals is int64 of shape (9,)"),
        ({"observations": nan_at(31, 2)}, "observations row 31, column 2 (from 0) is nan"),
        ({"actions": np.zeros((39, 2))}, "40 observations but 39 actions"),
        ({"timeouts": np.zeros(39)}, "timeouts are float64 of shape (39,); give one flag"),
        (
            {"observations": np.zeros((0, 4)), "actions": np.zeros((0, 2))},
            "observations are empty",
        ),
    ],
)
def test_arrays_that_do_not_do(tmp_path, changes, message):
    path = tmp_path / "maze2d.hdf5"
    d4rl(path, **changes)
    with pytest.raises(InputError) as error:
        hdf5.read(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_rewards_are_d4rl_s_and_a_file_that_cannot_be_written_is_named(tmp_path):
    data = collect(maze("umaze"), goal=(1, 1), episodes=2, steps=400, seed=0)
    hdf5.write(tmp_path / "a.h5", data)
    file: Any
    with h5py.File(tmp_path / "a.h5") as file:
        near = np.linalg.norm(data.observations[:, :2] - 1, axis=1) <= 0.5
        np.testing.assert_array_equal(file["rewards"][()], near)
    with pytest.raises(InputError, match="a.h5/b.h5: cannot be written .*; give another path"):
        hdf5.write(tmp_path / "a.h5" / "b.h5", data)


def test_files_that_do_not_do(tmp_path):
    path = tmp_path / "maze2d.hdf5"
    with pytest.raises(InputError, match="no such file; give an HDF5 file"):
        hdf5.read(path)
    with pytest.raises(InputError, match="is a folder; give an HDF5 file"):
        hdf5.read(tmp_path)
    d4rl(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no HDF5", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as HDF5 \(.*\); fetch or write it"):
            hdf5.read(path)
    path.write_bytes(whole)
    with pytest.raises(InputError, match="ends is one of auto, marks, goal, none, not 'x'"):
        hdf5.read(path, ends="x")
    d4rl(path, infos__goal=None)
    with pytest.raises(InputError, match="has no 'infos/goal' to cut episodes by"):
        hdf5.read(path, ends="goal")
