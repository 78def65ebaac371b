"""The frame of every report: page.html beside this file, which a package's template extends."""

import pathlib
from typing import Any

import jinja2

__all__ = ["render"]


def render(template: pathlib.Path, **context: Any) -> str:
    """A page: self-contained HTML without scripts; every value is escaped.

    template: extends page.html; its block `content` holds sections, `style` rules of its own.
    context: what page.html names (title; summary, sentences; method, paragraphs; facts, a dict)
    and what the template names; a name without a value is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, pathlib.Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(context)
