"""Broken and hostile files: what hypothesis does to whole ones, and what reading them may take.

Every property of hostile files is `fuzzed`, always by the same examples, and reads `bounded`.
"""

import contextlib
import json
import pathlib
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common_jax.errors import InputError

SECONDS, BYTES = 10, 2 * 2**30

fuzzed = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,  # `bounded` has one, of the processor's time
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@contextlib.contextmanager
def bounded(names: Any = "") -> Iterator[None]:
    """No more memory than is allowed, an InputError of one line at most, in time.

    names: what the error must name. Time is that of the processor: it does not depend on what
    else the machine does.
    """
    taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, limits[1]))
    try:
        yield
    except InputError as error:
        assert "\n" not in str(error) and str(names) in str(error)
        assert len(str(error)) < 2000
        assert not _met(error, MemoryError), "refused once it had asked for too much memory"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - began < SECONDS


def _met(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error was raised while one of that kind was handled."""
    while error is not None and not isinstance(error, kind):
        error = error.__context__
    return error is not None


# What is done to bytes: at a place (a share of the length), one of these.
EXTREME = [0, 1, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.tuples(st.just("byte"), st.integers(0, 255)),
            st.tuples(st.just("number"), st.sampled_from(EXTREME)),
            st.tuples(st.just("cut"), st.integers(1, 64)),
            st.tuples(st.just("insert"), st.binary(min_size=1, max_size=16)),
            st.tuples(st.just("end"), st.just(0)),
        ),
    ),
    min_size=1,
    max_size=3,
)


def spoil(data, changes, most=None):
    """Bytes after some changes, all among the first `most`."""
    data = bytearray(data)
    for share, (kind, value) in changes:
        at = int(share * min(len(data), most or len(data)))
        if kind == "byte" and at < len(data):
            data[at] = value
        elif kind == "number":
            data[at : at + 8] = value.to_bytes(8, "little")
        elif kind == "cut":
            del data[at : at + value]
        elif kind == "insert":
            data[at:at] = value
        elif kind == "end":
            del data[at:]
    return bytes(data)


# What may stand in place of any part of a JSON document.
DEEP = "[" * 100_000
VALUES: list[Any] = [0, -1, 2**31, 2**63, 10**40, 1e308, True, None, "x", "", [], [1] * 5, {}]
VALUES += [{"a": {"b": 1}}, DEEP]


def check_json(path: pathlib.Path, call: Callable[[], Any], chosen: Any = fuzzed) -> None:
    """Any part of a JSON file replaced by anything, also by nothing that ends."""
    whole = json.loads(path.read_text())

    @chosen
    @given(st.sampled_from(sorted(_places(whole))), st.sampled_from(VALUES))
    def check(place, value):
        if value is DEEP:
            text = json.dumps(_replaced(whole, place, "DEEP")).replace('"DEEP"', DEEP)
        else:
            text = json.dumps(_replaced(whole, place, value))
        path.write_text(text)
        with bounded():
            call()

    check()


def _places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a JSON value has parts, each as a path of keys."""
    yield path
    inner = value.items() if isinstance(value, dict) else ()
    for key, one in inner:
        yield from _places(one, (*path, key))


def _replaced(value: Any, path: tuple[str, ...], new: Any) -> Any:
    if not path:
        return new
    return value | {path[0]: _replaced(value[path[0]], path[1:], new)}
