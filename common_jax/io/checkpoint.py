"""The checkpoints of a training run, through orbax; each appears whole or not at all."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from common_jax.distributed import anywhere, by_first, count
from common_jax.errors import InputError
from common_jax.io.files import why_not_written
from common_jax.io.orbax_noise import quiet
from common_jax.termination import Terminated

__all__ = ["Checkpoints"]

_LATE = (
    "not all processes see the newest checkpoint: their file system shows it to some of them "
    "later than to others; start again once it shows all the same"
)


class Checkpoints:
    """The checkpoints of a training run, newest `keep` of them, with exact resume.

    A checkpoint is a tree of arrays: parameters, optimizer state, `jax.random.key_data` of keys.
    Their settings are stored beside them (`common_jax.resume`). Use as a context:

        with Checkpoints("run/checkpoints", keep=2) as checkpoints:
            if (step := checkpoints.latest()) is not None:
                state = checkpoints.restore(step, like=state)
            ...
            checkpoints.save(step, state)

    Writing goes on in the background; leaving the context waits for it. An error of it is raised
    by the next `save`, or then: InputError that names the checkpoint. Those before it are kept.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int = 2) -> None:
        import orbax.checkpoint as ocp  # it takes seconds: after all that may be refused

        self._ocp, self._silence = ocp, contextlib.ExitStack()
        self._directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        with quiet(), self._written():
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        self._silence.enter_context(quiet())
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with self._silence, self._written():
                self._manager.close()
        except InputError:
            # Else the first error stands, of which this may be the echo.
            if kind in (None, Terminated):
                raise

    def latest(self) -> int | None:
        """Step of the newest whole checkpoint, or None.

        Of several processes, which ask together, all take what process 0 sees. Raises InputError
        where another sees a later one: it would be written anew by some of them.
        """
        own = self._manager.latest_step()
        found: int | None = by_first(self._manager.latest_step)
        if anywhere(own is not None and (found is None or own > found)):
            raise InputError(f"{self._directory}: {_LATE}")
        return found

    def save(self, step: int, state: Any) -> None:
        """Write `state` as the checkpoint of `step`; one that exists already is left as it is."""
        with self._written():
            if step not in self._manager.all_steps():
                self._manager.save(step, args=self._ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """The state of `step`, in the shapes, dtypes and shardings of `like`.

        Raises InputError for a checkpoint that is damaged, and for one of another state.
        """
        try:
            return self._manager.restore(step, args=self._ocp.args.StandardRestore(like))
        except Exception as error:  # orbax raises bare ones for damaged arrays
            place = self._directory / str(step)
            if count() > 1 and step not in self._manager.all_steps():
                raise InputError(f"{place}: {_LATE}") from error
            if other := self._difference(step, like):
                raise InputError(
                    f"{place}: the checkpoint is of other settings ({other}); give the run's own, "
                    "or name a new directory"
                ) from error
            reason = " ".join(str(error).split())[:200]
            before = [s for s in self._manager.all_steps() if s < step]
            where = f"the one of step {max(before)}" if before else "the beginning"
            raise InputError(
                f"{place}: the checkpoint is corrupt, or cannot be read ({reason}); move it "
                f"out of its folder, and the run goes on from {where}"
            ) from error

    def _difference(self, step: int, like: Any) -> str | None:
        """The first array whose shape or dtype is another, where the checkpoint says them."""
        try:
            stored = self._manager.item_metadata(step)
            found, wanted = (
                {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}
                for tree in (stored, self._ocp.utils.serialize_tree(like, keep_empty_nodes=True))
            )
        except Exception:  # damaged, too
            return None
        for name in sorted(found.keys() | wanted.keys()):
            if name not in wanted or name not in found:
                return f"{name} is {'not' if name in wanted else 'only'} there"
            shapes = [tuple(np.shape(x) if not hasattr(x, "shape") else x.shape)
                      for x in (found[name], wanted[name])]  # fmt: skip
            if shapes[0] != shapes[1]:
                return f"{name} has the shape {list(shapes[0])}, not {list(shapes[1])}"
        return None

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Turn what orbax raises, a full disk and all else, into one InputError."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # of any kind, from its own threads
            whole = any(p.name.isdigit() for p in self._directory.glob("*"))  # others are begun
            newest = "the newest whole one is kept, and --resume goes on from it"
            raise InputError(
                f"{self._directory}: checkpoints cannot be written: {why_not_written(error)}; "
                f"{newest if whole else 'none is whole yet'}"
            ) from error
