"""Several commands of a program, one after another in one start of processes.

    python -m tests.several PROGRAM FILE [--coordinator HOST:PORT --processes N --process I]

A start takes seconds, most commands of a test less. FILE: the list of their arguments, JSON. In
place of a command's name MODULE:FUNCTION stands for a function, which gets the arguments.

Programs over all processes are compiled by process 0, which hands them to the others: on few cores
all would compile the same at the same time. On CPUs JAX knows a program by its process, too, and
the others would wait for what never comes: here it is known by its devices' kind. Where only some
found a program in the cache the others would wait likewise, so the cache is this group's own.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys
from unittest import mock

from common_jax.cli.command_line import parse
from common_jax.cli.commands import Group
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
    program, file = options.pop("program"), options.pop("file")
    with hidden("torch"), joined(program, **options):
        import jax
        from jax._src import cache_key  # no public name

        from common_jax.io import compile_cache

        caches = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
        compile_cache.enable(caches / f"{program} of {options['processes']}")
        jax.config.update("jax_share_binary_between_hosts", True)
        alike = mock.patch.object(cache_key, "_hash_accelerator_config", cache_key._hash_devices)
        with alike:
            for argv in json.loads(file.read_text("utf-8")):
                print("several:", *argv[:2], file=sys.stderr, flush=True)
                call(program, [*map(str, argv)])
    return 0


def call(program: str, argv: list[str]) -> None:
    """One command, or one function."""
    module, colon, function = argv[0].partition(":")
    if colon:
        getattr(importlib.import_module(module), function)(*argv[1:])
        return
    commands = importlib.import_module(f"{program.replace('-', '_')}.cli").COMMANDS
    name, *rest = argv
    if isinstance(commands[name], Group):
        commands, (name, *rest) = commands[name].load(), rest
    options_class, run = commands[name].load()
    run(parse(f"{program} {name}", "", options_class, rest))


if __name__ == "__main__":
    sys.exit(main())
