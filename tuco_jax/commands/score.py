"""`tuco-jax score`: the TuCo of every prompt in a file."""

import dataclasses
import time
from typing import Literal

from common_jax.cli.command_line import one_line
from common_jax.cli.options import MeshOptions

__all__ = ["Config", "run"]

_STARTED = time.perf_counter()  # the program's, but for reading the command line


@dataclasses.dataclass(frozen=True)
class Config:
    """Score a file of prompts.

    Args:
        base: the pre-trained model: a Hugging Face directory, a hub id, a .gguf file or a store.
        tuned: the tuned model, likewise; or the directory of a PEFT adapter over the base.
        prompts: .jsonl, .csv, .parquet or .txt; rows have prompt or messages, may have id, label.
        out: .jsonl, .csv or .parquet: id, tuco, preco, tokens. Metadata goes to OUT.meta.json.
        dtype: what weights are held in; sums are float32.
        norm: 1, the paper's, or 2.
        layers: also write the last token's beta_1 .. beta_L.
        truncate: keep the last tokens of prompts beyond the model's context; else an error.
        token_budget: tokens of a batch, padding included; by default what suits the backend.
        mesh: devices.
        parallel: jit over the mesh, or pmap over its data axis.
    """

    base: str
    tuned: str
    prompts: str
    out: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    norm: Literal[1, 2] = 1
    layers: bool = False
    truncate: bool = False
    token_budget: int | None = None
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    parallel: Literal["jit", "pmap"] = "jit"


def run(config: Config) -> None:
    """Score, write the table, and say what was written and how long it took."""
    from tuco_jax.scoring.score_file import score_file

    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    given["mesh"] = dataclasses.asdict(config.mesh)
    meta = score_file(**given, started=_STARTED)
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in meta["seconds"].items())
    resumed = f" ({meta['resumed_rows']} from the journal)" if meta["resumed_rows"] else ""
    for note in meta["notes"]:
        print(f"note: {one_line(note)}")
    print(f"{meta['rows']} prompts{resumed}, {meta['tokens']} tokens: {config.out}")
    print(f"mean TuCo {meta['mean_tuco']:.4f}, telescoping error {meta['telescoping_error']:.1e}")
    print(f"seconds: {seconds}")
