"""Prompts become the tokens that DESIGN.md promises: special tokens once, conversations whole."""

import re

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.tiny_tokenizer import BOS, bos_tokenizer
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import Prompt, as_prompts

TALK = [{"role": "user", "content": "Why?\nTell me, über-bot"}]


def test_texts_get_default_special_tokens_and_conversations_one_bos():
    tokenizer = bos_tokenizer()
    answered = [*TALK, {"role": "assistant", "content": "Because"}]
    prompts = as_prompts(["hi", TALK, answered, "<s>hi"])
    text, open_turn, closed, doubled = encode(tokenizer, prompts)
    assert text.dtype == np.int32
    assert text.tolist() == tokenizer("hi")["input_ids"] and text[0] == BOS
    assert doubled.tolist() == text.tolist()  # its own BOS is the one
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


def test_bos_is_left_where_no_other_is_put_before_it():
    tokenizer = bos_tokenizer()
    (twice,) = encode(tokenizer, as_prompts(["<s><s>hi"]))
    assert (twice == BOS).sum() == 2 and len(twice) == 4
    tokenizer.backend_tokenizer.post_processor = None
    once, twice = encode(tokenizer, as_prompts(["<s>hi", "<s><s>hi"]))
    assert [(row == BOS).sum() for row in (once, twice)] == [1, 2]


def test_an_answer_that_was_begun_can_go_on():
    tokenizer = bos_tokenizer()
    begun = [*TALK, {"role": "assistant", "content": "Because "}]
    prompts = as_prompts([begun, TALK])
    closed, question = encode(tokenizer, prompts)
    open_turn, same = encode(tokenizer, prompts, continue_final=True)
    assert str(tokenizer.decode(closed)).endswith("Because </s>")
    assert str(tokenizer.decode(open_turn)).endswith("<|assistant|>Because ")
    np.testing.assert_array_equal(question, same)
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    tokenizer.chat_template = str(tokenizer.chat_template) + "{{ messages[-1].tool_calls }}"
    called = [*TALK, {"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(InputError, match=r"prompt 0: messages\[1\] has no text that can be cont"):
        encode(tokenizer, as_prompts([called]), continue_final=True)


def test_what_the_template_does_not_take_names_the_prompt():
    prompts = [Prompt("p", None, ({"role": "user", "content": "a", "name": "Ann"},), line=3)]
    with pytest.raises(InputError, match=r"prompt 'p' \(line 3\): the chat template does not "):
        encode(bos_tokenizer(), prompts)


def test_what_a_template_leaves_out_is_told():
    tokenizer = bos_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "4", "name": "add"}]
    notes: list[str] = []
    encode(tokenizer, as_prompts([talk, talk]), notes=notes)
    message = "the chat template leaves out `messages[].name`: the models do not see it"
    assert notes == [message]
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        encode(tokenizer, as_prompts([talk, talk]))
    assert len(caught) == 1
