"""A prompts file for each language."""

import pytest

from common_jax.errors import InputError
from tests.tuco.cli_pair import write_jsonl
from tuco_jax.attacks.conjugate import read_languages


def test_languages_must_ask_the_same(tmp_path):
    with pytest.raises(InputError, match="nowhere: is no folder; give one with a prompts file"):
        read_languages(tmp_path / "nowhere")
    write_jsonl(tmp_path / "a.jsonl", [{"id": "x", "prompt": "1"}, {"id": "y", "prompt": "2"}])
    with pytest.raises(InputError, match="1 prompts files .* give one a language, 2 or more"):
        read_languages(tmp_path)
    other = tmp_path / "b.jsonl"
    write_jsonl(other, [{"prompt": "1"}])
    with pytest.raises(InputError, match="b.jsonl: 1 rows, but a.jsonl has 2; give the same"):
        read_languages(tmp_path)
    write_jsonl(other, [{"id": "y", "prompt": "2"}, {"id": "x", "prompt": "1"}])
    with pytest.raises(InputError, match="b.jsonl:1: id 'y', but a.jsonl has 'x' there"):
        read_languages(tmp_path)
    write_jsonl(other, [{"prompt": "1"}, {"prompt": "2"}])
    assert [language.name for language in read_languages(tmp_path)] == ["a", "b"]
    (tmp_path / "b.txt").write_text("1\n2\n")
    with pytest.raises(InputError, match="b.txt: 'b' is already another file's name; remove one"):
        read_languages(tmp_path)
