"""Settings that several commands share; light, so that --help comes at once."""

import dataclasses

from common_jax.errors import InputError

__all__ = ["MeshOptions", "check_seed"]


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


def check_seed(seed: int) -> None:
    """InputError for a seed beyond 32 bits, which jax would cut without a word."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}: give 0 to {2**32 - 1}")
