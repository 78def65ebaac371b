"""SIGTERM, by which Slurm and Kubernetes announce an end: a training saves before it ends.

    with noticed() as ending, Checkpoints(folder) as checkpoints:
        for step in range(done, steps):
            ...
            if ending():  # in any process: all of them leave at the same step
                checkpoints.save(step + 1, state)
                raise Terminated(f"step {step + 1} is saved")

Outside of such a block the signal ends the process as ever.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from common_jax.distributed import TERMINATED, anywhere, meet

__all__ = ["Terminated", "noticed"]


class Terminated(SystemExit):
    """The end of a process that was told to end, once what it has done is saved.

    Exit code 143, as of one that the signal ended. said: what a user should know.
    """

    def __init__(self, said: str) -> None:
        super().__init__(TERMINATED)
        self.said = said

    def __str__(self) -> str:
        return f"told to end (SIGTERM): {self.said}"


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """In the block SIGTERM is noted, and nothing else; yields whether it came.

    Over several processes the answer is whether it came to any, and all ask at the same point of
    the program; they leave the block by `Terminated` together. A signal that came after the last
    question ends the process after the block. In threads, and where a program has a handler of its
    own, that stays.
    """
    came: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    own = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: anywhere(bool(came))
    except Terminated:
        meet()  # until the others, too, have written their part
        raise
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if came:
        os.kill(os.getpid(), signal.SIGTERM)
