"""A source's kind is told by its name; what is of no kind is refused."""

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data import hdf5
from reward_jax.data.episodes import Episodes
from reward_jax.data.files import read_episodes


@pytest.mark.parametrize("name", ["walks.hdf5", "walks.h5", "WALKS.HDF5"])
def test_a_suffix_says_the_format(tmp_path, name):
    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    hdf5.write(tmp_path / name, Episodes(rows, rows[:, :2], np.array([2, 4])))
    assert read_episodes(tmp_path / name).lengths.tolist() == [2, 4]
    assert read_episodes(str(tmp_path / name), ends="none").lengths.tolist() == [6]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "nothing: no such file; give a .hdf5 or .h5 file in D4RL's layout, a Minari"),
        ("table.csv", "table.csv: is of no known kind; give a .hdf5 or .h5 file"),
        (".", "has no data/metadata.json; give a Minari dataset's folder"),
    ],
)
def test_sources_of_no_known_kind(tmp_path, source, message):
    (tmp_path / "table.csv").write_text("x,y")
    with pytest.raises(InputError) as error:
        read_episodes(tmp_path / source)
    assert message in str(error.value) and "\n" not in str(error.value)
