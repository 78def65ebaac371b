"""Datasets that the minari package has written."""

import dataclasses
import subprocess
import sys
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer

from common_jax.errors import InputError
from reward_jax.data.episodes import Episodes
from reward_jax.data.files import check_output, read_episodes, write_episodes

LENGTHS = (7, 4, 9)


def vector(width):
    return gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float64)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def write(name, *, goal=True, extra=None, edit=None):
    """A dataset as minari's PointMaze ones are: dictionary observations, one more than actions."""
    rng = np.random.default_rng(0)
    keys: Any = {"observation": 4, "achieved_goal": 2, "desired_goal": 2} if goal else {extra: 4}
    buffers: list[Any] = []
    for length in LENGTHS:
        seen: Any = {key: rng.normal(size=(length + 1, width)) for key, width in keys.items()}
        if goal:
            seen["desired_goal"][:] = seen["desired_goal"][0]
        buffers.append(
            EpisodeBuffer(
                observations=seen if goal or extra != "flat" else seen[extra],
                actions=rng.uniform(-1, 1, (length, 2)),  # pyright: ignore[reportArgumentType]
                rewards=rng.normal(size=length).tolist(),
                terminations=[False] * (length - 2) + [length == 4, False],
                truncations=[False] * (length - 1) + [True],
            )
        )
    if edit:
        edit(buffers)
    spaces = gymnasium.spaces.Dict({key: vector(width) for key, width in keys.items()})
    minari.create_dataset_from_buffers(
        name,
        buffers,
        observation_space=spaces if goal or extra != "flat" else vector(4),
        action_space=vector(2),
    )
    return buffers


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["id", "folder", "data folder"])
def test_dictionary_observations(store, by):
    buffers = write("pointmaze/own-v0")
    source = {
        "id": "minari:pointmaze/own-v0",
        "folder": store / "pointmaze/own-v0",
        "data folder": store / "pointmaze/own-v0/data",
    }[by]
    data = read_episodes(source)
    assert data.goals is not None
    assert data.lengths.tolist() == list(LENGTHS) and data.observations.dtype == np.float32
    for start, end, buffer, goal in zip(data.starts, data.ends, buffers, data.goals, strict=True):
        seen = buffer.observations
        np.testing.assert_allclose(
            data.observations[start:end], seen["observation"][:-1], rtol=1e-6
        )
        np.testing.assert_allclose(data.actions[start:end], buffer.actions, rtol=1e-6)
        np.testing.assert_allclose(goal, seen["desired_goal"][0], rtol=1e-6)
        for name in ("rewards", "terminations", "truncations"):
            found, wanted = getattr(data, name)[start:end], getattr(buffer, name)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert data.about["minari"] == "pointmaze/own-v0"


@pytest.mark.filterwarnings("ignore")
def test_flat_observations(store):
    buffers = write("flat-v0", goal=False, extra="flat")
    data = read_episodes("minari:flat-v0")
    np.testing.assert_allclose(data.observations[:7], buffers[0].observations[:-1], rtol=1e-6)
    assert data.goals is None


def move(buffers):
    buffers[2].observations["desired_goal"][-1] += 1


@pytest.mark.filterwarnings("ignore")
def test_goals_that_move_are_no_goals_of_episodes(store):
    write("moving-v0", edit=move)
    assert read_episodes("minari:moving-v0").goals is None


def shorten(buffers):
    buffers[0].observations["observation"] = buffers[0].observations["observation"][:-1]


def worthless(buffers):
    buffers[2].rewards[4] = np.nan


def spoil(buffers):
    buffers[1].observations["observation"][2, 3] = np.nan


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_is_named(store):
    with pytest.raises(InputError, match="Minari dataset not/there-v0: is not on this machine"):
        read_episodes("minari:not/there-v0")
    write("other-v0", goal=False, extra="image")
    with pytest.raises(InputError, match="its observations are image; a dict needs an"):
        read_episodes("minari:other-v0")
    write("nan-v0", edit=spoil)
    with pytest.raises(
        InputError, match=r"episode 1: observations row 2, column 3 \(from 0\) is nan"
    ):
        read_episodes("minari:nan-v0")
    write("worthless-v0", edit=worthless)
    with pytest.raises(InputError, match=r"episode 2: rewards row 4 \(from 0\) is nan"):
        read_episodes("minari:worthless-v0")
    write("short-v0", edit=shorten)
    with pytest.raises(InputError, match="episode 0: has 7 observations and 7 actions; Minari"):
        read_episodes("minari:short-v0")
    write("cut-v0")
    (data,) = (store / "cut-v0" / "data").glob("*.hdf5")
    data.write_bytes(data.read_bytes()[:2000])
    with pytest.raises(InputError, match="Minari dataset .*cut-v0: cannot be read"):
        read_episodes(store / "cut-v0")
    (store / "cut-v0" / "data" / "metadata.json").write_text("{")
    with pytest.raises(InputError, match="Minari dataset .*cut-v0: cannot be read"):
        read_episodes(store / "cut-v0")


def test_an_id_of_no_such_form():
    with pytest.raises(InputError, match="no such folder, nor an id such as NAMESPACE/NAME-v0"):
        read_episodes("minari:point maze")


def stale(buffers):
    """As the maze environments of gymnasium-robotics record it (Minari issue 265)."""
    for last, buffer in zip([None, *buffers], buffers, strict=False):
        if last is not None:
            buffer.observations["desired_goal"][0] = last.observations["desired_goal"][-1]


def jitter(buffers):
    for buffer in buffers:
        goal = buffer.observations["desired_goal"]
        goal += np.random.default_rng(1).uniform(-1e-9, 1e-9, goal.shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("edit", [stale, jitter])
def test_a_first_goal_of_the_episode_before_and_rounding_lose_no_goal(store, edit):
    buffers = write("stale-v0", edit=edit)
    found = read_episodes("minari:stale-v0").goals
    assert found is not None
    wanted = [b.observations["desired_goal"][-1] for b in buffers]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def record(name, observations, actions, observation_space, action_space):
    buffer = EpisodeBuffer(
        observations=observations,
        actions=actions,
        rewards=[0.0] * 3,
        terminations=[False] * 3,
        truncations=[False, False, True],
    )
    minari.create_dataset_from_buffers(
        name, [buffer], observation_space=observation_space, action_space=action_space
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("which", "kind", "said"),
    [
        ("observations", "tuple", "its observations are a tuple, or texts, where one array"),
        ("observations", "nested", "its observations are a dict, where one array a step is"),
        ("actions", "dict", "its actions are a dict, where one array a step is wanted; flatten"),
        ("actions", "tuple", "its actions are a tuple, or texts, where one array a step is"),
    ],
)
def test_what_has_parts_is_named(store, which, kind, said):
    """A tuple ended in a traceback, a dict of actions in a message about lengths."""
    rows: dict[str, Any] = {"observations": np.zeros((4, 3)), "actions": np.zeros((3, 3))}
    spaces: Any = {"observations": vector(3), "actions": vector(3)}
    own: Any = rows[which]
    if kind == "tuple":
        rows[which], spaces[which] = (own, own), gymnasium.spaces.Tuple([vector(3)] * 2)
    elif kind == "dict":
        rows[which] = {"a": own, "b": own}
        spaces[which] = gymnasium.spaces.Dict({"a": vector(3), "b": vector(3)})
    else:
        rows[which] = {"observation": {"a": own}}
        inner = gymnasium.spaces.Dict({"a": vector(3)})
        spaces[which] = gymnasium.spaces.Dict({"observation": inner})
    record(f"{kind}-v0", *rows.values(), *spaces.values())
    with pytest.raises(InputError, match=f"{kind}-v0, episode 0: {said}"):
        read_episodes(f"minari:{kind}-v0")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ["[" * 9000, "[]", "{", '{"total_episodes": 1000000000000}'])
def test_metadata_that_are_none(store, text):
    write("bad-v0")
    (store / "bad-v0" / "data" / "metadata.json").write_text(text)
    with pytest.raises(
        InputError, match="Minari dataset .*bad-v0: (cannot be read|metadata.json)"
    ):
        read_episodes(store / "bad-v0")


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_that_declares_more_than_it_holds(store):
    write("big-v0", goal=False, extra="flat")
    with h5py.File(store / "big-v0" / "data" / "main_data.hdf5", "r+") as file:
        del file["episode_1"]["rewards"]  # pyright: ignore[reportIndexIssue]
        file.create_dataset("episode_1/rewards", (10**9,), np.float64, chunks=True)
    with pytest.raises(
        InputError, match="'episode_1/rewards' declares the shape .1000000000., 8,"
    ):
        read_episodes("minari:big-v0")


def some_episodes(environment=None):
    rng = np.random.default_rng(1)
    truncations = np.zeros(9, bool)
    truncations[[3, 8]] = True
    terminations = np.zeros(9, bool)
    terminations[5] = True
    return Episodes(
        rng.normal(size=(9, 11)).astype(np.float32),
        rng.normal(size=(9, 3)).astype(np.float32),
        np.array([4, 2, 3]),
        {"environment": environment, "goal": "expert", "seed": 3},
        rewards=rng.normal(size=9).astype(np.float32),
        terminations=terminations,
        truncations=truncations,
        led_to=rng.normal(size=(3, 11)).astype(np.float32),
    )


@pytest.mark.parametrize("place", ["id", "folder"])
def test_a_dataset_there_and_back(store, place):
    """By our reader and by Minari's own."""
    data = some_episodes("Hopper-v5")
    out = {"id": "minari:own/hopper-v2", "folder": store / "else" / "my data"}[place]
    folder = write_episodes(out, data, run={"seed": 7})
    assert folder == {"id": store / "own/hopper-v2", "folder": out}[place]
    found = read_episodes(out)
    for name in ("lengths", "observations", "actions", "rewards", "terminations", "truncations"):
        np.testing.assert_array_equal(getattr(found, name), getattr(data, name), err_msg=name)
    np.testing.assert_array_equal(found.led_to, data.led_to)  # pyright: ignore
    identifier = {"id": "own/hopper-v2", "folder": "my-data-v0"}[place]
    assert found.about == data.about | {"minari": identifier}

    theirs = minari.MinariDataset(folder / "data")
    assert theirs.id == identifier and theirs.total_episodes == 3 and theirs.total_steps == 9
    assert theirs.env_spec is not None and theirs.env_spec.id == "Hopper-v5"
    last = theirs[2]
    np.testing.assert_array_equal(last.observations[-1], data.led_to[2])  # pyright: ignore
    np.testing.assert_array_equal(last.rewards, data.rewards[6:])  # pyright: ignore
    if place == "id":
        assert "own/hopper-v2" in minari.list_local_datasets()
    with pytest.raises(InputError, match="exists; name another"):
        check_output(out)
    with pytest.raises(InputError, match="exists; name another"):
        write_episodes(out, data)


def test_what_minari_asks_for_is_named(store):
    data = some_episodes()
    for what in ("rewards", "terminations", "truncations", "led_to"):
        with pytest.raises(InputError, match=f"the episodes have no {what}, which Minari asks"):
            write_episodes(store / "d-v0", dataclasses.replace(data, **{what: None}))
    with pytest.raises(InputError, match="no id such as NAMESPACE/NAME-v0"):
        check_output("minari:hopper")
    assert not (store / "d-v0").exists()


def test_a_full_disk_leaves_no_dataset(store):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "from tests.reward.data.test_minari import some_episodes\n"
        "from reward_jax.data.files import write_episodes\n"
        "from common_jax.errors import InputError\n"
        "try: write_episodes(sys.argv[1], some_episodes())\n"
        "except InputError as error: sys.exit(str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store / "d-v0")], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("Minari dataset") and "cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(store.iterdir())
