"""Own files there and back, and files as D4RL publishes them."""

import subprocess
import sys
from typing import Any

import h5py
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data import hdf5
from reward_jax.data.episodes import Episodes
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
        "rewards": rng.normal(size=STEPS).astype(np.float32),
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
    assert data.rewards is not None and 0 < data.rewards.mean() < 1
    for name in (
        *("observations", "actions", "lengths", "arrivals", "goals"),
        *("rewards", "terminations", "truncations"),
    ):
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
    np.testing.assert_array_equal(data.rewards, arrays["rewards"])  # pyright: ignore[reportArgumentType]
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
        ({"metadata__lengths": np.array([30, 9])}, "metadata/lengths are no numbers of steps of"),
        (
            {"rewards": np.where(np.arange(STEPS) > 36, np.nan, 1.0)},
            "rewards row 37 (from 0) is nan",
        ),
        (
            {"rewards": np.zeros((STEPS, 2))},
            "rewards are float64 of shape (40, 2); give one number",
        ),
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


def steps_of(lengths, **known):
    rng = np.random.default_rng(4)
    steps = sum(lengths)
    observations = rng.normal(size=(steps, 3)).astype(np.float32)
    actions = rng.normal(size=(steps, 2)).astype(np.float32)
    return Episodes(observations, actions, np.array(lengths), {}, **known)


def test_rewards_and_ends_there_and_back(tmp_path):
    """One episode ends by a termination, one by time, one with a flag in its midst (a stream)."""
    rewards = np.random.default_rng(5).normal(size=12).astype(np.float32)
    terminations, truncations = np.zeros(12, bool), np.zeros(12, bool)
    terminations[3] = truncations[6] = truncations[9] = truncations[11] = True
    data = steps_of(
        [4, 3, 5],
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
        led_to=np.random.default_rng(6).normal(size=(3, 3)).astype(np.float32),
    )
    hdf5.write(tmp_path / "d.h5", data)
    read = hdf5.read(tmp_path / "d.h5")
    for name in ("lengths", "rewards", "terminations", "truncations", "led_to"):
        np.testing.assert_array_equal(getattr(read, name), getattr(data, name), err_msg=name)
    assert hdf5.read(tmp_path / "d.h5", ends="marks").led_to is None
    assert hdf5.read(tmp_path / "d.h5", ends="marks").lengths.tolist() == [4, 3, 3, 2]
    chosen = read.choose(np.array([False, True, True]))
    np.testing.assert_array_equal(chosen.rewards, rewards[4:])  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(chosen.truncations, truncations[4:])  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(chosen.led_to, data.led_to[1:])  # pyright: ignore
    file: Any
    with h5py.File(tmp_path / "d.h5", "r+") as file:
        del file["metadata/led_to"]
        file["metadata/led_to"] = np.zeros((2, 3))
    with pytest.raises(InputError, match=r"metadata/led_to is float64 of shape \(2, 3\); give an"):
        hdf5.read(tmp_path / "d.h5")


def test_what_is_not_known_is_not_written(tmp_path):
    hdf5.write(tmp_path / "d.h5", steps_of([4, 3]))
    file: Any
    with h5py.File(tmp_path / "d.h5") as file:
        assert "rewards" not in file and "terminals" not in file
        assert np.flatnonzero(file["timeouts"][()]).tolist() == [3, 6]
    read = hdf5.read(tmp_path / "d.h5")
    assert read.rewards is None and read.terminations is None
    assert read.lengths.tolist() == [4, 3]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    hdf5.write(tmp_path / "a.h5", steps_of([2]))
    with pytest.raises(InputError, match="a.h5/b.h5: cannot be written: File exists"):
        hdf5.write(tmp_path / "a.h5" / "b.h5", steps_of([2]))


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


def test_a_goal_that_jitters_is_one_goal(tmp_path):
    rng = np.random.default_rng(3)
    arrays = d4rl(tmp_path / "a.hdf5")
    jitter = arrays["infos/goal"] + rng.uniform(-1e-9, 1e-9, (STEPS, 2))
    for centre in (jitter, jitter * 0 + rng.uniform(-1e-9, 1e-9, (STEPS, 2))):
        path = tmp_path / "b.hdf5"
        d4rl(path, infos__goal=centre, timeouts=None)
        data = hdf5.read(path)
        assert data.goals is not None
        assert data.lengths.tolist() == ([10, 8, 13, 9] if centre is jitter else [40])
    assert data.about["goal"] is not None


def test_flags_with_gaps_are_refused(tmp_path):
    flags = np.full(STEPS, np.nan)
    flags[-1] = 1
    d4rl(tmp_path / "a.hdf5", terminals=flags)
    with pytest.raises(InputError, match="terminals row 0 .from 0. is nan .39 such values in all"):
        hdf5.read(tmp_path / "a.hdf5")


def test_lengths_whose_sum_wraps_around(tmp_path):
    lengths = np.array([2**63, 2**63, STEPS], np.uint64)
    d4rl(tmp_path / "a.hdf5", metadata__lengths=lengths)
    with pytest.raises(InputError, match="metadata/lengths are no numbers of steps of sum 40"):
        hdf5.read(tmp_path / "a.hdf5")
    d4rl(tmp_path / "a.hdf5", metadata__about="[" * 9000)
    with pytest.raises(InputError, match="metadata/about is no JSON object"):
        hdf5.read(tmp_path / "a.hdf5")


FULL = """
import resource, sys
import numpy as np
from common_jax.errors import InputError
from reward_jax.data import hdf5
from reward_jax.data.episodes import Episodes
rows = np.random.default_rng(0).normal(size=(50_000, 4)).astype(np.float32)
found = Episodes(rows, rows[:, :2], np.array([len(rows)]), {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    hdf5.write(sys.argv[1], found)
except InputError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path):
    """The limit on a file's size stands for the disk. HDF5's library dies of it: signal 11."""
    path = tmp_path / "disk" / "d.h5"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    line = f"{path}: cannot be written: File too large; make room, or name another place\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, line, "")
    assert not list(path.parent.iterdir())
