"""Prompts around an attack string, and which strings may stand there."""

import dataclasses

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.tiny import VOCAB
from tests.tuco.tiny_tokenizer import BOS, bos_tokenizer
from tuco_jax.attacks.gcg import Options
from tuco_jax.attacks.layout import Goal, allowed_tokens, lay_out, surviving

GOALS = [Goal("tea?", "Yes"), Goal("cups", "Sure")]

SMALL = Options(steps=4, candidates=12, topk=8, start="! ! !", chunk=5)


@pytest.fixture(scope="module")
def tokenizer():
    return bos_tokenizer()


@pytest.mark.parametrize("placement", ["prefix", "suffix"])
def test_layout_puts_the_string_before_or_behind_the_request(tokenizer, placement):
    options = dataclasses.replace(SMALL, placement=placement)
    for goal, own in zip(
        GOALS, lay_out(tokenizer, GOALS, options.start, options.placement), strict=True
    ):
        parts = ["! ! !", goal.request][:: 1 if placement == "prefix" else -1]
        assert tokenizer.decode(own.pieces.attack.tolist()) == "! ! !"
        assert tokenizer.decode(own.pieces.target.tolist()) == goal.target
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": " ".join(parts)}],
            tokenize=False,
            add_generation_prompt=True,
        )
        expected = tokenizer(text + goal.target, add_special_tokens=False)["input_ids"]
        assert own.pieces.whole.tolist() == expected
        assert own.left + "! ! !" + own.right == text + goal.target


def test_plain_text_keeps_the_tokenizer_s_bos():
    plain = bos_tokenizer()
    plain.chat_template = None
    (own,) = lay_out(plain, GOALS[:1], "! ! !", "suffix")
    assert own.pieces.before[0] == BOS
    assert plain.decode(own.pieces.whole[1:].tolist()) == "tea? ! ! ! Yes"


def test_strings_hold_printable_tokens_alone(tokenizer):
    allowed = allowed_tokens(tokenizer, VOCAB)
    texts = [tokenizer.decode([i]) for i in np.flatnonzero(allowed)]
    assert len(texts) == 95 and all(t.isascii() and t.isprintable() for t in texts)
    wide = allowed_tokens(tokenizer, VOCAB, non_ascii=True)
    assert wide.sum() > 95 and not wide[256:].any()


def test_candidates_that_do_not_come_back_are_dropped(tokenizer):
    layouts = lay_out(tokenizer, GOALS, "! ! !", "suffix")
    start = layouts[0].pieces.attack
    broken, blank, good = start.copy(), start.copy(), start.copy()
    broken[1] = tokenizer("\u00e9", add_special_tokens=False)["input_ids"][0]  # half of it
    blank[0] = start[1]  # a blank at the end of the request's own
    good[2] = tokenizer("x", add_special_tokens=False)["input_ids"][0]
    survives = surviving(tokenizer, layouts, np.stack([broken, blank, good]))
    assert survives.tolist() == [False, False, True]


def test_a_string_that_merges_with_its_surroundings_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"all in one": 0, "?": 1}, "?"))
    merged = PreTrainedTokenizerFast(tokenizer_object=core)
    with pytest.raises(InputError, match="goal 1: the tokenizer merges the string or the target"):
        lay_out(merged, GOALS, "! ! !", "suffix")
