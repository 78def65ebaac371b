"""The checkpoints of a training run, through orbax; each appears whole or not at all."""

import pathlib
from typing import Any

import orbax.checkpoint as ocp

from common_jax.errors import InputError

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of a training run, newest `keep` of them, with exact resume.

    A checkpoint is a tree of arrays (parameters, optimiser state, `jax.random.key_data` of keys)
    and a dictionary that JSON can hold (position in the data, settings). Use as a context:

        with Checkpoints("run/checkpoints", keep=2) as checkpoints:
            if (step := checkpoints.latest()) is not None:
                state, extra = checkpoints.restore(step, like=state)
            ...
            checkpoints.save(step, state, {"epoch": epoch})

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

    def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> None:
        """Write `state` and `extra` as the checkpoint of `step`; one that is there is kept."""
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            extra=ocp.args.JsonSave(extra or {}),
        )
        self._manager.save(step, args=arguments)

    def extra(self, step: int) -> dict[str, Any]:
        """The dictionary of `step`, to be looked at before its arrays are read."""
        arguments = ocp.args.Composite(extra=ocp.args.JsonRestore())
        return self._restored(step, arguments)["extra"]

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and extra of `step`, in the shapes, dtypes and shardings of `like`."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardRestore(like),
            extra=ocp.args.JsonRestore(),
        )
        restored = self._restored(step, arguments)
        return restored["state"], restored["extra"]

    def _restored(self, step: int, arguments: ocp.args.Composite) -> Any:
        try:
            return self._manager.restore(step, args=arguments)
        except Exception as error:  # orbax raises bare ones for spoilt arrays
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self._manager.directory}/{step}: the checkpoint is corrupt, or of other "
                f"settings ({reason}); delete it to go on from the one before"
            ) from error
