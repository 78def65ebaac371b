"""IDX files: what is read, and that one which is none is refused."""

import gzip

import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.data.images.idx import find_idx, read_idx
from tests.reward.data.images.idx_files import idx, write_idx

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 3, 4))
LABELS = np.array([2, 0, 1, 2, 0])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_and_labels(tmp_path, suffix):
    images = write_idx(tmp_path / f"a{suffix}", PIXELS)
    labels = write_idx(tmp_path / f"b{suffix}", LABELS)
    found = read_idx(images, labels, ["x", "y", "z"])
    assert found.pixels.shape == (5, 3, 4, 1) and found.pixels.dtype == np.uint8
    np.testing.assert_array_equal(found.pixels[..., 0], PIXELS)
    np.testing.assert_array_equal(found.labels, LABELS)
    assert found.classes == ("x", "y", "z")
    assert read_idx(images, labels).classes == ("0", "1", "2")
    assert read_idx(images).labels is None
    assert find_idx(tmp_path, "a") == images and find_idx(tmp_path, "c") is None


GOOD = idx(PIXELS)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is no IDX file \\(it begins with nothing"),
        (b"\x89PNG" + GOOD, "is no IDX file \\(it begins with 89504e47"),
        (idx(PIXELS, 13), "values are of type 0x0d, not bytes"),
        (idx(LABELS), "has 1 axes, labels, where images are wanted"),
        (GOOD[:9], "is cut short; copy or fetch it again"),
        (GOOD[:-1], "declares 5 x 3 x 4 bytes, but holds fewer"),
        (GOOD + b"0", "declares 5 x 3 x 4 bytes, but holds more"),
        (idx(PIXELS[:0]), "holds no images \\(0 x 3 x 4"),
        (gzip.compress(GOOD)[:-9], "cannot be read .*; copy or fetch it again"),
        (gzip.compress(GOOD[:-1]), "declares 5 x 3 x 4 bytes, but holds fewer"),
        (GOOD[:4] + b"\xff" * 12, "declares 4,294,967,295 x 4,294,967,295 x 4,294,967,295 bytes"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_no_such_file_is_refused(tmp_path, content, message):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_idx(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_labels_that_do_not_fit(tmp_path):
    images = write_idx(tmp_path / "a", PIXELS)
    with pytest.raises(InputError, match="holds 4 labels, but .*a 5 images"):
        read_idx(images, write_idx(tmp_path / "b", LABELS[:4]))
    with pytest.raises(InputError, match="has the label 2, but 2 classes are named"):
        read_idx(images, write_idx(tmp_path / "c", LABELS), ["x", "y"])
    with pytest.raises(InputError, match="no such file"):
        read_idx(images, tmp_path / "d")
