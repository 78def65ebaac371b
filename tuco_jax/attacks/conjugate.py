"""Conjugate prompting: the same requests in several languages, one file a language."""

import dataclasses
import pathlib

from common_jax.errors import InputError
from tuco_jax.prompts.read import FORMATS, Prompt, read_prompts

__all__ = ["Language", "as_turns", "read_languages"]


@dataclasses.dataclass(frozen=True)
class Language:
    """One language's requests; row i says the same in every language. name: its file's."""

    name: str
    prompts: list[Prompt]


def read_languages(folder: str | pathlib.Path) -> list[Language]:
    """One language for each prompts file in a folder, sorted by name.

    Raises InputError naming the file where there are fewer than 2 files, two files of one name,
    different numbers of rows, or, in files with ids, different ids in a row.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; give one with a prompts file for each language")
    paths = sorted(p for p in folder.iterdir() if p.suffix in FORMATS)
    if len(paths) < 2:
        raise InputError(
            f"{folder}: {len(paths)} prompts files ({', '.join(FORMATS)}); give one a language, "
            "2 or more"
        )
    found: dict[str, Language] = {}
    for path in paths:
        if path.stem in found:
            raise InputError(f"{path}: {path.stem!r} is already another file's name; remove one")
        found[path.stem] = Language(path.stem, read_prompts(path, layouts=True))
    first = found[paths[0].stem]
    for path, language in zip(paths[1:], list(found.values())[1:], strict=True):
        if len(language.prompts) != len(first.prompts):
            raise InputError(
                f"{path}: {len(language.prompts)} rows, but {paths[0].name} has "
                f"{len(first.prompts)}; give the same requests row by row"
            )
        for ours, theirs in zip(language.prompts, first.prompts, strict=True):
            if _named(ours) and _named(theirs) and ours.id != theirs.id:
                raise InputError(
                    f"{path}:{ours.line}: id {ours.id!r}, but {paths[0].name} has {theirs.id!r} "
                    "there; give the same requests row by row"
                )
    return list(found.values())


def _named(prompt: Prompt) -> bool:
    return prompt.id != prompt.line


def as_turns(language: Language, chat: bool) -> list[Prompt]:
    """A language's prompts, named after it; with `chat` a text becomes a user's turn."""
    found: list[Prompt] = []
    for i, p in enumerate(language.prompts):
        if chat and p.messages is None:
            messages = ({"role": "user", "content": p.prompt or ""},)
            p = dataclasses.replace(p, prompt=None, messages=messages)
        found.append(dataclasses.replace(p, id=f"{language.name} {i}", label=None, target=None))
    return found
