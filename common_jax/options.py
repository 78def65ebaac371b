"""Settings that several commands share; light, so that --help comes at once."""

import dataclasses

__all__ = ["MeshOptions"]


@dataclasses.dataclass
class MeshOptions:
    """Devices along each axis; one of them may be -1, for all that are left.

    Args:
        data: whole copies of the models, each with its part of a batch.
        fsdp: devices among which weights (and optimiser state) are cut, gathered when used.
        tensor: devices among which single matrices are cut.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
