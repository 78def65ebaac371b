"""What a study is, and the one way to run one.

A study repeats an experiment of the paper, or a control that the paper lacks, on any pair. Its
module holds `Config`, the options, and `STUDY`, three functions:

    prepare(config) -> inputs                           reads and checks; loads no model
    measure(pair, tokenizer, config, inputs, journal)   everything that needs the models
        -> measured
    findings(config, inputs, measured) -> Findings      claims, tables and figures

`Study.run` does what all of them share: timing, the folder, its settings and its journal, loading
the pair, facts of the run, printing and writing.
"""

import contextlib
import dataclasses
import json
import pathlib
import shlex
import time
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import jax

from common_jax import resume
from common_jax.cli.options import SeedOption
from common_jax.cli.ranges import check_ranges
from common_jax.distributed import by_first, is_first
from common_jax.errors import InputError
from common_jax.io.files import read_json
from common_jax.journal import Journal, Sections
from common_jax.mesh import mesh_for
from common_jax.report.findings import Findings, print_tables, write
from common_jax.run import check_directory
from tuco_jax.core.checksum import weights_checksum
from tuco_jax.datasets.assets import fetch
from tuco_jax.datasets.prompt_sources import DATA
from tuco_jax.models.pair import Pair
from tuco_jax.scoring.fingerprint import run_fingerprint
from tuco_jax.weights.options import PairOptions, check_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
class StudyOptions(SeedOption, StudiedPairOptions):  # the last base's fields stand first
    """The options that every study has.

    Args:
        out: folder for results and report.
    """

    out: pathlib.Path

    def __post_init__(self) -> None:
        check_ranges(self)


JOURNAL = "journal"
_WEIGHTS = "weights (their checksum)"
Config = TypeVar("Config", bound=StudyOptions)
Inputs = TypeVar("Inputs")
Measured = TypeVar("Measured")


@dataclasses.dataclass(frozen=True)
class Study(Generic[Config, Inputs, Measured]):
    """One experiment.

    config: class of its options. prepare: reads files and checks options, and raises InputError;
    nothing is loaded or written before it returns. measure: scores on the loaded pair; whatever it
    calls that takes a journal gets this one (a part of it, for another pair), by which a run that
    was killed goes on, and loses the batch in flight. findings: the report; facts of the pair and
    the seed are added to its own. Where `prepare` gives nothing (empty inputs), no model is loaded
    and `findings` is given None as what was measured. free: options, beside out and mesh, that may
    change when the study is run again in its folder.
    """

    config: type[Config]
    prepare: Callable[[Config], Inputs]
    measure: Callable[[Pair, "PreTrainedTokenizerBase", Config, Inputs, Sections], Measured]
    findings: Callable[[Config, Inputs, Any], Findings]
    free: Collection[str] = ()

    @property
    def name(self) -> str:
        """As in `tuco-jax study NAME`: that of the module, with hyphens."""
        return self.config.__module__.rpartition(".")[2].replace("_", "-")

    def run(self, config: Config) -> Findings:
        """Prepare, load the pair, measure; print the tables and write the report.

        Raises InputError, before anything is read, for a folder that holds something else, another
        study or this one with other settings, or that another process is writing to.
        """
        started = time.perf_counter()
        self._check_folder(config)
        check_pair(config)
        inputs = self.prepare(config)
        with self._held(config):
            settings = self._settings(config)
            if not inputs:
                resume.settle(config.out, settings)
                return self._report(config, inputs, None, {}, started)
            pair, tokenizer, facts = load_studied_pair(config)
            weights = weights_checksum(pair)
            made = {"precision": pair.precision, _WEIGHTS: weights}
            resume.settle(config.out, settings | made)
            with Journal(config.out / JOURNAL) as journal:
                journal.begin(run_fingerprint(weights, pair.precision, []))
                measured = self.measure(pair, tokenizer, config, inputs, journal)
                found = self._report(config, inputs, measured, facts, started)
                journal.remove()
            return found

    def _report(
        self,
        config: Config,
        inputs: Inputs,
        measured: Measured | None,
        facts: dict[str, str],
        started: float,
    ) -> Findings:
        found = self.findings(config, inputs, measured)
        facts = {**facts, **found.facts, "seed": str(config.seed)}
        found = dataclasses.replace(found, facts=facts)
        print_tables(found)
        write(config.out, found, started, command(self.name, config))
        return found

    def _settings(self, config: Config) -> dict[str, Any]:
        """What must be the same in every run in one folder, but for what the pair says."""
        free = {"out", "mesh", "precision", *self.free}
        options = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
        return {"study": self.name, **options}

    def _check_folder(self, config: Config) -> None:
        check_directory(config.out, resume=True)
        by_first(lambda: _check_study(config.out))
        resume.check(config.out, self._settings(config))

    @contextlib.contextmanager
    def _held(self, config: Config) -> Iterator[None]:
        """Hold the folder; its settings do not stay where nothing was measured."""
        with resume.alone(config.out):
            try:
                yield
            finally:
                if is_first() and {p.name for p in config.out.iterdir()} <= {
                    resume.SETTINGS,
                    resume.LOCK,
                }:
                    (config.out / resume.SETTINGS).unlink(missing_ok=True)


def _check_study(folder: pathlib.Path) -> None:
    """InputError for a folder of anything but a study."""
    stored, mend = folder / resume.SETTINGS, "put it back, or name a new directory"
    if stored.exists():
        ours = "study" in read_json(stored, {}, mend)
    else:
        ours = not any(folder.glob("*"))
    if not ours:
        raise InputError(f"{folder}: holds something else; name a new directory")


def command(study: str, config: StudyOptions) -> str:
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


def load_studied_pair(
    options: StudiedPairOptions,
) -> tuple[Pair, "PreTrainedTokenizerBase", dict[str, str]]:
    """(pair, tokenizer, facts for the report).

    With a mesh the pair is placed on it, and what is computed from it runs there. Notes on how
    the two models differ are printed and kept in the facts.
    """
    from tuco_jax.weights.load import load_pair  # transformers: seconds

    mesh = mesh_for(dataclasses.asdict(options.mesh))
    base = options.base or str(next(fetch("smollm2").glob("*.gguf")))
    tuned = options.tuned or str(DATA / "smollm2-refusal")
    pair, tokenizer = load_pair(
        base,
        tuned,
        dtype=options.dtype,
        precision=options.precision,
        mesh=mesh,
        adapter=options.adapter,
    )
    facts = {
        "base": options.base or f"SmolLM2-135M-Instruct, Q4_1 GGUF, read as {options.dtype}",
        "tuned": options.tuned or "the same with a refusal adapter (LoRA), in the package",
        "weights": options.dtype,
        "precision": pair.precision,
        "device": jax.devices()[0].device_kind,
    }
    if options.adapter is not None:
        facts["adapter"] = options.adapter
    if mesh is not None:
        facts["mesh"] = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    if pair.notes:
        facts["notes on the pair"] = "; ".join(pair.notes)
        for note in pair.notes:
            print(f"note: {note}")
    return pair, tokenizer, facts
