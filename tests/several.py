"""Several commands of a program, one after another in one start of processes.

    python -m tests.several PROGRAM FILE [--coordinator HOST:PORT --processes N --process I]

A start takes seconds, most commands of a test less. FILE.json: the list of their arguments. In
place of a command's name MODULE:FUNCTION stands for a function, which gets the arguments. Each
process leaves the exit codes in FILE.I.
"""

import argparse
import contextlib
import importlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from common_jax.cli import command_line
from common_jax.distributed import joined
from common_jax.hidden import hidden


def main() -> int:
    given = argparse.ArgumentParser()
    given.add_argument("program")
    given.add_argument("file", type=pathlib.Path)
    given.add_argument("--coordinator")
    given.add_argument("--processes", type=int)
    given.add_argument("--process", type=int)
    options = vars(given.parse_args())
    name, file = options.pop("program"), options.pop("file")
    with hidden("torch"), compiled_once(), joined(name, **options):
        program = importlib.import_module(f"{name.replace('-', '_')}.cli")
        with mock.patch.object(command_line, "joined", already_joined):
            codes = [call(program, argv) for argv in json.loads(file.read_text("utf-8"))]
    file.with_suffix(f".{options['process']}").write_text(json.dumps(codes))
    return 0


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """What all of them run one compiles, and the others get it.

    JAX has no public name for it: in its keys each process's CPU is a machine of another kind.
    """
    import jax
    from jax._src import cache_key

    jax.config.update("jax_share_binary_between_hosts", True)
    with mock.patch.object(cache_key, "_hash_accelerator_config", cache_key._hash_devices):
        yield


def already_joined(*_: Any, **__: Any) -> contextlib.AbstractContextManager[bool]:
    return contextlib.nullcontext(True)


def call(program: Any, argv: list[str]) -> int:
    """The exit code of one command, or 0 of a function."""
    module, colon, function = argv[0].partition(":")
    if not colon:
        return program.main([*map(str, argv)])
    getattr(importlib.import_module(module), function)(*argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
