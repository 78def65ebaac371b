"""A folder of images: sizes, classes, and that one image which cannot be read is named."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from common_jax.errors import InputError
from reward_jax.data.images.folder import read_folder

RANDOM = np.random.default_rng(0)


def save(path, shape):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_a_folder_for_each_class(tmp_path):
    bags = [save(tmp_path / "bag" / f"{i}.png", (4, 4, 3)) for i in (1, 0)]
    shoe = save(tmp_path / "shoe" / "a.PNG", (4, 4, 3))
    (tmp_path / "notes").mkdir()
    (tmp_path / "bag" / "notes.txt").touch()
    (tmp_path / "bag" / ".hidden.png").touch()
    found = read_folder(tmp_path)
    assert found.classes == ("bag", "shoe")
    np.testing.assert_array_equal(found.labels, [0, 0, 1])
    np.testing.assert_array_equal(found.pixels, [bags[1], bags[0], shoe])


def test_scaled_and_cut_in_the_middle(tmp_path):
    wide = np.zeros((6, 18, 3), np.uint8)
    wide[:, 6:12] = 200
    Image.fromarray(wide).save(tmp_path / "a.png")
    save(tmp_path / "b.jpg", (9, 5, 3))
    found = read_folder(tmp_path, size=6, channels=1)
    assert found.labels is None and found.pixels.shape == (2, 6, 6, 1)
    assert (found.pixels[0] == 200).all()


def hidden(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """Red, whose upper half is transparent; and with what it is saved."""
    pixels = np.full((4, 4, 4), (255, 0, 0, 255), np.uint8)
    pixels[:2, :, 3] = 0
    if mode in ("RGBA", "LA"):
        return Image.fromarray(pixels).convert(mode), {}
    flat = Image.fromarray((pixels[..., 3] == 0).astype(np.uint8))  # 1 is what is not seen
    if mode == "P":
        flat = Image.frombytes("P", flat.size, flat.tobytes())
        flat.putpalette([255, 0, 0, 0, 255, 0])
        return flat, {"transparency": 1}
    pixels[:2] = (0, 255, 0, 255)
    return Image.fromarray(pixels).convert("RGB"), {"transparency": (0, 255, 0)}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_stands_on_white(tmp_path, mode, channels):
    """Not in the colour that the file has under it."""
    image, given = hidden(mode)
    image.save(tmp_path / "a.png", **given)
    (pixels,) = read_folder(tmp_path, channels=channels).pixels
    red = [255, 0, 0] if channels == 3 and mode != "LA" else [76] * channels
    assert (pixels[:2] == 255).all() and (pixels[2:] == red).all()


def test_what_is_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (2, 2), (200, 100, 0, 51)).save(tmp_path / "a.png")
    (pixels,) = read_folder(tmp_path).pixels
    np.testing.assert_allclose(pixels[0, 0], 0.2 * np.array([200, 100, 0]) + 0.8 * 255, atol=1)


def test_what_cannot_be_read_is_named(tmp_path):
    pixels = save(tmp_path / "a.png", (8, 8, 3))
    content = (tmp_path / "a.png").read_bytes()
    for name, damaged in (("cut", content[:-40]), ("empty", b""), ("text", b"no image")):
        path = tmp_path / name / "x.png"
        path.parent.mkdir()
        path.write_bytes(damaged)
        Image.fromarray(pixels).save(path.with_name("w.png"))
        with pytest.raises(InputError, match="cannot be read as an image .*; mend or remove it"):
            read_folder(path.parent)
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(deep / "a.png")
    with pytest.raises(InputError, match=r"a\.png: has more than 8 bits a value"):
        read_folder(deep)


def test_folders_that_make_no_set(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(InputError, match="holds no image"):
        read_folder(tmp_path)
    save(tmp_path / "a.png", (4, 4))
    save(tmp_path / "b.png", (4, 5))
    with pytest.raises(InputError, match=r"b\.png: is 5 x 4, but a\.png 4 x 4: give size"):
        read_folder(tmp_path, channels=1)
    save(tmp_path / "bag" / "a.png", (4, 4))
    with pytest.raises(InputError, match="has images of its own and folders of images .bag"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="size must be 1 or more"):
        read_folder(tmp_path, size=0)
