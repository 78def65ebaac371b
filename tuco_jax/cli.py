"""The command line `tuco-jax COMMAND`: its commands and their options."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from common_jax.cli.command_line import Command, Group, one_line, run
from common_jax.cli.options import MeshOptions

__all__ = ["COMMANDS", "GenerateOptions", "ImportOptions", "ScoreOptions", "main"]

_STARTED = time.perf_counter()
_ABOUT = "What did fine-tuning change? TuCo of a language model, prompt by prompt."


@dataclasses.dataclass
class ScoreOptions:
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


@dataclasses.dataclass
class GenerateOptions:
    """Answer prompts with tuning's contribution scaled by alpha.

    Args:
        base: the pre-trained model: a Hugging Face directory, a hub id, a .gguf file or a store.
        tuned: the tuned model, likewise; or the directory of a PEFT adapter over the base.
        prompt: a text. Or prompts, a file.
        prompts: .jsonl, .csv, .parquet or .txt; rows have prompt or messages, may have id, label.
        chat: give texts to the chat template as a user's message.
        alpha: scale of tuning's contribution: 1 is the tuned model, 0 the base's blocks.
        max_new_tokens: the most tokens of an answer.
        temperature: 0 takes the most likely token.
        top_k: sample among the top_k likeliest tokens; 0 is all.
        top_p: of those, among the fewest whose probabilities reach top_p.
        seed: of the samples.
        stop: texts at which an answer ends, as a list; they are left out.
        tuco: print each token beside its TuCo, a line a token.
        out: .jsonl to write the answers to.
        page: .html to show the answers in, each token shaded by its TuCo.
        dtype: what weights are held in; sums are float32.
        mesh: devices along each axis; prompts are split over data and fsdp.
    """

    base: str
    tuned: str
    prompt: str = ""  # not None: of an optional text "# 1" or "null" would be read as YAML
    prompts: str | None = None
    chat: bool = False
    alpha: float = 1.0
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: list[str] = dataclasses.field(default_factory=list)
    tuco: bool = False
    out: str | None = None
    page: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


@dataclasses.dataclass
class ImportOptions:
    """Write a model, or a pair, into a store.

    Args:
        model: a Hugging Face directory, a hub id or a .gguf file.
        out: folder of the store; it must not exist yet.
        tuned: also keep what tuning made of it (or a PEFT adapter over it): the store is a pair.
        dtype: what weights are written in.
        mesh: devices to read onto; the store restores onto any others.
    """

    model: str
    out: str
    tuned: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


def _finetune() -> tuple[type, Callable[[Any], Any]]:
    from tuco_jax.finetune.finetune import FinetuneConfig, run_finetune

    return FinetuneConfig, run_finetune


def _demo() -> tuple[type, Callable[[Any], Any]]:
    from tuco_jax.studies.demo import DemoConfig, run_demo

    return DemoConfig, run_demo


def _studies() -> Mapping[str, Command]:
    from tuco_jax.studies.catalog import STUDIES

    return STUDIES


def _score(options: ScoreOptions) -> None:
    from tuco_jax.scoring.score_file import score_file

    meta = score_file(**_shallow(options), started=_STARTED)
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in meta["seconds"].items())
    resumed = f" ({meta['resumed_rows']} from the journal)" if meta["resumed_rows"] else ""
    for note in meta["notes"]:
        print(f"note: {one_line(note)}")
    print(f"{meta['rows']} prompts{resumed}, {meta['tokens']} tokens: {options.out}")
    print(f"mean TuCo {meta['mean_tuco']:.4f}, telescoping error {meta['telescoping_error']:.1e}")
    print(f"seconds: {seconds}")


def _generate(options: GenerateOptions) -> None:
    from tuco_jax.generation.generate_file import generate_file, lines

    given = _shallow(options)
    given["prompt"] = options.prompt or None
    answers = generate_file(**given)
    for answer in answers:
        print("\n".join(lines(answer, names=not options.prompt)))
    for path in (options.out, options.page):
        if path is not None:
            print(f"{len(answers)} answers: {path}")


def _import(options: ImportOptions) -> None:
    from common_jax.mesh import mesh_for
    from tuco_jax.models.sharding import placement
    from tuco_jax.weights import load
    from tuco_jax.weights.orbax import store

    store.check_target(options.out)
    mesh = mesh_for(dataclasses.asdict(options.mesh))
    if options.tuned is None:
        where = placement(mesh) if mesh else None
        model = load.load_model(options.model, dtype=options.dtype, placement=where)
        store.save(options.out, model)
    else:
        pair, tokenizer = load.load_pair(
            options.model, options.tuned, dtype=options.dtype, mesh=mesh
        )
        for note in pair.notes:
            print(f"note: {one_line(note)}")
        store.save_pair(options.out, pair, tokenizer)
    print(f"stored in {options.out}")


def _shallow(options: Any) -> dict[str, Any]:
    """A dataclass as keyword arguments; nested ones become dicts."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)} | {
        f.name: dataclasses.asdict(getattr(options, f.name))
        for f in dataclasses.fields(options)
        if dataclasses.is_dataclass(getattr(options, f.name))
    }


COMMANDS = {
    "score": Command(
        "score a file of prompts: how much does tuning contribute to each answer?",
        lambda: (ScoreOptions, _score),
    ),
    "generate": Command(
        "answer prompts with tuning's contribution scaled, each token beside its TuCo",
        lambda: (GenerateOptions, _generate),
    ),
    "import": Command(
        "write a model, or a base and its adapter, into a store that loads fast",
        lambda: (ImportOptions, _import),
    ),
    "finetune": Command(
        "make a tuned model, LoRA or full, and watch TuCo while it trains", _finetune
    ),
    "demo": Command("score a real pair on five kinds of prompts and write an HTML report", _demo),
    "study": Group("repeat an experiment of the paper on any pair", _studies),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    return run("tuco-jax", _ABOUT, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
