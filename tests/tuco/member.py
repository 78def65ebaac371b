"""What one of several processes does beyond commands: functions of the package itself."""

import dataclasses
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
from common_jax.distributed import is_first, meet
from common_jax.errors import InputError
from common_jax.mesh import fetch, make_mesh, mesh_for
from tests.tuco import random_models as rm
from tuco_jax.attacks import gcg
from tuco_jax.core.decompose import decompose
from tuco_jax.models.sharding import place, placement, put_rows
from tuco_jax.scoring.options import ScoreFileOptions
from tuco_jax.scoring.output import check_made, meta_path
from tuco_jax.scoring.score_file import score_file
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

        def pays(_: Any, slow: int | None = slow) -> bool:
            return jax.process_index() != slow

        with mock.patch.object(precision, "_three_parts_pay", pays):
            wanted = precision.Wanted("float32", "auto")
            assert wanted.settled(stored) == ("bfloat16x3" if slow is None else "float32")
            assert wanted.held == ("as published" if slow is None else "float32")


def old_news(folder: str) -> None:
    """Of a disk that others see late all take what process 0 sees there."""
    place, late = pathlib.Path(folder), not is_first()
    out, search = place / "seen.jsonl", place / "seen.json"
    state = {f.name: 0 for f in dataclasses.fields(gcg._State)}
    lists = ("tokens", "losses", "prompts", "best", "best_rank")
    state |= dict.fromkeys(lists, [1, 2]) | {"step": 7}
    if is_first():
        out.write_text("{}")
        meta_path(out).write_text(json.dumps({"settings": {"norm": 1}}))
        search.write_text(json.dumps(state))
    meet()
    exists = pathlib.Path.exists

    def seen(path: pathlib.Path, **how: bool) -> bool:
        return exists(path, **how) and not (late and path in (out, search))

    with mock.patch.object(pathlib.Path, "exists", seen):
        with pytest.raises(InputError, match="holds the results of .* norm 1, not 2"):
            check_made(out, {"norm": 2})
        found = gcg._read_state(search)
    assert found is not None and found.step == 7
