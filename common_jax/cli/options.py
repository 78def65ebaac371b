"""Options that several commands share; imports little, so that --help is quick.

Each is stated here once: a command's options inherit from those that it has, and set another
default where they need one.
"""

import dataclasses
from contextlib import AbstractContextManager
from typing import Literal

from common_jax.cli.ranges import MeshSize, NonNegativeFloat, NonNegativeInt, PositiveInt, Seed
from common_jax.errors import InputError

__all__ = [
    "CheckpointOption",
    "DeviceOption",
    "DirectoryOption",
    "MeshOptions",
    "PrecisionOption",
    "ProcessOptions",
    "RunOptions",
    "SeedOption",
    "TopologyOption",
]


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """Devices along each axis; one of them may be -1, for all that are left.

    Args:
        data: whole copies of the models, each with its shard of a batch.
        fsdp: devices that weights (and optimizer state) are sharded over, gathered when used.
        tensor: devices that single matrices are sharded over.
    """

    data: MeshSize = 1
    fsdp: MeshSize = 1
    tensor: MeshSize = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Options of every command, for several processes (docs/pods.md); Slurm and TPU pods set them.

    Args:
        coordinator: HOST:PORT of process 0, at which all meet; the port is any free one.
        processes: how many run this command.
        process: which of them this is, from 0.
        patience: seconds without a step after which a process counts as stuck, and all end; 0 for
            no end.
    """

    coordinator: str | None = None
    processes: PositiveInt | None = None
    process: NonNegativeInt | None = None
    patience: NonNegativeFloat = 1800.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionOption:
    """An option of every command of a program that computes in float32 (docs/rewards.md).

    Args:
        precision: of products of float32 numbers; auto is float32, or what the variable
            JAX_DEFAULT_MATMUL_PRECISION says. The others are quicker on an accelerator, and keep
            three digits; a CPU computes in float32 at any.
    """

    precision: Literal["auto", "float32", "tensorfloat32", "bfloat16"] = "auto"

    def applied(self) -> AbstractContextManager[None]:
        """While the command runs."""
        from common_jax import precision  # imports jax

        return precision.applied(None if self.precision == "auto" else self.precision)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedOption:
    """One seed for all that is random.

    Args:
        seed: of all random numbers.
    """

    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOption:
    """Where it runs.

    Args:
        mesh: devices; rows of a batch are sharded over data and fsdp.
    """

    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopologyOption:
    """What a program is compiled for that is planned.

    Args:
        topology: a slice of TPUs, such as "v5e:2x4", by their own compiler, which the extra tpu
            brings; by default CPUs, whose temporaries are larger.
    """

    topology: str | None = None

    def check_topology(self, device: str) -> None:
        """Raise InputError for another device than the slice's."""
        if self.topology is not None and device != "tpu-v5e":
            raise InputError(f"topology {self.topology} is of TPUs: give device tpu-v5e")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOption:
    """How much of a training a kill costs.

    Args:
        save_every: steps between checkpoints: as many as a kill loses at most.
    """

    save_every: PositiveInt = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectoryOption(CheckpointOption, SeedOption):
    """Where a run is kept.

    Args:
        out: the run's directory; it must not exist yet, unless resume is given.
        resume: go on with the run in out, if there is one.
    """

    out: str
    resume: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(DeviceOption, DirectoryOption):
    """Options of every training run of models."""
