"""What a run tells while it goes on, and what must not change when it goes on after a kill."""

import contextlib
import pathlib
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common_jax.errors import InputError
from common_jax.run import Run
from reward_jax.diffusion.loop import OnStep

__all__ = ["check_resumed", "reporter"]

_FREE = {"out", "resume", "save_every", "mesh"}  # may change when a run goes on


@contextlib.contextmanager
def reporter(what: str, steps: int, run: Run | None = None, start: int = 0) -> Iterator[OnStep]:
    """An `on_step` that shows a bar on a terminal and logs the means of each call's metrics.

    The first call compiles: steps/s are counted from its end.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=steps, completed=start, speed="", loss="")
        begun: tuple[float, int] | None = None

        def on_step(done: int, metrics: dict[str, np.ndarray]) -> None:
            nonlocal begun
            now = time.perf_counter()
            begun = begun or (now, done)
            means = {name: float(np.mean(value)) for name, value in metrics.items()}
            if done > begun[1]:
                means["steps_per_second"] = (done - begun[1]) / (now - begun[0])
            if run:
                run.log(done, means)
            speed = means.get("steps_per_second")
            bar.update(
                task,
                completed=done,
                speed=f"{speed:.0f} steps/s" if speed else "",
                loss=f"loss {means['loss']:.4g}",
            )

        yield on_step


def check_resumed(
    directory: pathlib.Path, config: Mapping[str, Any], free: Collection[str] = _FREE
) -> None:
    """InputError naming the first setting in which `config` is not the run's own; writes nothing.

    The same end as without a kill takes the same settings, those in `free` apart, and options that
    the run was begun before. Fine where there is no run yet.
    """
    path = directory / "config.yaml"
    if not path.is_file():
        return
    wanted = _flat(yaml.safe_load(yaml.safe_dump(dict(config))))
    try:
        text = path.read_text(encoding="utf-8")
        found = _flat(yaml.safe_load(text))
        # Half a file may be YAML, too: of less, or of another number.
        whole = text.endswith("\n") and not found.keys() & {n.rpartition(".")[0] for n in wanted}
    except (OSError, ValueError, yaml.YAMLError, AttributeError):
        whole, found = False, {}
    if not whole:
        raise InputError(
            f"{path}: cannot be read, or is cut short; put the run's settings back, or name a new "
            "directory"
        )
    for name, value in wanted.items():
        if name.partition(".")[0] not in free and found.get(name, value) != value:
            raise InputError(
                f"{directory}: the run there has {name} {found.get(name)!r}, not {value!r}; "
                "give the same settings, or name a new directory"
            )
    for name in found.keys() - wanted.keys():
        group = name.partition(".")[0]
        if isinstance(config.get(group), Mapping) and group not in free:
            raise InputError(
                f"{directory}: the run there has {name} {found[name]!r}, which is not given now; "
                "give the same settings, or name a new directory"
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found
