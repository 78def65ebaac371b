"""The checkpoints of a training run, through orbax; each appears whole or not at all."""

import pathlib
from typing import Any

import orbax.checkpoint as ocp

from common_jax.errors import InputError

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of a training run, newest `keep` of them, with exact resume.

    A checkpoint is a tree of arrays: parameters, optimizer state, `jax.random.key_data` of keys.
    Their settings are stored beside them (`common_jax.resume`). Use as a context:

        with Checkpoints("run/checkpoints", keep=2) as checkpoints:
            if (step := checkpoints.latest()) is not None:
                state = checkpoints.restore(step, like=state)
            ...
            checkpoints.save(step, state)

    Writing goes on in the background; leaving the context waits for it.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Write `state` as the checkpoint of `step`; one that exists already is left as it is."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step`, in the shapes, dtypes and shardings of `like`."""
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))
        except Exception as error:  # orbax raises bare ones for damaged arrays
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self._manager.directory}/{step}: the checkpoint is corrupt, or of other "
                f"settings ({reason}); delete it to go on from the one before"
            ) from error
