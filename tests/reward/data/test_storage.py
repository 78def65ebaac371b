"""Files that declare more than they hold, or hold it elsewhere: refused before they are read."""

from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from common_jax.errors import InputError
from reward_jax.data import hdf5
from tests.hostile import bounded, fuzzed

STEPS = 12


def sound(path):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.normal(size=(STEPS, 3)).astype(np.float32)
        file["actions"] = rng.normal(size=(STEPS, 2)).astype(np.float32)
        file["timeouts"] = np.arange(STEPS) % 6 == 5
    return path


def huge(file, name, shape, **options):
    del file[name]
    file.create_dataset(name, shape, np.float32, chunks=True, **options)


LIES: dict[str, Any] = {
    "rows": lambda f: huge(f, "observations", (10**9, 8)),
    "rows, compressed": lambda f: huge(f, "observations", (10**9, 8), compression="gzip"),
    "columns": lambda f: huge(f, "actions", (STEPS, 10**9)),
    "beyond 64 bits": lambda f: huge(f, "observations", (2**40, 2**20, 2**10)),
    "flags": lambda f: huge(f, "timeouts", (10**10,)),
    "rewards": lambda f: f.create_dataset("rewards", (10**9,), np.float64, chunks=True),
    "goals": lambda f: f.create_dataset("infos/goal", (10**9, 2), np.float32, chunks=True),
    "arrivals": lambda f: f.create_dataset("metadata/arrivals", (10**9,), np.int64, chunks=True),
    "texts": lambda f: f.create_dataset(
        "metadata/about", (10**9,), h5py.string_dtype(), chunks=True
    ),
    "tiny chunks": lambda f: f.create_dataset("rewards", (10**7,), np.float32, chunks=(1,)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_declares_more_than_it_holds(tmp_path, lie):
    path = sound(tmp_path / "d.hdf5")
    with h5py.File(path, "r+") as file:
        LIES[lie](file)
    assert path.stat().st_size < 100_000
    with bounded(), pytest.raises(InputError) as error:
        hdf5.read(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ") and "declares the shape" in said and "\n" not in said


def test_zeros_that_compress_well_are_read(tmp_path):
    path, steps = tmp_path / "d.hdf5", 200_000
    with h5py.File(path, "w") as file:
        for name in ("observations", "actions"):
            zeros = np.zeros((steps, 2), np.float32)
            file.create_dataset(name, data=zeros, compression="gzip", shuffle=True)
        file.create_dataset("timeouts", data=np.zeros(steps, bool), compression="gzip")
    assert path.stat().st_size < 50_000
    assert hdf5.read(path, ends="marks").lengths.tolist() == [steps]


def test_numbers_that_stand_elsewhere(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(STEPS * 12))
    for place in ("external", "link", "virtual"):
        path = sound(tmp_path / f"{place}.hdf5")
        with h5py.File(path, "r+") as file:
            del file["observations"]
            if place == "external":
                file.create_dataset(
                    "observations", (STEPS, 3), np.float32, external=[(secret, 0, STEPS * 12)]
                )
            elif place == "link":
                file["observations"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "rows")
            else:
                layout = h5py.VirtualLayout((STEPS, 3), np.float32)
                layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "rows", (STEPS, 3))
                file.create_virtual_dataset("observations", layout)
        with pytest.raises(InputError, match="'observations' stands in another file; copy it"):
            hdf5.read(path)


@settings(fuzzed, max_examples=40)
@given(st.data())
def test_a_damaged_file_is_refused_or_read(tmp_path, data):
    """Whatever bytes are changed: one line, or the episodes."""
    path = sound(tmp_path / "d.hdf5")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.sampled_from([0, 1, 127, 128, 254, 255]))
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    with bounded():
        assert hdf5.read(path).lengths.sum() <= 2**24
