"""Two sets of one folder, in both layouts."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from common_jax.errors import InputError
from reward_jax.data.images.sets import read_sets
from tests.reward.data.images.idx_files import write_idx, write_set

RANDOM = np.random.default_rng(0)


def some(count, size=4):
    return RANDOM.integers(0, 256, (count, size, size))


def test_idx_files(tmp_path):
    write_set(tmp_path, "train", some(4), np.array([0, 1, 2, 2]))
    write_set(tmp_path, "t10k", some(2), np.array([0, 1]))
    train, test = read_sets(tmp_path)
    assert len(train) == 4 and len(test) == 2
    assert train.classes == test.classes == ("0", "1", "2")
    refused: list[dict[str, Any]] = [{"size": 8}, {"channels": 3}]
    for given in refused:
        with pytest.raises(InputError, match="IDX files are of one size, and grey: leave size"):
            read_sets(tmp_path, **given)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", some(2, 5))
    with pytest.raises(InputError, match="two sets are of 4 x 4 x 1 and 5 x 5 x 1 values"):
        read_sets(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\[\.gz\]: no such file"):
        read_sets(tmp_path)


def test_folders(tmp_path):
    with pytest.raises(InputError, match="holds neither train-images-idx3-ubyte"):
        read_sets(tmp_path)
    for part, names in (("train", ("a", "b")), ("test", ("a", "b", "c"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(some(1)[0].astype(np.uint8)).save(tmp_path / part / name / "0.png")
    with pytest.raises(InputError, match="only one of its two sets has the classes c"):
        read_sets(tmp_path)
    (tmp_path / "test" / "c" / "0.png").unlink()
    train, test = read_sets(tmp_path, size=8, channels=3)
    assert train.pixels.shape == test.pixels.shape == (2, 8, 8, 3)
    assert train.classes == ("a", "b")
    with pytest.raises(InputError, match="its folders are the classes: leave classes out"):
        read_sets(tmp_path, classes=("a", "b"))
