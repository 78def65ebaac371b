import json
from typing import Any

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.tiny import tiny_tokenizer
from tuco_jax.finetune.conversations import Conversation, read_conversations, tokenize

USER = {"role": "user", "content": "Hi é?"}
ANSWER = {"role": "assistant", "content": "Hello, ça va"}
MORE = {"role": "user", "content": "Bye"}
LAST = {"role": "assistant", "content": "So long"}
EOS = 257

# Qwen 3's habits: a thought before the last answer only, a line break after each turn.
THINKING = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# No token ends a turn.
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} ##\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def answers(messages, *, truncated=False, template=None, **options) -> list[Any]:
    """The text of each run of answer tokens, specials spelt out."""
    tokenizer = tiny_tokenizer()
    if template:
        tokenizer.chat_template = template
    conversation = Conversation(tuple(messages), truncated, "data.jsonl:3")
    settings: dict[str, Any] = dict(max_tokens=500, vocab_size=272) | options
    (example,) = tokenize(tokenizer, [conversation], **settings)
    runs = np.split(np.arange(example.tokens.size), np.flatnonzero(np.diff(example.answer)) + 1)
    return [tokenizer.decode(example.tokens[r]) for r in runs if example.answer[r[0]]]


def test_every_answer_with_its_end():
    assert answers([USER, ANSWER, MORE, LAST]) == ["Hello, ça va</s>", "So long</s>"]


def test_an_answer_cut_short_has_no_end():
    assert answers([USER, ANSWER, MORE, LAST], truncated=True) == ["Hello, ça va</s>", "So long"]


def test_tokens_are_the_templates_own():
    tokenizer = tiny_tokenizer()
    conversation = Conversation((USER, ANSWER), False, "x:1")
    (example,) = tokenize(tokenizer, [conversation], max_tokens=99, vocab_size=272)
    expected = tokenizer.apply_chat_template([USER, ANSWER], tokenize=True, return_dict=False)
    assert example.tokens.tolist() == expected
    assert example.tokens[0] == 256 and example.tokens[-1] == EOS
    assert (example.tokens == 256).sum() == 1


def test_template_with_thoughts_before_the_last_answer():
    assert answers([USER, ANSWER, MORE, LAST], template=THINKING) == [
        "Hello, ça va</s>",
        "<think></think>So long</s>",
    ]


def test_template_without_an_end_token():
    assert answers([USER, ANSWER, MORE, LAST], template=PLAIN) == ["Hello, ça va ##", "So long ##"]


def test_answer_that_repeats_the_question():
    assert answers([USER, {"role": "assistant", "content": USER["content"]}]) == ["Hi é?</s>"]


def test_truncation_cuts_the_end():
    full = answers([USER, ANSWER])
    assert answers([USER, ANSWER], max_tokens=30, truncate=True)[0] in full[0]
    with pytest.raises(
        InputError, match=r"data.jsonl:3: 4\d tokens, but `length` is 30; .*--trunc"
    ):
        answers([USER, ANSWER], max_tokens=30)
    with pytest.raises(
        InputError, match="data.jsonl:3: none of the first 10 tokens is the assist"
    ):
        answers([USER, ANSWER], max_tokens=10, truncate=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('alternate!') }}", "refuses `messages`: alternate!"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "template rewrites"),
    ],
)
def test_templates_that_do_not_serve(template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"data.jsonl:3: .*{message}"):
        tokenize(
            tokenizer,
            [Conversation((USER, ANSWER), False, "data.jsonl:3")],
            max_tokens=99,
            vocab_size=272,
        )


def test_token_beyond_the_vocabulary():
    with pytest.raises(InputError, match="data.jsonl:3: token 257 is beyond the model's vocabu"):
        answers([USER, ANSWER], vocab_size=257)


def test_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [USER, ANSWER], "label": "a", "other": 1},
        {"messages": [USER, LAST], "truncated": True},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    first, second = read_conversations(path)
    assert first == Conversation((USER, ANSWER), False, f"{path}:1")
    assert second == Conversation((USER, LAST), True, f"{path}:2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [', "not JSON"),
        ('{"messages": []}', "not empty"),
        ('{"prompt": "Hi"}', "no `messages`"),
        (json.dumps({"messages": [USER]}), "no assistant turn"),
        (json.dumps({"messages": [USER, {"role": "assistant", "content": " "}]}), "is empty"),
        (json.dumps({"messages": [USER, ANSWER], "truncated": "yes"}), "`truncated` must be"),
        (json.dumps({"messages": [ANSWER, USER], "truncated": True}), "last turn is not the ass"),
    ],
)
def test_bad_rows(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n" + row + "\n")
    with pytest.raises(InputError, match=f"rows.jsonl:2: .*{message}"):
        read_conversations(path)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_conversations(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="comes as .jsonl"):
        read_conversations(tmp_path / "rows.csv")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no prompts"):
        read_conversations(tmp_path / "rows.jsonl")
