"""The watch that each of several processes keeps over the others: who is lost, who stands still.

Each process says every two seconds that it lives, and how many steps it has done, in a store that
all share, the key-value store of JAX's coordination service, which process 0 carries; each looks
at what the others say. After half a minute of silence the others end with a line that says whose
it was. A process that lives but makes no step for `patience` seconds is stuck, and ends them, too.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["AGAIN", "FAREWELL", "PACE", "SILENCE", "Watch"]

PACE = 2.0  # seconds between two signs of life, and between two looks
SILENCE = 30.0  # seconds, as looks in a row at which a process has said nothing new: it is lost
FAREWELL = 15.0  # seconds at most in which the others read why process 0 leaves
AGAIN = "start all processes again, and the run goes on"

_ALIVE, _ENDED = "tuco_reward/alive/", "tuco_reward/ended/"


class Watch:
    """Signs of life: this process's own, and those of the others.

    store: `key_value_set(key, text, overwrite)` and `key_value_dir_get(prefix)` -> pairs of key
    and text; either may raise. end: called with what to say of another process, and the exit code.
    """

    def __init__(
        self, store: Any, index: int, count: int, patience: float, end: Callable[[str, int], None]
    ) -> None:
        self._store, self._index, self._count = store, index, count
        self._patience, self._end = patience, end
        self._stopped = threading.Event()
        self._rounds = 0  # how often the store has answered
        self._alive: dict[int, tuple[int, int]] = {}  # process: signs of life, steps
        self._ended: dict[int, tuple[str | None, int]] = {}
        self._lost = 0
        # Of the look before; then looks in a row at which the store, or a process, said no more.
        self._answers, self._seen = -1, dict.fromkeys(range(count), (-2, -2))
        self._dumb = 0
        self._silent, self._still = (dict.fromkeys(range(count), 0) for _ in range(2))

    def start(self, steps: Callable[[], int]) -> None:
        """Speak and look, each in a thread of its own: the store may keep one waiting."""

        def over_and_over(act: Callable[[], None]) -> None:
            while not self._stopped.wait(PACE):
                act()

        for act in (lambda: self.speak(steps()), self.look):
            threading.Thread(target=over_and_over, args=(act,), daemon=True).start()

    def stop(self) -> None:
        """End both threads."""
        self._stopped.set()

    def tell(self, what: str | None, code: int) -> None:
        """Let the others know that this process ends; process 0 waits until they do.

        what: None where another process is why.
        """
        if self._dumb * PACE < SILENCE:  # process 0, stopped, would keep this one waiting, too
            with contextlib.suppress(Exception):  # the service may be what is gone
                text = json.dumps([what and " ".join(what.split())[:500], code])
                self._store.key_value_set(f"{_ENDED}{self._index}", text, True)
        until = time.monotonic() + FAREWELL
        while (
            self._index == 0
            and len(self._ended) < self._count - self._lost
            and time.monotonic() < until
        ):
            time.sleep(0.2)
            self._read()

    def _read(self) -> None:
        with contextlib.suppress(Exception):
            for key, text in self._store.key_value_dir_get(_ENDED):
                self._ended[int(key.rpartition("/")[2])] = tuple(json.loads(text))

    def speak(self, steps: int) -> None:
        """Say that this process lives, and read what the others say."""
        try:
            self._store.key_value_set(f"{_ALIVE}{self._index}", f"{self._rounds} {steps}", True)
            for key, text in self._store.key_value_dir_get(_ALIVE):
                signs, done = map(int, text.split())
                self._alive[int(key.rpartition("/")[2])] = signs, done
            self._read()
        except Exception:  # the service is gone, and this process aborts, or will
            return
        self._rounds += 1

    def look(self) -> None:
        """Count looks at which a process has said nothing new; end this one after too many.

        Looks, and no time: on a machine that stood still, or is too busy, they come late as well.
        """
        self._dumb = self._dumb + 1 if self._answers == self._rounds else 0
        self._answers = self._rounds
        if self._dumb:
            if self._dumb * PACE >= SILENCE and self._index:  # the store does not answer
                self._end(_was_lost([0]), 1)
            return
        now = {i: self._alive.get(i, (-1, -1)) for i in range(self._count)}
        for i, (signs, steps) in now.items():
            self._silent[i] = 0 if signs != self._seen[i][0] else self._silent[i] + 1
            self._still[i] = 0 if steps != self._seen[i][1] else self._still[i] + 1
        self._seen = now
        for i, (what, code) in dict(self._ended).items():
            if i != self._index and what is not None:
                self._end(f"process {i} ended ({what})", code)
        lost = [i for i in now if self._silent[i] * PACE >= SILENCE and i not in self._ended]
        if lost:
            self._lost = len(lost)
            self._end(_was_lost(lost), 1)
        least = min(steps for _, steps in now.values())
        behind = [i for i in now if now[i][1] == least]  # the others wait for these
        if self._patience and min(self._still[i] for i in behind) * PACE >= self._patience:
            what = f"made no step for {self._patience:g} s (--patience)"
            if len(behind) < self._count:
                self._end(f"{_names(behind)} {what}, and the others wait; {AGAIN}", 1)
            self._end(f"the processes {what}; {AGAIN}", 1)


def _was_lost(lost: Sequence[int]) -> str:
    were = "was" if len(lost) == 1 else "were"
    return (
        f"{_names(lost)} {were} lost: not a sign of life for {SILENCE:g} s (killed, or stopped); "
        f"{AGAIN}"
    )


def _names(some: Sequence[int]) -> str:
    return f"process {some[0]}" if len(some) == 1 else f"processes {', '.join(map(str, some))}"
