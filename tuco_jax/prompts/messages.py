"""Conversations as they are written: messages and tools, checked to be what a template may read.

A message has a `role` and its `content`, a text or a list of parts of text, and whatever else the
chat template takes: `name`, `tool_calls`, `tool_call_id`, `reasoning_content`. All of it reaches
the template; fields that are null are as good as absent, as in transformers.
"""

import json
from collections.abc import Mapping
from typing import Any

from common_jax.errors import InputError

__all__ = ["ROLES", "Message", "Tool", "check_encodes", "check_text", "messages_of"]
__all__ += ["text_of", "tools_of"]

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, Any]  # {"role": one of ROLES, "content": text or parts, ...}
Tool = Mapping[str, Any]  # a function's JSON schema


def text_of(message: Message) -> str:
    """The text of a message: its content, or the texts of its parts; "" where it has none."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def messages_of(found: Any, where: str) -> tuple[Message, ...]:
    """The messages of a row, a list or JSON text; InputError naming `where` and the field."""
    found = _parsed(found, where, "messages")
    if not isinstance(found, list | tuple) or not found:
        raise InputError(
            f'{where}: `messages` must be a list of {{"role": ..., "content": ...}}, not empty'
        )
    return tuple(_message(m, where, f"messages[{turn}]") for turn, m in enumerate(found))


def tools_of(found: Any, where: str) -> tuple[Tool, ...] | None:
    """The tools of a row, a list or JSON text; None without any."""
    found = _parsed(found, where, "tools")
    if found is None or (isinstance(found, list | tuple) and not found):
        return None
    if not isinstance(found, list | tuple) or not all(isinstance(t, Mapping) for t in found):
        raise InputError(f"{where}: `tools` must be a list of JSON schemas, one a function")
    return tuple(_plain(dict(tool), where, f"tools[{i}]") for i, tool in enumerate(found))


def _parsed(found: Any, where: str, field: str) -> Any:
    if not isinstance(found, str):
        return found
    try:  # a column of text, in .csv or .parquet
        return json.loads(found)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: `{field}` is text that is not JSON") from error


def _message(message: Any, where: str, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: `{field}` must be an object with `role` and `content`")
    given = {key: value for key, value in message.items() if value is not None}
    if given.get("role") not in ROLES:
        raise InputError(
            f"{where}: `{field}.role` is {given.get('role')!r}; roles are {', '.join(ROLES)}"
        )
    content = given.get("content")
    if given.get("role") == "tool" and content == "":  # a function that returned nothing
        pass
    elif content in (None, "") and given.get("role") == "assistant" and given.get("tool_calls"):
        pass
    elif isinstance(content, list | tuple):
        given["content"] = _parts(content, where, f"{field}.content")
    else:
        check_text(content, where, f"{field}.content")
    return _plain(given, where, field)


def _parts(content: Any, where: str, field: str) -> list[Any]:
    """Parts of text, as {"type": "text", "text": ...}."""
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind != "text":
            what = f"a part of type {kind!r}" if kind else type(part).__name__
            raise InputError(
                f'{where}: `{field}[{i}]` is {what}; parts are {{"type": "text", "text": ...}}, '
                "since the models read text alone"
            )
        if not isinstance(part.get("text"), str):
            raise InputError(f"{where}: `{field}[{i}].text` must be text")
    if not "".join(part["text"] for part in content).strip():
        raise InputError(f"{where}: `{field}` is empty; give it text or remove the row")
    return [{"type": "text", "text": part["text"]} for part in content]


def _plain(value: dict[str, Any], where: str, field: str) -> dict[str, Any]:
    """The same as plain JSON data; InputError where it is something else."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        check_encodes(text, where, field)
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: `{field}` holds what JSON cannot: {' '.join(str(error).split())}"
        ) from error


def check_text(text: Any, where: str, field: str) -> None:
    """Raise InputError for what is no text, or blank."""
    if not isinstance(text, str):
        raise InputError(f"{where}: `{field}` must be text, not {type(text).__name__}")
    if not text.strip():
        raise InputError(f"{where}: `{field}` is empty; give it text or remove the row")
    check_encodes(text, where, field)


def check_encodes(text: str, where: str, field: str) -> None:
    """Raise InputError for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: `{field}` holds half a surrogate pair, not text") from error
