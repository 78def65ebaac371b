"""What a study is, and the one way to run one.

A study repeats an experiment of the paper, or a control that the paper lacks, on any pair. Its
module holds `Config`, the options, and `STUDY`, three functions:

    prepare(config) -> inputs                               reads and checks; loads no model
    measure(pair, tokenizer, config, inputs) -> measured    everything that needs the models
    findings(config, inputs, measured) -> Findings          claims, tables and figures

`Study.run` does what all of them share: timing, the folder, loading the pair, facts of the run,
printing and writing.
"""

import dataclasses
import json
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import jax

from common_jax import resume
from common_jax.cli.ranges import Seed, check_ranges
from common_jax.mesh import mesh_for
from common_jax.report.findings import Findings, print_tables, write
from tuco_jax.datasets.assets import fetch
from tuco_jax.datasets.prompt_sources import DATA
from tuco_jax.models.pair import Pair
from tuco_jax.weights.options import PairOptions

__all__ = ["StudiedPairOptions", "Study", "StudyOptions", "command", "load_studied_pair"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudiedPairOptions(PairOptions):
    """Which pair is studied: any two models, or by default the one with the shipped adapter.

    Args:
        base: the base model; empty for SmolLM2-135M-Instruct.
        tuned: the tuned model or adapter; empty for the refusal adapter in the package.
    """

    base: str = ""
    tuned: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyOptions(StudiedPairOptions):
    """The options that every study has.

    Args:
        out: folder for results and report.
        seed: of every random choice: prompts, samples, folds, strings, the bootstrap.
    """

    out: pathlib.Path
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_ranges(self)


Config = TypeVar("Config", bound=StudyOptions)
Inputs = TypeVar("Inputs")
Measured = TypeVar("Measured")


@dataclasses.dataclass(frozen=True)
class Study(Generic[Config, Inputs, Measured]):
    """One experiment.

    config: class of its options. prepare: reads files and checks options, and raises InputError;
    nothing is loaded or written before it returns. measure: scores on the loaded pair; it may keep
    files in config.out from which a run that was killed goes on. findings: the report; facts of
    the pair and the seed are added to its own. Where `prepare` gives nothing (empty inputs), no
    model is loaded and `findings` is given None as what was measured.
    """

    config: type[Config]
    prepare: Callable[[Config], Inputs]
    measure: Callable[[Pair, Any, Config, Inputs], Measured]
    findings: Callable[[Config, Inputs, Any], Findings]

    @property
    def name(self) -> str:
        """As in `tuco-jax study NAME`: that of the module, with hyphens."""
        return self.config.__module__.rpartition(".")[2].replace("_", "-")

    def run(self, config: Config) -> Findings:
        """Prepare, load the pair, measure; print the tables and write the report."""
        started = time.perf_counter()
        inputs = self.prepare(config)
        with resume.alone(config.out):
            measured, facts = None, {}
            if inputs:
                pair, tokenizer, facts = load_studied_pair(config)
                measured = self.measure(pair, tokenizer, config, inputs)
            found = self.findings(config, inputs, measured)
            facts = {**facts, **found.facts, "seed": str(config.seed)}
            found = dataclasses.replace(found, facts=facts)
            print_tables(found)
            write(config.out, found, started, command(self.name, config))
        return found


def command(study: str, config: Any) -> str:
    """The command line that repeats a run: every option that is not at its default, but `out`."""
    return shlex.join(["tuco-jax", "study", study, *_options(config)])


def _options(config: Any, group: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{group}{field.name}.")
        elif field.name != "out" and value != field.default:
            text = json.dumps(value) if isinstance(value, tuple | list) else str(value)
            yield from (f"--{group}{field.name}", text)


def load_studied_pair(options: StudiedPairOptions) -> tuple[Pair, Any, dict[str, str]]:
    """(pair, tokenizer, facts for the report).

    With a mesh the pair is placed on it, and what is computed from it runs there. Notes on how
    the two models differ are printed and kept in the facts.
    """
    from tuco_jax.weights.load import load_pair  # transformers: seconds

    mesh = mesh_for(dataclasses.asdict(options.mesh))
    base = options.base or str(next(fetch("smollm2").glob("*.gguf")))
    tuned = options.tuned or str(DATA / "smollm2-refusal")
    pair, tokenizer = load_pair(base, tuned, dtype=options.dtype, mesh=mesh)
    facts = {
        "base": options.base or f"SmolLM2-135M-Instruct, Q4_1 GGUF, read as {options.dtype}",
        "tuned": options.tuned or "the same with a refusal adapter (LoRA), in the package",
        "weights": options.dtype,
        "device": jax.devices()[0].device_kind,
    }
    if mesh is not None:
        facts["mesh"] = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    if pair.notes:
        facts["notes on the pair"] = "; ".join(pair.notes)
        for note in pair.notes:
            print(f"note: {note}")
    return pair, tokenizer, facts
