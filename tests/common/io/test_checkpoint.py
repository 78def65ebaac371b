"""A run goes on where it stopped."""

import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from common_jax.errors import InputError
from common_jax.io import checkpoint
from common_jax.mesh import make_mesh


@pytest.fixture(scope="module")
def tree():
    rng = np.random.default_rng(0)
    return {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(5,)), jnp.bfloat16),
        "step": jnp.asarray(7),
        "key": jax.random.key_data(jax.random.key(3)),
    }


def test_a_run_resumes_exactly(tree, tmp_path):
    mesh = make_mesh(1, 2, 4)
    cut = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    state = tree | {"layers": jax.device_put(tree["layers"], cut)}
    with checkpoint.Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3):
            state = jax.tree.map(lambda x: x + 1, state)
            checkpoints.save(step, state)
        checkpoints.save(3, jax.tree.map(jnp.zeros_like, state))  # there already: kept
    like = jax.tree.map(jnp.zeros_like, state)
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest() == 3
        again, older = checkpoints.restore(3, like), checkpoints.restore(2, like)
    chex.assert_trees_all_equal(again, state)
    np.testing.assert_array_equal(older["key"], state["key"] - 1)
    assert again["layers"]["kernel"].sharding.is_equivalent_to(cut, 3)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["2", "3"]


def test_a_checkpoint_of_another_state_is_no_damaged_one(tree, tmp_path):
    """Nothing says to delete it."""
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, tree)
    others = {
        "layers/kernel": tree | {"layers": {"kernel": jnp.zeros((3, 8, 5))}},
        "more": tree | {"more": jnp.zeros(2)},
        "half": {k: v for k, v in tree.items() if k != "half"},
    }
    for name, other in others.items():
        with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
            with pytest.raises(InputError) as raised:
                checkpoints.restore(1, other)
        said = str(raised.value)
        assert f"{tmp_path}/run/1: the checkpoint is of other settings (" in said
        assert name.rpartition("/")[2] in said and "delete" not in said and "\n" not in said


@pytest.mark.parametrize("steps", [(1,), (1, 2)])
def test_a_damaged_checkpoint_is_to_be_moved_and_what_follows_is_said(tree, tmp_path, steps):
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        for step in steps:
            checkpoints.save(step, tree)
    for path in (tmp_path / "run" / str(steps[-1])).rglob("d/*"):
        path.write_bytes(b"")
    with checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(InputError) as raised:
            checkpoints.restore(steps[-1], tree)
    said = str(raised.value)
    assert f"run/{steps[-1]}: the checkpoint is corrupt, or cannot be read (" in said
    assert said.endswith("the one of step 1" if len(steps) > 1 else "the beginning")
    assert "delete" not in said


FULL = """
import resource, sys
import numpy as np
from common_jax.errors import InputError
from common_jax.io.checkpoint import Checkpoints
small, big = ({"w": np.random.default_rng(0).normal(size=n)} for n in (10, 10**6))
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
try:
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, small)
        checkpoints.save(2, big)
        checkpoints.save(3, small)
except InputError as error:
    print(error)
with Checkpoints(sys.argv[1]) as checkpoints:
    print(checkpoints.latest(), np.array_equal(checkpoints.restore(1, small)["w"], small["w"]))
"""


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_kept(tmp_path):
    """The limit on a file's size stands for the disk."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "run")], capture_output=True, text=True
    )
    said, latest = done.stdout.splitlines()
    assert said == (
        f"{tmp_path}/run: checkpoints cannot be written: File too large; make room, or name "
        "another place; the newest whole one is kept, and --resume goes on from it"
    )
    assert latest == "1 True" and done.stderr == ""


def test_what_is_no_full_disk_is_not_called_one(tree, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("no such\n thing")

    with pytest.raises(InputError) as raised, checkpoint.Checkpoints(tmp_path / "run") as made:
        monkeypatch.setattr(made._manager, "save", fails)
        made.save(1, tree)
    assert str(raised.value) == (
        f"{tmp_path}/run: checkpoints cannot be written: no such thing; none is whole yet"
    )


def test_a_checkpoint_is_kept_only_where_one_is_whole(tree, tmp_path, monkeypatch):
    def fails(*_, **__):
        (tmp_path / "run" / "2.orbax-checkpoint-tmp").mkdir()
        raise ValueError("no such thing")

    for whole, line in (
        (False, "none is whole yet$"),
        (True, "the newest whole one is kept, and"),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with (
            pytest.raises(InputError, match=line),
            checkpoint.Checkpoints(tmp_path / "run") as one,
        ):
            if whole:
                one.save(1, tree)
                one._manager.wait_until_finished()
            monkeypatch.setattr(one._manager, "save", fails)
            one.save(2, tree)
