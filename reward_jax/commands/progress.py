"""What a run tells while it goes on, and what may change when it goes on after a kill."""

import contextlib
from collections.abc import Iterator

import numpy as np

from common_jax.progress import bar
from common_jax.run import Run
from reward_jax.diffusion.loop import OnStep

__all__ = ["FREE", "reporter"]

FREE = ("out", "resume", "save_every", "mesh")  # may change when a run goes on


@contextlib.contextmanager
def reporter(what: str, steps: int, run: Run) -> Iterator[OnStep]:
    """An `on_step` that shows a bar on a terminal and logs the means of each call's metrics."""
    with bar(what, steps, start=run.start) as shown:

        def on_step(done: int, metrics: dict[str, np.ndarray]) -> None:
            means = {name: float(np.mean(value)) for name, value in metrics.items()}
            shown.update(done, f"loss {means['loss']:.4g}")
            if shown.speed:
                means["steps_per_second"] = shown.speed
            run.log(done, means)

        yield on_step
