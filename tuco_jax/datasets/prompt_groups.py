"""Five kinds of prompts, and the contrasts between them: what the demo and `floors` measure on."""

import dataclasses

import numpy as np

from common_jax.errors import InputError
from tuco_jax.datasets import prompt_sources as sources
from tuco_jax.datasets.refusal_data import SplitOptions, harmful_split, held_out_harmless
from tuco_jax.prompts.read import Prompt

__all__ = ["CONTRASTS", "PromptGroup", "prompt_groups"]


@dataclasses.dataclass(frozen=True)
class PromptGroup:
    """Prompts of one kind.

    chat: each text is a user's turn, else plain text. clusters: the template that each prompt is
    in, or None where there are no templates.
    """

    name: str
    about: str
    texts: list[str]
    chat: bool
    clusters: list[str] | None = None

    def prompts(self) -> list[Prompt]:
        """In the form that they are scored in: a user's turn, or plain text."""
        return [
            Prompt(f"{self.name} {i}", None, ({"role": "user", "content": text},))
            if self.chat
            else Prompt(f"{self.name} {i}", text)
            for i, text in enumerate(self.texts)
        ]


# (higher, lower, the claim) of each contrast between two groups.
CONTRASTS = (
    ("chat", "plain text", "Chat prompts have a higher TuCo than plain text"),
    ("harmful", "chat", "Harmful requests have a higher TuCo than harmless ones"),
    ("harmful", "jailbreak", "Harmful requests have a higher TuCo bare than in a jailbreak"),
    (
        "jailbreak",
        "harmless in template",
        "In one and the same template, harmful requests have a higher TuCo than harmless ones",
    ),
)


def prompt_groups(count: int, seed: int = 0) -> list[PromptGroup]:
    """The demo's groups of `count` prompts; none of them was trained on.

    Raises InputError where there are not so many.
    """
    rng = np.random.default_rng(seed)
    pools = (
        harmful_split(SplitOptions()).evaluation,
        held_out_harmless(),
        sources.passages(),
    )
    most = min(map(len, pools))
    if not 2 <= count <= most:
        raise InputError(f"prompts is {count}: give 2 or more, {most} at most")
    harmful, harmless, plain = (
        [pool[int(i)] for i in sorted(rng.permutation(len(pool))[:count])] for pool in pools
    )
    templates = sources.jailbreak_templates()
    names = [list(templates)[i % len(templates)] for i in range(count)]

    def inside(texts: list[str]) -> list[str]:
        pairs = zip(names, texts, strict=True)
        return [templates[name].replace("{{ prompt }}", text) for name, text in pairs]

    return [
        PromptGroup(
            "chat", "Harmless requests and questions of our own, as a user's turn.", harmless, True
        ),
        PromptGroup("plain text", sources.PASSAGES_ARE, plain, False),
        PromptGroup(
            "harmful",
            "Requests of AdvBench that were not trained on, as a user's turn.",
            harmful,
            True,
        ),
        PromptGroup(
            "jailbreak",
            f"The same harmful requests in {len(templates)} jailbreak templates of pyrit.",
            inside(harmful),
            True,
            names,
        ),
        PromptGroup(
            "harmless in template",
            "A control: the harmless requests in the same templates.",
            inside(harmless),
            True,
            names,
        ),
    ]
