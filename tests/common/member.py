"""One of several processes that steps along with the others until its test ends it."""

import argparse
import contextlib
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable
from unittest import mock

from common_jax import distributed
from common_jax.agreement import agree
from common_jax.distributed import anywhere, by_first, heard, is_first, joined, meet, there
from common_jax.errors import InputError, Taken
from common_jax.termination import Terminated, noticed
from common_jax.watch import Watch


def main() -> int:
    given = argparse.ArgumentParser()
    given.add_argument("--coordinator")
    for name in ("processes", "process", "patience"):
        given.add_argument(f"--{name}", type=int)
    given.add_argument("--act", default="")
    options = vars(given.parse_args())
    act, patience = options.pop("act"), options.pop("patience") or 0
    try:
        with (
            mock.patch.object(distributed, "Watch", Counting),
            joined("member", **options, patience=patience),
        ):
            work(act)
    except InputError as error:
        print(f"member: error: {error}", file=sys.stderr)
        return 2
    return 0


class Counting(Watch):
    """A watch that says, when its process ends, how often it has looked since its last step.

    Looks at which the store kept it waiting, but then answered, are of a busy machine, and are
    not counted.
    """

    _answered, _steps = 0, -1

    def start(self, steps: Callable[[], int]) -> None:
        self._done = steps
        super().start(steps)

    def look(self) -> None:
        if self._done() != self._steps:
            self._answered, self._steps = 0, self._done()
        super().look()
        self._answered += not self._dumb

    def tell(self, what: str | None, code: int) -> None:
        looks = self._answered + max(1, self._dumb)  # and the one that ends it
        os.write(2, f"looks since its last step: {looks}\n".encode())
        super().tell(what, code)


def work(act: str) -> None:
    import jax
    import numpy as np

    from common_jax.mesh import batch_sharding, fetch, mesh_for, put

    mesh = mesh_for(None)
    assert mesh is not None and mesh.size == jax.process_count() * jax.local_device_count()
    own = jax.process_index()
    host = np.arange(24, dtype=np.float32).reshape(12, 2)
    step = jax.jit(lambda x: (x + 1, x.sum()))

    for number in range(1_000_000):
        rows, total = fetch(step(put(host, batch_sharding(mesh, 12))))
        np.testing.assert_array_equal(rows, host + 1)
        assert total == host.sum()
        if number == 2:
            assert by_first(lambda: [own, is_first()]) == [0, True]
            assert there(pathlib.Path("/")) and not there(pathlib.Path(f"/no such file {own}"))
            assert anywhere(own == 1) and not anywhere(False)
            assert heard(f"{own}" if own else None) == [
                (i, str(i)) for i in range(1, jax.process_count())
            ]
            agree({"norm": 1, "out": pathlib.Path("x"), "ranges": {"low": float("nan")}})
            with contextlib.suppress(Taken):  # in both, so that both go on without it
                by_first(take)
                raise AssertionError("taken by process 0 alone")
            print("ready", file=sys.stderr, flush=True)
        if number == 3 and act == "end":
            print("done")
            return
        if number == 3 and act == "refuse":
            by_first(refuse)
        if number == 3 and act == "disagree":
            agree({"norm": 1 + own}, "give all the same options")
        if number == 3 and act == "refuse alone" and own == 1:
            refuse()
        if number == 3 and act == "stick" and own == 1:
            time.sleep(1_000_000)
        if number == 3 and act == "terminate":
            terminate(own)
        meet()
        time.sleep(0.2)


def terminate(own: int) -> None:
    with noticed() as ending:
        assert not ending()
        if own == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if ending():
            raise Terminated("step 3 is saved")


def take() -> None:
    raise Taken("another run is there")


def refuse() -> None:
    raise InputError("no such file")


if __name__ == "__main__":
    sys.exit(main())
