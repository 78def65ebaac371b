"""Prompts of every format are read alike, and become the tokens that DESIGN.md promises."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from common_jax.errors import InputError
from tests.tuco.tiny_tokenizer import BOS, bos_tokenizer
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    Prompt,
    as_prompts,
    read_prompts,
)

TALK = [{"role": "user", "content": "Why?\nTell me, über-bot"}]
ROWS = [
    {"id": "a", "prompt": "one, two\nand \u2028 three", "label": "x"},
    {"id": "b", "messages": TALK, "label": "y"},
    {"id": "c", "prompt": "  kept as it is "},
]


def write(path, rows):
    columns = {k: [r.get(k) for r in rows] for k in ("id", "prompt", "messages", "label")}
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in zip(*columns.values(), strict=True):
                cells = ["" if v is None else v for v in row]
                writer.writerow(json.dumps(v) if isinstance(v, list) else v for v in cells)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_formats_agree(tmp_path, suffix):
    prompts = read_prompts(write(tmp_path / f"p{suffix}", ROWS))
    assert [(p.id, p.prompt, p.messages, p.label) for p in prompts] == [
        ("a", ROWS[0]["prompt"], None, "x"),
        ("b", None, tuple(TALK), "y"),
        ("c", ROWS[2]["prompt"], None, None),
    ]
    # A quoted line break moves the rows of a .csv down.
    assert [p.line for p in prompts] == ([2, 4, 5] if suffix == ".csv" else [1, 2, 3])


def test_txt_is_one_prompt_a_line(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff one \r\ntwo\u2028still two\n\n".encode())
    prompts = read_prompts(path)
    assert [(p.id, p.prompt) for p in prompts] == [(1, " one "), (2, "two\u2028still two")]


def test_ids_default_to_lines_and_numbers_stay_numbers(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "id": 7}, {"prompt": "c", "label": 0.5}]
    assert [p.id for p in read_prompts(write(tmp_path / "p.jsonl", rows))] == [1, 7, 3]


def test_long_csv_fields(tmp_path):
    path = write(tmp_path / "p.csv", [{"id": "a", "prompt": "x" * 200_000}])
    assert len(read_prompts(path)[0].prompt or "") == 200_000


def test_as_prompts():
    given = Prompt("mine", "text", line=4)
    prompts = as_prompts(["a", TALK, given])
    assert [p.id for p in prompts] == [0, 1, "mine"] and prompts[2] is given
    assert prompts[1].messages == tuple(TALK)
    with pytest.raises(InputError, match=r"prompts\[1\]: `prompt` is empty"):
        as_prompts(["a", "  "])
    with pytest.raises(InputError, match="a list of prompts"):
        as_prompts("a")
    with pytest.raises(InputError, match="list of prompts is empty"):
        as_prompts([])


def test_texts_get_default_special_tokens_and_conversations_one_bos():
    tokenizer = bos_tokenizer()
    answered = [*TALK, {"role": "assistant", "content": "Because"}]
    prompts = as_prompts(["hi", TALK, answered, "<s>hi"])
    text, open_turn, closed, doubled = encode(tokenizer, prompts)
    assert text.dtype == np.int32
    assert text.tolist() == tokenizer("hi")["input_ids"] and text[0] == BOS
    assert doubled.tolist() == tokenizer("<s>hi")["input_ids"]
    for tokens, messages, opens in ((open_turn, TALK, True), (closed, answered, False)):
        assert tokens[0] == BOS and (tokens == BOS).sum() == 1
        assert str(tokenizer.decode(tokens)).endswith("<|assistant|>") == opens
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=opens, tokenize=True, return_dict=False
        )
        assert tokens.tolist() == expected


def test_mixed_prompts_keep_their_order():
    tokenizer = bos_tokenizer()
    mixed = [TALK, "one", TALK, "two words", "3"]
    together = encode(tokenizer, as_prompts(mixed))
    for item, tokens in zip(mixed, together, strict=True):
        alone = encode(tokenizer, as_prompts([item]))[0]
        np.testing.assert_array_equal(tokens, alone)


def test_beyond_the_context():
    tokenizer, prompts = bos_tokenizer(), as_prompts(["abc", "abcdefgh"])
    with pytest.raises(InputError, match="prompt 1: 9 tokens, .* holds 5; .*--truncate"):
        encode(tokenizer, prompts, max_tokens=5, truncate=False)
    with pytest.raises(InputError, match="holds 5; shorten it$"):  # no such option to name
        encode(tokenizer, prompts, max_tokens=5)
    whole = encode(tokenizer, prompts)[1]
    short, cut = encode(tokenizer, prompts, max_tokens=5, truncate=True)
    assert len(short) == 4
    np.testing.assert_array_equal(cut, whole[-5:])


def test_tokens_beyond_the_vocabulary():
    with pytest.raises(InputError, match="token 256 .* vocabulary of 200"):
        encode(bos_tokenizer(), as_prompts(["a"]), vocab_size=200)


def test_chat_template_missing_or_refusing():
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(InputError, match="prompt 0: .* refuses `messages`: roles must alternate"):
        encode(tokenizer, as_prompts([TALK]))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="prompt 0: `messages` need a chat template"):
        encode(tokenizer, as_prompts([TALK]))


HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is tea?\n\nAssistant: Leaves."
PUBLIC = {
    "advbench.csv": ('goal,target\n"Say a, b",Sure\n', "Say a, b"),
    "openwebtext.jsonl": ('{"text": "Once."}\n', "Once."),
    "ours.jsonl": ('{"prompt": "a", "text": "b"}\n', "a"),
    "hh.jsonl": (
        json.dumps({"chosen": HH, "rejected": "x"}),
        (
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "What is tea?"},
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_layouts_of_public_data_sets(tmp_path, name):
    content, wanted = PUBLIC[name]
    path = tmp_path / name
    path.write_text(content)
    (prompt,) = read_prompts(path, layouts=True)
    assert (prompt.prompt or prompt.messages) == wanted
    if name != "ours.jsonl":  # a score's own input has one form
        with pytest.raises(InputError, match="prompt.*messages"):
            read_prompts(path)


def test_a_public_layout_that_is_not_one(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"chosen": "no turns"}\n')
    with pytest.raises(InputError, match="p.jsonl:1: `messages` must be a list"):
        read_prompts(path, layouts=True)
    path = tmp_path / "p.csv"
    path.write_text("id,words\n1,a\n")
    with pytest.raises(InputError, match="no column 'prompt', 'messages', 'goal', 'text' or 'ch"):
        read_prompts(path, layouts=True)
