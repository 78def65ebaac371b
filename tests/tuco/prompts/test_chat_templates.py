"""Chat templates by name and from files."""

import re

import pytest

from common_jax.errors import InputError
from tests.tuco.tiny import tiny_tokenizer
from tuco_jax.generation.generate import end_tokens
from tuco_jax.prompts.chat_templates import TEMPLATES, check_template, read_template
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    as_prompts,
)

USER = {"role": "user", "content": "How does the brain work? "}
ANSWER = {"role": "assistant", "content": "It thinks."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def tokenizer():
    """A tokenizer that has the marks of every named template, and no template."""
    found = tiny_tokenizer()
    found.chat_template = None
    marks = ["<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"]
    found.add_tokens(marks, special_tokens=True)
    return found


# As the models' cards write them, with this tokenizer's <s> as the BOS.
@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        (
            "gemma",
            [USER],
            "<s><start_of_turn>user\nHow does the brain work?<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
        (
            "gemma",
            [SYSTEM, USER, ANSWER],
            "<s><start_of_turn>user\nBe brief.\n\nHow does the brain work?<end_of_turn>\n"
            "<start_of_turn>model\nIt thinks.<end_of_turn>\n",
        ),
        (
            "gemma",
            [USER, ANSWER, USER],
            "<s><start_of_turn>user\nHow does the brain work?<end_of_turn>\n"
            "<start_of_turn>model\nIt thinks.<end_of_turn>\n"
            "<start_of_turn>user\nHow does the brain work?<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
        (
            "chatml",
            [SYSTEM, ANSWER, USER],
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>assistant\nIt thinks.<|im_end|>\n"
            "<|im_start|>user\nHow does the brain work? <|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_named_templates_write_the_models_own_format(tokenizer, name, messages, expected):
    tokenizer.chat_template = read_template(name)
    (tokens,) = encode(tokenizer, as_prompts([messages]))
    assert tokenizer.decode(tokens) == expected
    ends = {tokenizer.convert_ids_to_tokens(i) for i in end_tokens(tokenizer)}
    assert ends == {"</s>", "<end_of_turn>" if name == "gemma" else "<|im_end|>"}


@pytest.mark.parametrize("messages", [[ANSWER], [USER, USER], [USER, SYSTEM], [SYSTEM, SYSTEM]])
def test_gemma_wants_turns_to_alternate(tokenizer, messages):
    tokenizer.chat_template = read_template("gemma")
    with pytest.raises(InputError, match="prompt 0: the chat template refuses .* take turns"):
        encode(tokenizer, as_prompts([messages]))


def test_a_file_is_read_as_it_is(tmp_path, tokenizer):
    path = tmp_path / "own.jinja"
    path.write_text("\ufeff{{ messages[0]['content'] }} \u2192 {{ messages[1]['content'] }}\n")
    template = read_template(str(path))
    assert template == "{{ messages[0]['content'] }} \u2192 {{ messages[1]['content'] }}\n"
    check_template(str(path), template, tokenizer)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("gema", None, "'gema' is neither a name (gemma, chatml) nor a .jinja file"),
        ("", None, "'' is neither a name (gemma, chatml) nor a .jinja file"),
        ("missing.jinja", None, "missing.jinja cannot be read: No such file or directory"),
        ("folder.jinja", ..., "folder.jinja cannot be read: Is a directory"),
        ("latin.jinja", b"\xe4{{ messages }}", "latin.jinja is not UTF-8; save it as UTF-8"),
        ("blank.jinja", b" \n", "blank.jinja is empty; write a template of `messages`"),
    ],
)
def test_what_is_no_template(tmp_path, monkeypatch, source, content, message):
    monkeypatch.chdir(tmp_path)
    if content is ...:
        (tmp_path / source).mkdir()
    elif content is not None:
        (tmp_path / source).write_bytes(content)
    with pytest.raises(InputError, match=f"^chat_template: {re.escape(message)}$"):
        read_template(source)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] }}\n{% if %}", "own.jinja:2: not a Jinja template: "),
        (
            "{{ raise_exception('not\n me') }}",
            "own.jinja refuses a user's turn and an answer: not",
        ),
        ("{{ messages[1]['content'] }}", "own.jinja leaves out what the user says; write each"),
        ("{{ messages[0]['content'] }}", "own.jinja leaves out what the assistant says; write"),
    ],
)
def test_templates_that_cannot_serve(tokenizer, template, message):
    with pytest.raises(InputError, match=f"^chat_template: {re.escape(message)}"):
        check_template("own.jinja", template, tokenizer)


@pytest.mark.parametrize(("name", "mark"), [("gemma", "start_of_turn"), ("chatml", "|im_start|")])
def test_a_named_template_needs_its_marks(name, mark):
    message = f"{name} marks turns with <{re.escape(mark)}>, which is no token of the base"
    with pytest.raises(InputError, match=message):
        check_template(name, TEMPLATES[name], tiny_tokenizer())
