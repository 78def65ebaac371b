"""Recording from Python: a file, and what made it."""

import json
from typing import Any, cast

import h5py
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.files import read_episodes
from reward_jax.planning.record import RecordOptions, record
from reward_jax.tasks.find import find


def test_a_file_of_episodes_with_what_made_them(tmp_path):
    options = RecordOptions(
        env="disc",
        out=str(tmp_path / "ways.hdf5"),
        goal="3",
        episodes=2,
        horizon=4,
        stride=2,
        seed=5,
    )
    found = record(options)
    expected = find("disc").record(episodes=2, span=7, seed=5, goal=[1.7, 1.7])
    for episodes in (found.episodes, read_episodes(found.path)):
        np.testing.assert_array_equal(episodes.observations, expected.observations)
        assert episodes.about["goal"] == [1.7, 1.7]
    steps = len(expected.observations)
    assert str(found) == f"2 ways to the goal (1.7, 1.7), {steps} steps: {found.path}"
    with h5py.File(found.path) as file:
        stored = json.loads(cast(Any, file["metadata/run"])[()])
    assert stored["config"]["goal"] == "3" and stored["config"]["seed"] == 5


def test_what_cannot_be_recorded_leaves_no_file(tmp_path):
    out = str(tmp_path / "ways.hdf5")
    for changes, said in (
        (dict(env="disk"), "did you mean 'disc'"),
        (dict(goal="9,9"), "lies in a disc, or outside"),
        (dict(episodes=0), "episodes must be 1 or more, not 0"),
        (dict(out=str(tmp_path / "ways.csv")), "output comes as .hdf5, .h5"),
    ):
        given: dict[str, Any] = dict(env="disc", out=out) | changes
        with pytest.raises(InputError, match=said):
            record(RecordOptions(**given))
    assert not list(tmp_path.iterdir())
