"""One of several processes that steps along with the others until its test ends it."""

import argparse
import contextlib
import pathlib
import sys
import time

from common_jax.distributed import by_first, is_first, joined, meet, there
from common_jax.errors import InputError, Taken


def main() -> int:
    given = argparse.ArgumentParser()
    given.add_argument("--coordinator")
    for name in ("processes", "process", "patience"):
        given.add_argument(f"--{name}", type=int)
    given.add_argument("--act", default="")
    options = vars(given.parse_args())
    act, patience = options.pop("act"), options.pop("patience") or 0
    try:
        with joined("member", **options, patience=patience):
            work(act)
    except InputError as error:
        print(f"member: error: {error}", file=sys.stderr)
        return 2
    return 0


def work(act: str) -> None:
    import jax
    import numpy as np

    from common_jax.mesh import batch_sharding, fetch, mesh_for, put

    mesh = mesh_for(None)
    assert mesh is not None and mesh.size == jax.process_count() * jax.local_device_count()
    own = jax.process_index()
    host = np.arange(8, dtype=np.float32).reshape(4, 2)
    step = jax.jit(lambda x: (x + 1, x.sum()))
    for number in range(1_000_000):
        rows, total = fetch(step(put(host, batch_sharding(mesh, 4))))
        np.testing.assert_array_equal(rows, host + 1)
        assert total == host.sum()
        if number == 2:
            assert by_first(lambda: [own, is_first()]) == [0, True]
            assert there(pathlib.Path("/")) and not there(pathlib.Path(f"/no such file {own}"))
            with contextlib.suppress(Taken):  # in both, so that both go on without it
                by_first(take)
                raise AssertionError("taken by process 0 alone")
            print("ready", file=sys.stderr, flush=True)
        if number == 3 and act == "end":
            print("done")
            return
        if number == 3 and act == "refuse":
            by_first(refuse)
        if number == 3 and act == "refuse alone" and own == 1:
            refuse()
        if number == 3 and act == "stick" and own == 1:
            time.sleep(1_000_000)
        meet()
        time.sleep(0.05)


def take() -> None:
    raise Taken("another run is there")


def refuse() -> None:
    raise InputError("no such file")


if __name__ == "__main__":
    sys.exit(main())
