"""What a conversation says, piece by piece, and which pieces a text of it lacks.

A piece is what a chat template takes or leaves as one: a turn's content, or each part of it; a
field of a turn; the name and the id of a call, and each of its arguments; the name, the
description and the schema of a tool. All are replaced by marks at once, and the marks looked for
in the text: one more text for conversations of one shape, however many turns they have.

Some pieces only say how others belong together (`links`), and may go unread: the ids of calls, and
the names of tools beside what they returned, which follow from the order of turns.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Piece", "Talk", "longer", "marked", "pieces", "said", "shape", "without"]

Talk = dict[str, Any]  # {"messages": [...], "tools": [...] or None}

# Texts that templates branch on, rather than write.
_KINDS = ("role", "type")


class Piece(NamedTuple):
    """path: keys that lead to it. links: whether it only says how others belong together."""

    path: tuple[str | int, ...]
    links: bool = False

    @property
    def field(self) -> str:
        """As messages name it: messages[0].tool_calls[1].id."""
        keys = (f"[{k}]" if isinstance(k, int) else f".{k}" for k in self.path)
        return "".join(keys).removeprefix(".")

    @property
    def is_content(self) -> bool:
        """Whether it is what a turn says, or a part of that."""
        return self.path[2:3] == ("content",)


def pieces(talk: Talk) -> list[Piece]:
    """The pieces of a conversation that hold anything."""
    return [piece for piece in _pieces(talk) if any(_leaves(_at(talk, piece.path)))]


def _pieces(talk: Talk) -> Iterator[Piece]:
    for i, tool in enumerate(talk["tools"] or ()):
        path, own = ("tools", i), tool
        if isinstance(tool.get("function"), Mapping):
            path, own = ("tools", i, "function"), tool["function"]
        names = [name for name in ("name", "description", "parameters") if name in own]
        # A schema of no parameters, {"type": "object", "properties": {}}, says nothing.
        if "parameters" in names and not any(_leaves(_besides_type(own["parameters"]))):
            names.remove("parameters")
        yield from (Piece((*path, name)) for name in names) if names else [Piece(("tools", i))]
    for turn, message in enumerate(talk["messages"]):
        for name, value in message.items():
            path = "messages", turn, name
            if name == "content" and isinstance(value, list):
                yield from (Piece((*path, i, "text")) for i in range(len(value)))
            elif name == "tool_calls" and _are_calls(value):
                for i, call in enumerate(value):
                    for key, inner in call.items():
                        if key == "function" and isinstance(inner, Mapping):
                            for own, given in inner.items():
                                yield from _each(given, (*path, i, key, own))
                        elif key != "type":
                            yield Piece((*path, i, key), links=key in ("id", "index"))
            elif name != "role":
                of_tool = name == "name" and message["role"] == "tool"
                yield Piece(path, links=of_tool or name == "tool_call_id")


def _each(value: Any, path: tuple[str | int, ...]) -> Iterator[Piece]:
    """The pieces of what is said by one thing after another."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _each(inner, (*path, key))
    else:
        yield Piece(path)


def _besides_type(schema: Any) -> Any:
    keep = schema.keys() - {"type"} if isinstance(schema, Mapping) else ()
    return {k: schema[k] for k in keep} if keep else None


def _are_calls(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(call, Mapping) for call in value)


def shape(talk: Talk) -> str:
    """What conversations have in common that differ in what is said alone."""

    def plain(value: Any, key: Any = None) -> Any:
        if isinstance(value, Mapping):
            return {k: plain(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return value if key in _KINDS else f"{type(value).__name__} {bool(value)}"

    return json.dumps([plain(talk["messages"]), talk["tools"]], sort_keys=True)


def marked(talk: Talk, found: Sequence[Piece]) -> tuple[Talk, dict[Piece, list[str]]]:
    """The conversation with a mark in place of each thing said, and the marks of each piece.

    Marks are nine letters and digits, as some templates want ids to be.
    """
    talk, numbers = _copy(talk), itertools.count()
    marks: dict[Piece, list[str]] = {piece: [] for piece in found}

    def mark(value: Any, own: list[str], key: Any = None) -> Any:
        if isinstance(value, Mapping):
            return {k: mark(v, own, k) for k, v in value.items()}
        if isinstance(value, list):
            return [mark(v, own) for v in value]
        if key in _KINDS or not value:
            return value
        own.append(f"tux{next(numbers):06d}")
        return own[-1]

    def describe(tool: Any, own: list[str]) -> Any:
        """Of a schema, names and descriptions alone: templates branch on the rest."""
        if not isinstance(tool, Mapping):
            return tool
        texts = {k for k, v in tool.items() if k in ("name", "description") and v}
        return {
            k: mark(v, own) if k in texts and isinstance(v, str) else describe(v, own)
            for k, v in tool.items()
        }

    for piece, own in marks.items():
        *path, last = piece.path
        texts = piece.path[0] != "tools" or last in ("name", "description")
        change = mark if texts else describe
        holder = _at(talk, path)
        holder[last] = change(holder[last], own)
    return talk, marks


def without(talk: Talk, piece: Piece) -> Talk:
    """The conversation without a piece."""
    talk = _copy(talk)
    *path, last = piece.path
    del _at(talk, path)[last]
    if not talk["tools"]:
        talk["tools"] = None
    return talk


def said(talk: Talk, piece: Piece) -> str:
    """The text of a piece of content."""
    return _at(talk, piece.path).strip()


def longer(talk: Talk, piece: Piece, word: str) -> Talk:
    """The conversation with one more word in a piece of content."""
    talk = _copy(talk)
    *path, last = piece.path
    _at(talk, path)[last] += f" {word}"
    return talk


def _copy(value: Any) -> Any:
    """A copy in which nothing is shared: of two turns that are one object, one can be changed."""
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _at(talk: Talk, path: Sequence[str | int]) -> Any:
    value: Any = talk
    for key in path:
        value = value[key]
    return value


def _leaves(value: Any) -> Iterator[bool]:
    """Whether each thing that is said there is more than nothing."""
    if isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(inner)
    else:
        yield bool(value.strip() if isinstance(value, str) else value)
