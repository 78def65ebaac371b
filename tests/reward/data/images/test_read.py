"""Images are known by the names of what holds them, and read as a model saw them."""

import numpy as np
import pytest
from PIL import Image

from common_jax.errors import InputError
from reward_jax.data.images.pixels import ImageSpace
from reward_jax.data.images.read import holds_images, read_images, read_like
from tests.reward.data.images.idx_files import write_set

RANDOM = np.random.default_rng(0)


def some(count, size=4):
    return RANDOM.integers(0, 256, (count, size, size)).astype(np.uint8)


def save(path, size=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(some(1, size)[0]).save(path)


@pytest.fixture
def folder(tmp_path):
    """Images in each layout, and what is none."""
    (tmp_path / "both").mkdir()
    write_set(tmp_path / "both", "train", some(4), np.array([0, 1, 2, 2]))
    write_set(tmp_path / "both", "t10k", some(2), np.array([0, 1]))
    for part, count in (("train", 3), ("test", 1)):
        for i in range(count):
            save(tmp_path / "split" / part / "bag" / f"{i}.png")
    save(tmp_path / "flat" / "a.png")
    save(tmp_path / "classes" / "bag" / "a.jpg")
    (tmp_path / "none" / "data").mkdir(parents=True)
    (tmp_path / "none" / "data" / "metadata.json").touch()
    return tmp_path


def test_which_paths_hold_images(folder):
    for name in ("both", "split", "flat", "classes", "both/train-images-idx3-ubyte.gz"):
        assert holds_images(folder / name), name
    for name in ("none", "missing", "both/train-labels-idx1-ubyte", "flat/a.png"):
        assert not holds_images(folder / name), name


def test_each_layout(folder):
    train, test = (read_images(folder / "both", part=part) for part in ("train", "test"))
    assert (len(train), len(test)) == (4, 2) and train.pixels.shape[1:] == (4, 4, 1)
    one = read_images(folder / "both" / "train-images-idx3-ubyte.gz", classes=("a", "b", "c"))
    np.testing.assert_array_equal(one.pixels, train.pixels)
    assert one.classes == ("a", "b", "c") and one.known_labels().tolist() == [0, 1, 2, 2]
    (folder / "both" / "train-labels-idx1-ubyte").unlink()
    assert read_images(folder / "both" / "train-images-idx3-ubyte.gz").labels is None
    split = [read_images(folder / "split", part=part) for part in ("train", "test")]
    assert [len(part) for part in split] == [3, 1] and split[0].pixels.shape[1:] == (4, 4, 3)
    flat = read_images(folder / "flat", size=8, channels=1)
    assert flat.pixels.shape == (1, 8, 8, 1) and flat.labels is None
    assert read_images(folder / "classes").classes == ("bag",)


def test_as_a_model_saw_them(folder):
    assert read_like(folder / "flat", ImageSpace(8, 8, 3, {})).pixels.shape == (1, 8, 8, 3)
    named = ImageSpace(4, 4, 1, {"classes": ["a", "b", "c"]})
    assert read_like(folder / "both", named, part="test").classes == ("a", "b", "c")
    for path, space in (("both", ImageSpace(8, 8, 1, {})), ("flat", ImageSpace(4, 6, 1, {}))):
        with pytest.raises(InputError, match="its images are of 4 x 4 x 1 values, the model's"):
            read_like(folder / path, space)


def test_what_is_refused(folder):
    with pytest.raises(InputError, match=r"missing: no such file or folder; give a folder of im"):
        read_images(folder / "missing")
    with pytest.raises(InputError, match="none: holds no image; give a folder of images"):
        read_images(folder / "none")
    with pytest.raises(InputError, match="its folders are the classes: leave classes out"):
        read_images(folder / "classes", classes=("bag",))
    with pytest.raises(InputError, match="IDX files are of one size, and grey"):
        read_images(folder / "both" / "train-images-idx3-ubyte.gz", size=8)
