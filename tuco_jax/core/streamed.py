"""The streamed source: each layer is read while the one before it computes.

It is for a pair that does not fit in memory: two layers are in memory at any time. Many batches go
through a layer before the next one is taken (`run_each` of `engine.py`), so that the weights are
read once; their residual streams are stored in host memory, and beyond a budget on disk
(`carry_store.py`).

Legend: L layers.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from tuco_jax.core.layer import PairLayer
from tuco_jax.core.walk import OneByOne, ends_of
from tuco_jax.models.decoder import Params
from tuco_jax.models.pair import Pair
from tuco_jax.models.positions import layer_infos
from tuco_jax.weights.options import AskedPrecision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Streamed", "stream_pair"]

# Index of a layer -> its `base`, `tuned` and `lora`, host arrays without an axis of layers.
Read = Callable[[int], tuple[Params, Params, Params]]


class Streamed(OneByOne):
    """Layers read by `read` in a thread, one ahead of the walk."""

    streams = True

    def __init__(self, ends: Pair, read: Read) -> None:
        super().__init__(ends)
        self._read = read
        self._configs = ends.base_config, ends.tuned_config
        infos = layer_infos(ends.base_config), layer_infos(ends.tuned_config)
        self._infos = jax.tree.map(np.asarray, infos)
        self._ahead: tuple[int, Future[PairLayer]] | None = None

    @classmethod
    def of(cls, pair: Pair) -> "Streamed":
        """Layers of a pair in host memory, for a device that has less."""
        trees = (pair.base, pair.tuned, pair.lora)
        stacked = jax.tree.map(np.asarray, tuple(tree.get("layers", {}) for tree in trees))
        return cls(ends_of(pair), lambda index: jax.tree.map(lambda x: x[index], stacked))

    def layers(self, start: int, stop: int) -> Iterator[PairLayer]:
        """The layers in order; the next one, also beyond `stop`, is being read meanwhile."""
        for index in range(start, stop):
            layer = self._taken(index)
            if index + 1 < self.ends.base_config.depth:
                self._ahead = index + 1, self._started(index + 1)
            yield layer
            del layer  # before waiting for the next one

    def _taken(self, index: int) -> PairLayer:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        if ahead is not None:  # so that there are no more than two layers in memory
            ahead[1].exception()  # waits; neither its result nor its error is used
        return self._layer(index)

    def _started(self, index: int) -> Future[PairLayer]:
        thread = ThreadPoolExecutor(1, "layers")
        future = thread.submit(self._layer, index)
        thread.shutdown(wait=False)  # it ends with the layer, so that none is left to be closed
        return future

    def _layer(self, index: int) -> PairLayer:
        infos = jax.tree.map(lambda x: x[index], self._infos)
        return jax.device_put(PairLayer(*self._read(index), infos, self._configs))


def stream_pair(
    base: Any,
    tuned: Any,
    *,
    dtype: str = "float32",
    precision: AskedPrecision = "auto",
    adapter: str | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> tuple[Streamed, "PreTrainedTokenizerBase"]:
    """`load_pair` for a pair that does not fit in memory: layers are read when they are needed.

    Arguments, notes (`.ends.notes`), tokenizer and errors are those of `load_pair`. Names, shapes
    and configs are checked before any layer is read, values when it is.
    """
    from tuco_jax.weights.load import needed_tokenizer, open_pair  # brings transformers: seconds

    opened = open_pair(base, tuned, dtype=dtype, precision=precision, adapter=adapter)
    ends, found = opened.load(layers=False)
    return Streamed(ends, opened.layer), needed_tokenizer(tokenizer or found, tuned)
