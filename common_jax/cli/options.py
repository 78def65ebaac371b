"""Options that several commands share; imports little, so that --help is quick."""

import dataclasses

from common_jax.cli.ranges import PositiveInt, Seed

__all__ = ["MeshOptions", "RunOptions"]


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Devices along each axis; one of them may be -1, for all that are left.

    Args:
        data: whole copies of the models, each with its shard of a batch.
        fsdp: devices that weights (and optimizer state) are sharded over, gathered when used.
        tensor: devices that single matrices are sharded over.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every training run.

    Args:
        out: the run's directory; it must not exist yet, unless resume is given.
        seed: of initial parameters and of all other random numbers.
        save_every: steps between checkpoints.
        resume: go on with the run in out, if there is one.
        mesh: devices; rows of a batch are sharded over data and fsdp.
    """

    out: str
    seed: Seed = 0
    save_every: PositiveInt = 1000
    resume: bool = False
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
