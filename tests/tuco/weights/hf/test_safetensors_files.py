"""Files read a block of rows at a time, and as one set of tensors."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from common_jax.errors import InputError
from tuco_jax.weights.hf import safetensors_files
from tuco_jax.weights.hf.safetensors_files import SafetensorsFile, SafetensorsTensors

RNG = np.random.default_rng(0)
TENSORS = {
    "a": RNG.normal(size=(7, 3, 2)).astype(np.float32),
    "half": RNG.normal(size=(4, 5)).astype(np.float16),
    "brain": RNG.normal(size=(4, 5)).astype(ml_dtypes.bfloat16),
    "one": np.full((), 3.5, np.float32),
    "none": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    return SafetensorsFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_in_their_own_dtype(name, file):
    found = file.read(name)
    assert found.dtype == TENSORS[name].dtype and found.shape == TENSORS[name].shape
    np.testing.assert_array_equal(found, TENSORS[name])


@pytest.mark.parametrize("rows", [slice(0, 2), slice(3, 7), slice(6, 99), slice(9, 12)], ids=str)
def test_rows(rows, file):
    np.testing.assert_array_equal(file.read("a", rows), TENSORS["a"][rows])


@pytest.mark.parametrize("columns", [slice(0, 5), slice(3, 5), slice(1, 9)], ids=str)
@pytest.mark.parametrize("page", [1, 4096])
def test_columns(page, columns, file, monkeypatch):
    """Whether a row's part is read alone, as of a long row, or the row with it."""
    monkeypatch.setattr(safetensors_files, "_PAGE", page)
    for name in ("half", "brain"):
        found = file.read(name, slice(1, 3), columns)
        np.testing.assert_array_equal(found, TENSORS[name][1:3, columns])


def test_files_as_one(file, tmp_path):
    save_file({"b": TENSORS["a"]}, tmp_path / "y.safetensors")
    other = SafetensorsFile(tmp_path / "y.safetensors")
    both = SafetensorsTensors("both", [file, other])
    assert both.shapes() == {name: x.shape for name, x in (TENSORS | {"b": TENSORS["a"]}).items()}
    assert both.file("b") == str(other.path)
    np.testing.assert_array_equal(both.read("b"), TENSORS["a"])
    with pytest.raises(InputError, match=r"tensor b is doubled: .*y.safetensors holds it, too"):
        SafetensorsTensors("thrice", [other, SafetensorsFile(other.path)])
