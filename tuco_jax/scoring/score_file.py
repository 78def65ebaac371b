"""Score a file of prompts and write a table of scores; `tuco-jax score` runs this.

Input is checked before any work: output, prompts, then the pair, then each prompt's length. The
table appears whole at the end; from a journal beside it a killed run is resumed.
"""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from common_jax.errors import InputError
from common_jax.io.files import check_writable, write_json
from common_jax.journal import Journal
from tuco_jax.prompts.read import Prompt, read_prompts
from tuco_jax.scoring.options import ScoreFileOptions
from tuco_jax.scoring.output import (
    FORMATS,
    Columns,
    check_made,
    meta_path,
    prompts_checksum,
    write_table,
)
from tuco_jax.weights.options import check_pair

if TYPE_CHECKING:
    from tuco_jax.core.streamed import Streamed
    from tuco_jax.models.pair import Pair
    from tuco_jax.scoring.score import Scores

__all__ = ["provenance", "score_file"]

PACKAGES = ("tuco-reward-jax", "jax", "jaxlib", "flax", "transformers", "tokenizers", "numpy")


def score_file(
    options: ScoreFileOptions, *, progress: bool = True, started: float | None = None
) -> dict[str, Any]:
    """Score every prompt of a file and write a row for each, in order: id, tuco, preco, tokens.

    progress: show a progress bar where stderr is a terminal. started: `time.perf_counter()` at the
    program's start, for the time breakdown.

    Returns the metadata. Raises InputError, before anything is written, for whatever is wrong
    with the input, and where `out`, or its journal, is of other prompts, models or options; where
    a score is not finite, `out` is left as it was.
    """
    begin = time.perf_counter()
    seconds: dict[str, float] = {} if started is None else {"imports": begin - started}
    path = check_writable(options.out, FORMATS)
    beside = meta_path(path)
    if beside.is_dir():
        raise InputError(f"{beside}: is a folder, where the metadata would go; move it")
    with _timed(seconds, "prompts"):
        rows = read_prompts(options.prompts)
    if path.exists() and path.samefile(options.prompts):
        raise InputError(f"{options.out}: is the prompts file itself; name another output")
    check_pair(options)
    settings = _settings(options, rows)
    check_made(path, settings)
    # All layers' scores stand in the journal, whether or not they are asked for.
    common = {name: value for name, value in settings.items() if name != "layers"}
    unfinished = path.with_name(path.name + ".journal")
    with Journal(unfinished, common):  # if it is another run's, that is told now
        pass
    _import(seconds)
    with Journal(unfinished, common) as journal:
        began = begin if started is None else started
        meta, columns = _score(options, rows, journal, seconds, progress, began)
        made = {name: meta[name] for name in ("precision", "fingerprint")}
        write_json(beside, meta | {"settings": settings | made})
        write_table(path, columns)
        journal.remove()
    return meta


def _import(seconds: dict[str, float]) -> None:
    """Import what loads models: seconds, in which prompts would wait to be checked."""
    with _timed(seconds, "imports"):
        import tuco_jax.core.streamed
        import tuco_jax.scoring.fingerprint
        import tuco_jax.scoring.score
        import tuco_jax.weights.load  # noqa: F401


def _settings(options: ScoreFileOptions, rows: Sequence[Prompt]) -> dict[str, Any]:
    """What rows of the output depend on, but for weights: these have a fingerprint."""
    names = ("dtype", "norm", "truncate", "continue_final", "layers")
    return {"prompts": prompts_checksum(rows)} | {name: getattr(options, name) for name in names}


def _score(
    options: ScoreFileOptions,
    rows: Sequence[Prompt],
    journal: Journal,
    seconds: dict[str, float],
    progress: bool,
    began: float,
) -> tuple[dict[str, Any], Columns]:
    """The metadata and the table's columns. began: when the program did."""
    from common_jax.mesh import make_mesh, mesh_for
    from tuco_jax.core.budget import default_budget
    from tuco_jax.core.streamed import stream_pair
    from tuco_jax.prompts.encode import encode
    from tuco_jax.scoring.fingerprint import scores_fingerprint
    from tuco_jax.scoring.score import closed_turns, score_tokens
    from tuco_jax.weights.load import load_pair

    mesh = mesh_for(dataclasses.asdict(options.mesh))
    if options.parallel == "pmap" and mesh is None:  # else it would take all devices
        mesh = make_mesh()
    if options.token_budget is None:
        options = dataclasses.replace(options, token_budget=default_budget())
    if options.passes.folder is None:
        folder = str(pathlib.Path(options.out).absolute().parent)
        passes = dataclasses.replace(options.passes, folder=folder)
        options = dataclasses.replace(options, passes=passes)
    options.check(mesh, options.stream)

    with _timed(seconds, "load"):
        names = options.base, options.tuned
        how: Any = {n: getattr(options, n) for n in ("dtype", "precision", "adapter")}
        source: Pair | Streamed
        if options.stream:
            source, tokenizer = stream_pair(*names, **how)
            pair = source.ends
        else:
            source, tokenizer = load_pair(*names, mesh=mesh, **how)
            pair = source
    notes: list[str] = [] if options.continue_final else closed_turns(rows)
    with _timed(seconds, "tokenize"):
        tokens = encode(
            tokenizer,
            rows,
            max_tokens=None if options.truncate else pair.context,
            vocab_size=pair.tuned_config.vocab_size,
            truncate=False,  # cut below, where the whole length is still known
            continue_final=options.continue_final,
            notes=notes,
        )
        cut = [p.id for p, t in zip(rows, tokens, strict=True) if t.size > pair.context]
        tokens = [t[-pair.context :] for t in tokens]
    with _timed(seconds, "fingerprint"):
        key = scores_fingerprint(source, tokens, options.norm)
    check_made(pathlib.Path(options.out), {"precision": pair.precision, "fingerprint": key})
    journal.begin(key)

    before = time.perf_counter()
    scores = score_tokens(
        source, tokens, rows, mesh=mesh, progress=progress, journal=journal, **options.scoring
    )
    seconds |= scores.seconds
    if scores.seconds["first"]:
        seconds["first"] += before - began
    seconds["total"] = time.perf_counter() - began
    meta = _metadata(pair, scores, seconds, cut)
    for name in ("base", "tuned", "adapter", "prompts", "dtype", "norm", "parallel"):
        meta[name] = getattr(options, name)
    meta["precision"] = pair.precision
    meta["token_budget"] = options.token_budget
    meta["mesh"] = dict(mesh.shape) if mesh is not None else None
    meta["stream"] = dataclasses.asdict(options.passes) if options.stream else None
    meta["notes"] += notes
    meta["fingerprint"] = key
    return meta, _columns(rows, scores, options.layers)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _columns(prompts: Sequence[Prompt], scores: "Scores", layers: bool) -> Columns:
    columns: dict[str, Sequence[Any] | np.ndarray] = {
        "id": scores.ids,
        "tuco": scores.tuco,
        "preco": scores.preco,
        "tokens": scores.tokens,
    }
    if any(p.label is not None for p in prompts):
        columns["label"] = [p.label for p in prompts]
    if layers:
        columns["layers"] = scores.layers
    return columns


def provenance() -> dict[str, Any]:
    """The devices and versions of this process, for the metadata of outputs."""
    import jax

    devices = jax.devices()
    return {
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _metadata(
    pair: "Pair", scores: "Scores", seconds: Mapping[str, float], cut: Sequence[str | int]
) -> dict[str, Any]:
    computed = scores.seconds["run"] > 0 and scores.resumed < len(scores.ids)
    return {
        "rows": len(scores.ids),
        "tokens": int(scores.tokens.sum()),
        "resumed_rows": scores.resumed,
        "truncated_ids": list(cut),
        "mean_tuco": float(scores.tuco.mean(dtype=np.float64)),
        "telescoping_error": float(scores.telescoping.max()),
        "notes": list(pair.notes),
        "family": pair.tuned_config.family,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "tokens_per_second": round(int(scores.tokens.sum()) / scores.seconds["run"], 1)
        if computed and not scores.resumed
        else None,
        "padding": round(scores.padding, 4),
        "shared": round(scores.shared, 4),
        "shapes": [list(shape) for shape in scores.shapes],
    } | provenance()
