"""Scalars for TensorBoard, written at once.

`tensorboardX.SummaryWriter` writes in a thread, whose errors (a full disk) are printed by it and
reach nobody, and whose queue is then waited for without end.
"""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

from common_jax.hidden import hidden

__all__ = ["Board"]

with hidden("torch"):  # where it is installed tensorboardX imports it: seconds, for nothing here
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2


class Board:
    """An event file in `folder`, made if it is not there. All may raise OSError.

    start: the step from which a run is resumed; later ones of earlier files are hidden.
    """

    def __init__(self, folder: pathlib.Path, start: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".{start}")
        status: Any = event_pb2.SessionLog.START  # pyright: ignore[reportAttributeAccessIssue]
        begun = event_pb2.SessionLog(status=status)  # pyright: ignore[reportAttributeAccessIssue]
        self._write(start + 1 if start else 0, session_log=begun)
        self._writer.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step."""
        for name, value in metrics.items():
            self._write(step, summary=summary.scalar(name, value))
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, step: int, **what: Any) -> None:
        event = event_pb2.Event(wall_time=time.time(), step=step, **what)  # pyright: ignore[reportAttributeAccessIssue]
        self._writer.write_event(event)
