"""Metrics between two lines of a training log, and the check for divergence."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from common_jax.errors import InputError
from common_jax.io.checkpoint import Checkpoints
from tuco_jax.models.decoder import Params

__all__ = ["MetricsWindow"]


@jax.jit
def _finite(tree: Any) -> Bool[Array, ""]:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


class MetricsWindow:
    """Metrics since the last line of the log; they stay on the device until `check`."""

    def __init__(self, out: str, learning_rate: float, checkpoints: Checkpoints) -> None:
        self._out, self._rate, self._checkpoints = out, learning_rate, checkpoints
        self._new: list[tuple[int, dict[str, Float[Array, ""]]]] = []
        self._seen: list[dict[str, float]] = []
        self._tokens = 0
        self.began = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Float[Array, ""]], tokens: int) -> None:
        """Take what a step gave: its loss and grad_norm, and how many real tokens it had."""
        self._new.append((step, metrics))
        self._tokens += tokens

    def check(self) -> None:
        """Fetch new metrics; raises InputError if a loss or gradient is not finite."""
        for step, metrics in self._new:
            values = {name: float(value) for name, value in metrics.items()}
            if not all(map(math.isfinite, values.values())):
                raise self._diverged(
                    f"step {step}: loss {values['loss']:g}, gradient {values['grad_norm']:g}"
                )
            self._seen.append(values)
        self._new = []

    def check_weights(self, step: int, trained: Params) -> None:
        """Raises InputError if the step's update made weights that are not finite.

        The next step's loss would show it, too, but there may be none.
        """
        if not bool(_finite(trained)):
            raise self._diverged(f"step {step}: its update made weights that are not finite")

    def _diverged(self, what: str) -> InputError:
        latest = self._checkpoints.latest()
        checkpoint = (
            "there is no checkpoint yet"
            if latest is None
            else f"the last good checkpoint is {self._out}/checkpoints/{latest}"
        )
        return InputError(
            f"{what}: training diverged; {checkpoint}; start anew with a lower "
            f"optimizer.learning_rate (now {self._rate:g}) or a longer warmup"
        )

    def close(self) -> dict[str, float]:
        """Means since the last line; `tokens` does not count padding. Begins the next line."""
        seconds = time.perf_counter() - self.began
        names = self._seen[0]
        values = {name: float(np.mean([v[name] for v in self._seen])) for name in names}
        values |= {"tokens": self._tokens, "tokens_per_second": self._tokens / seconds}
        self._seen, self._tokens, self.began = [], 0, time.perf_counter()
        return values
