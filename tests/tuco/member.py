"""What one of several processes does beyond commands: functions of the package itself."""

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from common_jax import mesh as mesh_module
from common_jax.cli.options import MeshOptions
from common_jax.distributed import by_first, is_first, meet
from common_jax.errors import InputError
from common_jax.journal import Journal
from common_jax.mesh import fetch, make_mesh, mesh_for
from common_jax.run import check_directory, check_run
from tests.tuco import random_models as rm
from tuco_jax.attacks import gcg
from tuco_jax.core.decompose import decompose
from tuco_jax.models.sharding import place, placement, put_rows
from tuco_jax.scoring.options import ScoreFileOptions
from tuco_jax.scoring.output import Entry, check_made, meta_path
from tuco_jax.scoring.score_file import score_file
from tuco_jax.studies import conjugate
from tuco_jax.weights import int8, precision
from tuco_jax.weights.load import load_model, load_pair


def decomposed(path: str, sizes: str) -> None:
    """Decompositions of a mixture of experts and of a dense pair, in one file."""
    mesh = mesh_for({axis: int(n) for axis, n in zip(("data", "fsdp"), sizes, strict=True)})
    dense = rm.config(width=32, heads=4, kv_heads=2, head_dim=8, mlp_width=48)
    sparse = dataclasses.replace(dense, mlp_bias=False, experts=4, experts_used=2)
    found = {}
    for name, config in (("dense", dense), ("sparse", sparse)):
        pair = rm.full_pair(base=config)
        if mesh is not None:
            pair = place(pair, mesh)
        tokens, mask = put_rows(rm.batch(rows=4), mesh)
        out = fetch(decompose(pair, tokens, mask, 0.7, layers=True, logits=True, mesh=mesh))
        real = np.asarray(rm.batch(rows=4)[1])
        found |= {f"{name} {k}": getattr(out, k)[..., real, :] for k in ("ptc", "ftc", "logits")}
    if is_first():
        np.savez(path, **found)


def rounded(model: str, folder: str) -> None:
    """Load a model as int8, over fsdp; note how many of its matrices' numbers are rounded here."""
    mesh, sizes, own = make_mesh(fsdp=-1), [], int8.rounded

    def counted(matrix: Any) -> Any:
        sizes.append(matrix.size)
        return own(matrix)

    with mock.patch.object(int8, "rounded", counted):
        params: Any = load_model(model, dtype="int8", placement=placement(mesh)).params
    with mock.patch.object(mesh_module, "_AT_ONCE", 1 << 10):  # no array at once
        found: Any = flatten_dict(fetch(params), sep="/")
    wanted: Any = flatten_dict(load_model(model, dtype="int8").params, sep="/")
    same = all(np.array_equal(found[path], x) for path, x in wanted.items())
    numbers = sum(x.size for path, x in wanted.items() if int8.holds(path))
    path = pathlib.Path(folder) / f"rounded {jax.process_index()}"
    path.write_text(json.dumps({"same": same, "rounded": sum(sizes), "numbers": numbers}))


def edited(base: str, adapter: str) -> None:
    """What DoRA makes of matrices whose parts lie with several processes is what one makes."""
    for dtype in ("float32", "int8"):
        given: Any = {"dtype": dtype, "precision": "float32"}
        pairs = [load_pair(base, adapter, mesh=m, **given)[0] for m in (make_mesh(fsdp=-1), None)]
        found, wanted = (jax.tree.leaves(fetch(pair.tuned)) for pair in pairs)
        assert len(found) == len(wanted) >= 7
        for x, one, want in zip(jax.tree.leaves(pairs[0].tuned), found, wanted, strict=True):
            np.testing.assert_array_equal(one, want)
            assert x.ndim == 2 or not x.is_fully_replicated


def refused(base: str, tuned: str, other: str, folder: str, sizes: str) -> None:
    """Of prompts and weights that are not the same in all, whatever their files are called."""
    place, last = pathlib.Path(folder), jax.process_index() == jax.process_count() - 1
    same, own = (place / f"{name} {jax.process_index()}.jsonl" for name in ("same", "own"))
    for path, text in (same, "abcd"), (own, "abce" if last else "abcd"):
        path.write_text(4 * f"{json.dumps({'prompt': text})}\n", "utf-8")
    mesh = MeshOptions(*map(int, sizes))
    for prompts, tunes, what in (
        (own, tuned, "prompts"),
        (same, other if last else tuned, "fingerprint"),
    ):
        out = place / f"{what}.jsonl"
        options = ScoreFileOptions(
            base=base, tuned=tunes, prompts=str(prompts), out=str(out), mesh=mesh
        )
        said = f"^process [123] was started with {what} .*, process 0 with {what} .*: give all the"
        with pytest.raises(InputError, match=said):
            score_file(options, progress=False)
        meet()  # process 0 has taken its journal away
        assert not list(place.glob(f"*{out.name}*"))


def where_parts_pay() -> None:
    """Three parts are what all processes take, or none does."""
    stored = {"base": frozenset({"bfloat16"})}
    for slow in (None, 0, jax.process_count() - 1):

        def pays(_: bool, __: Any, slow: int | None = slow) -> bool:
            return jax.process_index() != slow

        with mock.patch.object(precision, "_three_parts_pay", pays):
            wanted = precision.Wanted("float32", "auto")
            assert wanted.settled(stored) == ("bfloat16x3" if slow is None else "float32")
            assert wanted.held == ("as published" if slow is None else "float32")


def behind(folder: str) -> None:
    """Who sees less of a journal than process 0 refuses to go on, and says why."""
    path, late = pathlib.Path(folder) / "seen.jsonl.journal", not is_first()
    read = functools.partial(Entry.read, shape=(2, 1))
    for found in ([], [[0], [1]]):
        with Journal(path) as journal:
            journal.begin("key")
            section = journal.section("scores", "of two", read)
            assert [entry.rows for entry in section.entries] == found
            for i in () if found else (0, 1):
                section.append(Entry([i], np.zeros(1), np.zeros((1, 1)), np.zeros(1)))
        meet()
    opened, shown = pathlib.Path.open, path.read_bytes()[:-9]

    def seen(own: pathlib.Path, *args: Any, **how: Any) -> Any:
        return io.BytesIO(shown) if late and own == path else opened(own, *args, **how)

    said = "seen.jsonl.journal: is shorter here than for process 0: the file system shows it late"
    refuses: Any = pytest.raises(InputError, match=said) if late else contextlib.nullcontext()
    with mock.patch.object(pathlib.Path, "open", seen), Journal(path) as journal, refuses:
        journal.begin("key")
        journal.section("scores", "of two", read)
    by_first(path.unlink)


def old_news(folder: str) -> None:
    """Of a disk that others see late all take what process 0 sees there."""
    place, late = pathlib.Path(folder), not is_first()
    out, search, run = (place / name for name in ("seen.jsonl", "seen.json", "seen"))
    state = {f.name: 0 for f in dataclasses.fields(gcg._State)}
    lists = ("tokens", "losses", "prompts", "best", "best_rank")
    state |= dict.fromkeys(lists, [1, 2]) | {"step": 7}
    if is_first():
        out.write_text("{}")
        meta_path(out).write_text(json.dumps({"settings": {"norm": 1}}))
        search.write_text(json.dumps(state))
        run.mkdir()
        (run / "settings.json").write_text(json.dumps({"study": "conjugate", "seed": 1}))
        (run / "metrics.jsonl").touch()
    meet()

    def seen(path: pathlib.Path, *, look: Any, **how: bool) -> bool:
        hidden = path in (out, search) or path.is_relative_to(run)
        return look(path, **how) and not (late and hidden)

    with contextlib.ExitStack() as patches:
        for name in ("exists", "is_dir", "is_file"):
            look = functools.partialmethod(seen, look=getattr(pathlib.Path, name))
            patches.enter_context(mock.patch.object(pathlib.Path, name, look))
        with pytest.raises(InputError, match="holds the results of .* norm 1, not 2"):
            check_made(out, {"norm": 2})
        found = gcg._read_state(search)
        with pytest.raises(InputError, match="seen: holds a run already; go on with it by --res"):
            check_directory(run)
        with pytest.raises(InputError, match="seen: the run there has seed 1, not 0"):
            conjugate.STUDY._check_folder(conjugate.Config(out=run))
        with pytest.raises(InputError, match="seen: holds a training run; name another directory"):
            check_run(run, "steer", {})
    assert found is not None and found.step == 7
