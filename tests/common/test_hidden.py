"""Torch is not imported by what needs none of it, where it is installed."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

from common_jax.hidden import hidden


def test_a_module_is_hidden_in_the_block_alone():
    before = sys.meta_path[:]
    with hidden("wave"):
        assert importlib.util.find_spec("wave") is None and importlib.util.find_spec("colorsys")
        assert importlib.metadata.version("jax")
        with pytest.raises(ModuleNotFoundError):
            import wave  # noqa: F401
    assert sys.meta_path == before and importlib.util.find_spec("wave")


def test_a_board_imports_no_torch():
    code = "import sys, common_jax.io.board; assert 'torch' not in sys.modules; import torch"
    subprocess.run([sys.executable, "-c", code], check=True)


PROGRAM = """
import sys
from common_jax.cli import program
program.leave = lambda code: print(code, "transformers" in sys.modules, "torch" in sys.modules)
from tuco_jax.cli import main
main()
"""


def test_a_command_imports_transformers_and_no_torch(tmp_path):
    argv = ["import", "--model", tmp_path, "--out", tmp_path / "new"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, argv)], capture_output=True, text=True
    )
    assert done.stdout == "2 True False\n"
    assert done.stderr == f"tuco-jax: error: {tmp_path}/config.json: no such file; is this a " + (
        "model's directory?\n"
    )
