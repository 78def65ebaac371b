"""The pair that a study is about: any two models, or by default the shipped adapter's."""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from typing import Any, Literal

import jax

from common_jax.cli.options import MeshOptions, check_seed
from common_jax.mesh import mesh_for
from tuco_jax.datasets.assets import fetch
from tuco_jax.datasets.prompt_sources import DATA
from tuco_jax.models.pair import Pair

__all__ = ["Studied", "command", "load_studied"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Studied:
    """What the options of every study begin with.

    Args:
        base: the base model; empty for SmolLM2-135M-Instruct.
        tuned: the tuned model or adapter; empty for the refusal adapter in the package.
        dtype: of the weights; sums are float32.
        mesh: devices.
        seed: of all that is drawn: which prompts, samples, folds, strings, the bootstrap.
    """

    base: str = ""
    tuned: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)


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


def load_studied(options: Studied) -> tuple[Pair, Any, dict[str, str]]:
    """(pair, tokenizer, facts for the report).

    With a mesh the pair lies there, and what is computed of it runs there. Notes on how the
    halves differ are printed and kept in the facts.
    """
    from tuco_jax.weights.load import load_pair  # transformers: seconds

    mesh = mesh_for(dataclasses.asdict(options.mesh))
    smollm2 = options.base or str(next(fetch("smollm2").glob("*.gguf")))
    tuned = options.tuned or str(DATA / "smollm2-refusal")
    pair, tokenizer = load_pair(smollm2, tuned, dtype=options.dtype, mesh=mesh)
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
