"""How far a run is, and what of its time was compiling; told by those who compute."""

from collections.abc import Collection, Hashable, Sequence

from common_jax.progress import Bar
from tuco_jax.prompts.packing import Packed

__all__ = ["Watch"]


class Watch:
    """Of a run over prompts of these lengths, in tokens, some of them done before it.

    compiling: seconds that first calls of programs took.
    """

    def __init__(self, lengths: Sequence[int], done: Collection[int], shown: Bar) -> None:
        self.compiling = 0.0
        self._called: set[Hashable] = set()
        self._lengths, self._done, self._shown = lengths, frozenset(done), shown
        self._reached: float = sum(lengths[i] for i in self._done)

    def called(self, program: Hashable, seconds: float) -> None:
        """A program was called, which returns before it has computed, but once it has compiled."""
        if program not in self._called:
            self._called.add(program)
            self.compiling += seconds

    def advance(self, batch: Packed, share: float = 1) -> None:
        """This share of a batch is computed."""
        new = sum(self._lengths[i] for i in batch.prompts if i not in self._done)
        self._reached += share * new
        self._shown.update(self._reached)
