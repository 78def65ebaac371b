"""A disk that is full, or an interrupt, while weights are written: one line, nothing left."""

import pathlib
import subprocess
import sys

import pytest

from common_jax.errors import InputError
from tests.tuco.tiny import save_tiny
from tuco_jax.weights.hf import model as huggingface

ROOT = pathlib.Path(__file__).parents[3]

# The limit on a file's size stands for the disk.
FULL = """
import resource, sys
from common_jax.errors import InputError
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.orbax import store
source, out = sys.argv[1:]
model = huggingface.load(source)

def export(out):
    huggingface.export(out, model.config, model.params, model.tokenizer, model.hf_config)

# Most of the arrays, of the tokenizer and of store.json are larger.
for limit in (20_000, 2_000, 200):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for write in (export, lambda out: store.save(out, model)):
        try:
            write(out)
        except InputError as error:
            print(error)
"""


def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path):
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    (tmp_path / "disk").mkdir()
    out = tmp_path / "disk" / "out"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "model"), str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    line = f"{out}: cannot be written: File too large; make room, or name another place\n"
    assert (done.stdout, done.stderr) == (6 * line, "")
    assert not list(out.parent.iterdir())


def test_a_full_cache_of_the_hub_is_no_hub_out_of_reach(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "snapshot_download", full)
    with pytest.raises(InputError, match="hub: cannot be written: No space left on device; make"):
        huggingface.locate("owner/model")


INTERRUPTED = """
import os, signal, sys
import orbax.checkpoint as ocp
from tuco_jax.cli import main
save = ocp.StandardCheckpointer.save
def interrupted(*args, **kwargs):
    save(*args, **kwargs)  # threads go on writing
    os.kill(os.getpid(), signal.SIGINT)
ocp.StandardCheckpointer.save = interrupted
sys.exit(main())
"""


def test_an_interrupt_while_a_store_is_written_leaves_nothing(tmp_path):
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    (tmp_path / "disk").mkdir()
    argv = ["import", "--model", tmp_path / "model", "--out", tmp_path / "disk" / "store"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tuco-jax: interrupted\n")
    assert not list((tmp_path / "disk").iterdir())
