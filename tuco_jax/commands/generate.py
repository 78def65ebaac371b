"""`tuco-jax generate`: answers under FTC_alpha, each token beside its TuCo."""

import dataclasses
from typing import Literal

from common_jax.cli.options import MeshOptions

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True)
class Config:
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


def run(config: Config) -> None:
    """Generate, and print the answers; files are named after them."""
    from tuco_jax.generation.generate_file import generate_file, lines

    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    given |= {"prompt": config.prompt or None, "mesh": dataclasses.asdict(config.mesh)}
    answers = generate_file(**given)
    for answer in answers:
        print("\n".join(lines(answer, names=not config.prompt)))
    for path in (config.out, config.page):
        if path is not None:
            print(f"{len(answers)} answers: {path}")
