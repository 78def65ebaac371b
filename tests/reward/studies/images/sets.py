"""A minute set of images: a bright quarter on noise, one of four, is an image's class."""

import pathlib

import numpy as np

from tests.reward.data.images.idx_files import write_set

CLASSES = ("nw", "ne", "sw", "se")


def quarters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    pixels = random.integers(0, 60, (count, 8, 8))
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 180
    return pixels, labels


def write_quarters(folder: pathlib.Path, train: int = 160, test: int = 48) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, count) in enumerate((("train", train), ("t10k", test))):
        write_set(folder, part, *quarters(count, seed))
    return folder
