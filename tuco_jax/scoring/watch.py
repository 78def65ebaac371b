"""Progress of a run, and the time that it spends on compiling."""

from collections.abc import Collection, Hashable, Sequence

from common_jax.progress import Bar
from tuco_jax.prompts.packing import Packed

__all__ = ["Watch"]


class Watch:
    """Progress and compile time of a run.

    lengths: of all prompts, in tokens. done: indices of prompts that were scored before. shown:
    the progress bar. compiling: seconds of the first calls of programs.
    """

    def __init__(self, lengths: Sequence[int], done: Collection[int], shown: Bar) -> None:
        self.compiling = 0.0
        self._called: set[Hashable] = set()
        self._lengths, self._done, self._shown = lengths, frozenset(done), shown
        self._reached: float = sum(lengths[i] for i in self._done)

    def called(self, program: Hashable, seconds: float) -> None:
        """Note a call of a program; its seconds include compilation, but not computation."""
        if program not in self._called:
            self._called.add(program)
            self.compiling += seconds

    def advance(self, batch: Packed, share: float = 1) -> None:
        """Note that this share of a batch has been computed."""
        new = sum(self._lengths[i] for i in batch.prompts if i not in self._done)
        self._reached += share * new
        self._shown.update(self._reached)
