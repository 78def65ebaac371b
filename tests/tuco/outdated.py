"""`tuco-jax` over several processes, of which process 1 has another version of a package.

python -m tests.tuco.outdated PACKAGE COMMAND ... --process I
"""

import importlib.metadata
import sys
from unittest import mock

from tuco_jax.cli import main

version = importlib.metadata.version


def version_here(name: str) -> str:
    outdated = name == sys.argv[1] and sys.argv[-1] == "1"
    return "0.0.1" if outdated else version(name)


if __name__ == "__main__":
    with mock.patch.object(importlib.metadata, "version", version_here):
        sys.exit(main(sys.argv[2:]))
