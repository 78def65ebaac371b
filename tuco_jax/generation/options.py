"""How answers are generated; imports little, so that --help is quick."""

import dataclasses
from collections.abc import Sequence

from common_jax.cli.ranges import (
    AboveZeroToOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Seed,
    check_ranges,
)
from common_jax.errors import InputError
from tuco_jax.prompts.read import Prompt
from tuco_jax.weights.options import PairOptions

__all__ = ["AnswerOptions", "GenerationOptions", "check_turns"]


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
        continue_final: go on with an assistant's turn at a conversation's end; else an error.
        batch_size: prompts that are answered at once, sorted by length; rows and not tokens, since
            rows grow, and a new token costs a reading of all weights however many rows share it.
    """

    max_new_tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.0
    top_k: NonNegativeInt = 0
    top_p: AboveZeroToOne = 1.0
    seed: Seed = 0
    stop: Sequence[str] = ()
    continue_final: bool = False
    batch_size: PositiveInt = 32

    def __post_init__(self) -> None:
        check_ranges(self)
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


def check_turns(prompts: Sequence[Prompt], continue_final: bool) -> None:
    """Raise InputError for a conversation that ends with an answer, if it is not to go on."""
    for p in prompts:
        if p.messages and p.messages[-1]["role"] == "assistant" and not continue_final:
            raise InputError(
                f"{p}: ends with an assistant's turn: go on with it by --continue_final, or "
                "remove that turn"
            )
