"""Pieces of a conversation: what they are, their marks, and what is left without one."""

from tuco_jax.prompts.whole import Piece, longer, marked, pieces, said, shape, without

CALL = {
    "type": "function",
    "id": "a",
    "function": {"name": "add", "arguments": {"a": "2", "b": 0}},
}
TALK = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": " hi "}], "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "a"},
    ],
    "tools": [{"function": {"name": "add", "parameters": {"properties": {"name": {"x": "y"}}}}}],
}


def test_pieces_have_names_and_marks_of_their_own():
    found = pieces(TALK)
    assert [p.field for p in found] == [
        "tools[0].function.name",
        "tools[0].function.parameters",
        "messages[0].content[0].text",
        "messages[0].name",
        "messages[1].tool_calls[0].id",
        "messages[1].tool_calls[0].function.name",
        "messages[1].tool_calls[0].function.arguments.a",
        "messages[2].content",
        "messages[2].name",
        "messages[2].tool_call_id",
    ]
    assert [i for i, p in enumerate(found) if p.links] == [4, 8, 9]
    assert [i for i, p in enumerate(found) if p.is_content] == [2, 7]
    replaced, marks = marked(TALK, found)
    every = [mark for own in marks.values() for mark in own]
    assert len(set(every)) == len(every) == 9 and {len(mark) for mark in every} == {9}
    assert all(mark in str(replaced) for mark in every)
    arguments = replaced["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"a": marks[found[6]][0], "b": 0}
    assert replaced["tools"][0]["function"]["parameters"] == {"properties": {"name": {"x": "y"}}}
    assert replaced["messages"][1]["tool_calls"][0]["type"] == "function"
    assert shape(replaced) != shape(TALK)  # tools stay as they are, for templates branch on them
    assert shape(replaced | {"tools": None}) == shape(TALK | {"tools": None})


def test_without_a_piece_or_with_a_longer_one():
    content, tool, name = Piece(("messages", 2, "content")), Piece(("tools", 0)), pieces(TALK)[3]
    assert said(TALK, pieces(TALK)[2]) == "hi"
    assert longer(TALK, content, "x")["messages"][2]["content"] == "4 x"
    assert without(TALK, tool)["tools"] is None
    assert "name" not in without(TALK, name)["messages"][0]
    assert TALK["messages"][0]["name"] == "Ann" and TALK["tools"]
