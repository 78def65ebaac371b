"""Whether an HDF5 file holds what it declares, before any of it is read.

A data set declares its shape apart from its numbers: those that were never written are zeros by
definition, so that a file of 10 kB may unfold to any size.
"""

import math
from typing import Any

from common_jax.errors import InputError

__all__ = ["check_link", "check_stored"]

_FREE = 2**27  # bytes that a data set may unfold to, whatever the file holds of it
_RATIO = 100  # beyond these, of bytes to bytes stored; gzip gives up to 1000, for zeros
_MISSING = 10**5  # chunks that are declared and not there


def check_stored(source: str, name: str, dataset: Any) -> None:
    """Raise InputError naming `source` where a data set is larger than what the file holds of it.

    Also where its numbers stand in another file. dataset: of h5py.
    """
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{source}: {name!r} stands in another file; copy it into this one")
    shape = dataset.shape or ()
    declared = math.prod(shape) * dataset.dtype.itemsize
    held = dataset.id.get_storage_size()
    missing = 0
    if dataset.chunks:
        chunks = math.prod(-(-n // c) for n, c in zip(shape, dataset.chunks, strict=True))
        missing = chunks - dataset.id.get_num_chunks()
    if declared > max(_FREE, _RATIO * held) or missing > _MISSING:
        raise InputError(
            f"{source}: {name!r} declares the shape {list(shape)}, {declared:,} bytes, but the "
            f"file holds {held:,} of them: it is cut short, or made to fill memory; fetch or "
            "write it anew"
        )


def check_link(source: str, file: Any, name: str) -> bool:
    """Whether the file has something of this name; InputError where that is in another file.

    Nothing is opened on the way. file: of h5py.
    """
    import h5py

    group, parts = file, name.split("/")
    for place, part in enumerate(parts):
        links, key = group.id.links, part.encode()
        if not links.exists(key):
            return False
        if links.get_info(key).type == h5py.h5l.TYPE_EXTERNAL:  # pyright: ignore[reportAttributeAccessIssue]
            raise InputError(f"{source}: {name!r} stands in another file; copy it into this one")
        if place < len(parts) - 1:
            group = group.get(part)
            if not isinstance(group, h5py.Group):
                return False
    return True
