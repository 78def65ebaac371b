"""Messages keep all that they are given, and what is no message is refused."""

from typing import Any

import pytest

from common_jax.errors import InputError
from tuco_jax.prompts.messages import ROLES, messages_of, text_of, tools_of

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]


def test_every_field_and_role_stays():
    talk = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": PARTS},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "user", "content": "ok", "name": None},
    ]
    found = messages_of(talk, "here")
    assert found[:5] == tuple(talk[:5])
    assert found[5] == {"role": "user", "content": "ok"}  # null is as good as absent
    assert [text_of(m) for m in found] == ["Be brief.", "Hello", "", "", "", "ok"]
    assert {m["role"] for m in found} < set(ROLES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"role": "user", "content": ""}, r"`messages\[0\].content` is empty"),
        (
            {"role": "assistant", "content": None},
            r"`messages\[0\].content` must be text, not N",
        ),
        ({"role": "assistant", "content": "", "tool_calls": []}, "content` is empty"),
        ({"role": "user", "content": []}, r"content` is empty"),
        ({"role": "user", "content": [{"text": " "}]}, "content` is empty"),
        (
            {"role": "user", "content": [{"type": "image", "url": "x"}]},
            r"content\[0\]` is a part of type 'image'; parts are .* the models read text alone",
        ),
        ({"role": "user", "content": ["a"]}, r"content\[0\]` is str; parts are"),
        ({"role": "user", "content": [{"text": 3}]}, r"content\[0\].text` must be text"),
        ({"role": "user", "content": "a", "name": "\ud800"}, "half a surrogate pair"),
        ({"role": "user", "content": "a", "x": float("nan")}, "holds what JSON cannot"),
        ({"role": "user", "content": "a", "x": {1, 2}}, "holds what JSON cannot"),
        ({"role": ["user"], "content": "a"}, r"role` is \['user'\]; roles are system, developer"),
    ],
)
def test_what_is_no_message(given, message):
    with pytest.raises(InputError, match=f"^here: .*{message}"):
        messages_of([given], "here")


def test_a_message_that_holds_itself():
    deep: dict[str, Any] = {"role": "user", "content": "a"}
    deep["x"] = deep
    with pytest.raises(InputError, match="holds what JSON cannot"):
        messages_of([deep], "here")


def test_tools():
    assert tools_of(None, "here") is None and tools_of([], "here") is None
    assert tools_of('[{"name": "f"}]', "here") == ({"name": "f"},)
    for wrong in ("hammer", "3", 3, ["f"], {"name": "f"}):
        with pytest.raises(InputError, match="^here: `tools` "):
            tools_of(wrong, "here")
