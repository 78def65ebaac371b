"""IDX files, and folders of images, written for tests."""

import gzip
import pathlib
import struct

import numpy as np


def idx(values: np.ndarray, kind: int = 8) -> bytes:
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape)
    return head + values.astype(np.uint8).tobytes()


def write_idx(path: pathlib.Path, values: np.ndarray) -> pathlib.Path:
    content = idx(values)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_set(folder: pathlib.Path, part: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    write_idx(folder / f"{part}-images-idx3-ubyte.gz", pixels)
    write_idx(folder / f"{part}-labels-idx1-ubyte", labels)
