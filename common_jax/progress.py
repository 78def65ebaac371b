"""A progress bar, shown on stderr where that is a terminal, and nowhere else."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from common_jax.distributed import beat, is_first

__all__ = ["Bar", "bar"]


class Bar:
    """The progress of work of `total` units; `speed` is known from the second update on."""

    def __init__(
        self, show: Callable[[float, str, str], None], unit: str, start: float = 0
    ) -> None:
        self._show, self._unit = show, unit
        self._begun = time.perf_counter(), start
        self._first: tuple[float, float] | None = None
        self.speed: float | None = None  # units a second

    def update(self, done: float, note: str = "") -> None:
        """Show that `done` units are done, including those before a resume.

        note: a text to show, such as a loss. The first units include compilation: `speed` is that
        of the units after them. Until there are such, the bar shows that of the first.
        """
        beat()
        now = time.perf_counter()
        self._first = self._first or (now, done)
        if done > self._first[1]:
            self.speed = (done - self._first[1]) / (now - self._first[0])
        shown = self.speed
        if shown is None:
            shown = (done - self._begun[1]) / max(now - self._begun[0], 1e-9)
        self._show(done, _per_second(shown, self._unit), note)


def _per_second(speed: float, unit: str) -> str:
    return f"{speed:,.0f} {unit}/s" if speed >= 10 else f"{speed:.2g} {unit}/s"


@contextlib.contextmanager
def bar(
    what: str, total: float, *, unit: str = "steps", start: float = 0, show: bool = True
) -> Iterator[Bar]:
    """A bar named `what`: units done of `total`, units a second and the time left.

    start: units done before, in a resumed run. show: False for no bar, even on a terminal.
    """
    if not (show and is_first() and sys.stderr.isatty()):
        yield Bar(lambda *_: None, unit, start)
        return
    # Not above: programs that draw no bar start sooner.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(
            what, total=total, completed=int(start), speed="compiling", note=""
        )

        def update(done: float, speed: str, note: str) -> None:
            progress.update(task, completed=done, speed=speed, note=note)

        yield Bar(update, unit, start)
