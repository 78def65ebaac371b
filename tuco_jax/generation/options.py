"""How answers are generated; imports little, so that --help is quick."""

import dataclasses
from collections.abc import Sequence

from common_jax.cli.options import check_seed
from common_jax.errors import InputError
from tuco_jax.weights.options import PairOptions

__all__ = ["AnswerOptions", "GenerationOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How answers are chosen, and where they end.

    Args:
        max_new_tokens: the most tokens of an answer; fewer where the model's context ends.
        temperature: 0 takes the most likely token.
        top_k: sample among the top_k likeliest tokens; 0 is all.
        top_p: of those, sample among the fewest whose probabilities sum to top_p.
        seed: of the samples; a prompt's sample depends on it and on the prompt's number alone.
        stop: texts at which an answer ends, as a list; they are left out.
        batch_size: prompts that are answered at once, sorted by length.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give a positive number")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(
                f"temperature is {self.temperature}: give 0 (greedy) or a positive number"
            )
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}: give 0 (all tokens) or a positive number")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: give a number above 0 and at most 1")
        check_seed(self.seed)
        if "" in self.stops:
            raise InputError("stop holds an empty text: remove it")

    @property
    def stops(self) -> list[str]:
        """The stop texts, as a list, also where `stop` is a single text."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerOptions(GenerationOptions, PairOptions):
    """Answer prompts with tuning's contribution scaled by alpha.

    Args:
        prompt: a text. Or prompts, a file.
        prompts: .jsonl, .csv, .parquet or .txt; rows have prompt or messages, may have id, label.
        chat: give texts to the chat template as a user's message.
        alpha: scale of tuning's contribution: 1 is the tuned model, 0 the base's blocks.
        tuco: print each token beside its TuCo, a line a token.
        out: .jsonl to write the answers to. Metadata goes to OUT.meta.json.
        page: .html to show the answers in, each token shaded by its TuCo.
    """

    prompt: str = ""  # not None: of an optional text "# 1" or "null" would be read as YAML
    prompts: str | None = None
    chat: bool = False
    alpha: float = 1.0
    tuco: bool = False
    out: str | None = None
    page: str | None = None
