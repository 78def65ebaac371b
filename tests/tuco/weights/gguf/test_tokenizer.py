"""Tokenizers of GGUF files against transformers' loader, tiny vocabularies and SmolLM2's."""

import json
import pathlib
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tuco.tiny import tiny_hf
from tests.tuco.weights.gguf.writer import write
from tuco_jax.datasets.assets import fetch
from tuco_jax.weights.gguf.file import GGUFFile
from tuco_jax.weights.gguf.tokenizer import build_tokenizer

CORPUS = (
    pathlib.Path(__file__).read_text(encoding="utf-8").splitlines()
    + [
        "The keeper lit the lamp 12 times in 1987, 365 nights a year; they'll say we've gone.",
        "naïve café, Zürich, 東京タワー, Здравствуйте, “quoted” — and so on…",
    ]
    * 3
)
STRINGS = [
    "Hello world",
    "don't I'LL we'Ve they're",
    "year 2024, 3.14159, and 12345678 more",
    " one leading, one trailing ",
    "a  b   c    d     e\t\tf",
    "naïve café 東京タワー 🙂👩‍👩‍👧 Здравствуйте",
    "\n\n\tdef f(x):\n    return x  # tab\t\t\n\n\n",
    "\r\n a\r\n\r\n",
    "if (a<=b&&c!=d){$x+=1;}",
    "<b>bold</b> <0x0A> \x00 \ufffd \u00a0nbsp\u2003em",
    "x" * 50,
    "",
    " ",
]
SPECIAL = ["<|im_start|>user\nhi <|im_end|>\n", "say <think>hm</think> twice<|im_end|><|im_end|>"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?\nAnd  then?"},
    {"role": "assistant", "content": " four and six "},
    {"role": "user", "content": "Merci, ça va 🙂"},
]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train(pre_tokenizer, alphabet, size):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def byte_level_fields(pre):
    """A byte-level vocabulary whose first tokens are special, or meant to be matched whole."""
    core = train(
        pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet(), 500
    )
    learnt = sorted(core.get_vocab(), key=lambda t: core.get_vocab()[t])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    merges = json.loads(core.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": special + learnt,
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * len(learnt),
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_fields(**more):
    """A SentencePiece vocabulary: bytes, then pieces, the earlier the better."""
    metaspace = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=True)
    core = train(metaspace, [], 400)
    learnt = sorted(core.get_vocab(), key=lambda t: core.get_vocab()[t])
    learnt = [t for t in learnt if t != "\u2581\u2581"]
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>"]
    parts = special + [f"<0x{i:02X}>" for i in range(256)] + learnt
    scores = [0.0] * (len(parts) - len(learnt)) + [-float(i) for i in range(len(learnt))]
    types = [2, 3, 3, 3, 3, 4] + [6] * 256 + [1] * len(learnt)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": parts,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    } | more


def both(directory, fields, family="llama"):
    """Our tokenizer of a file with these fields, and transformers' of the same file."""
    hf, hf_config = tiny_hf(family, num_hidden_layers=1, layer_types=None)
    write(directory / "m.gguf", hf, hf_config, metadata=fields)
    ours = build_tokenizer(GGUFFile(directory / "m.gguf").metadata)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory), gguf_file="m.gguf")
    assert ours is not None
    return ours, theirs


def as_llama_cpp(tokenizer, text, special=True):
    """Ids of a SentencePiece text: each part begins with a space, if it begins with one or not.

    llama.cpp takes special tokens out first, then puts a space before the text, and before what
    follows each of them. Transformers puts one at the beginning alone, where there is none.
    """
    names = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    ids = [tokenizer.bos_token_id] if special else []
    for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        if part in names:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            ids += tokenizer(" " + part, add_special_tokens=False)["input_ids"]
    return ids


def assert_equal(ours, theirs, strings, spaced=False):
    for text in strings:
        ids = as_llama_cpp(theirs, text) if spaced else theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )
    assert len(ours) == len(theirs)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    if theirs.chat_template:
        for generation in (True, False):
            arguments = dict(add_generation_prompt=generation, return_dict=False)
            ids = ours.apply_chat_template(MESSAGES, **arguments)
            if spaced:
                text = theirs.apply_chat_template(MESSAGES, tokenize=False, **arguments)
                assert ids == as_llama_cpp(theirs, text, special=False)
            else:
                assert ids == theirs.apply_chat_template(MESSAGES, **arguments)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level(pre, tmp_path):
    ours, theirs = both(tmp_path, byte_level_fields(pre))
    assert_equal(ours, theirs, STRINGS + SPECIAL)
    assert ours.bos_token_id not in ours("Hello")["input_ids"]


def test_default_bos_and_eos_are_the_files(tmp_path):
    fields = byte_level_fields("gpt-2")
    fields |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ours, theirs = both(tmp_path, fields)
    assert_equal(ours, theirs, STRINGS)
    ids = ours("Hello")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    assert ours("Hello", add_special_tokens=False)["input_ids"] == ids[1:-1]


def test_llama3_adds_bos_where_the_file_does_not_say_and_takes_whole_words(tmp_path):
    fields = byte_level_fields("llama-bpe")
    del fields["tokenizer.ggml.add_bos_token"]
    fields["tokenizer.ggml.tokens"].append("\u0120zzyzx")  # no merges lead to it
    fields["tokenizer.ggml.token_type"].append(1)
    ours, _ = both(tmp_path, fields)
    assert ours.convert_ids_to_tokens(ours(" zzyzx")["input_ids"]) == [
        "<|im_start|>",
        "\u0120zzyzx",
    ]


@pytest.mark.parametrize("prefix", [{}, {"tokenizer.ggml.add_space_prefix": True}])
def test_sentencepiece(prefix, tmp_path):
    ours, theirs = both(tmp_path, sentencepiece_fields(**prefix))
    plain = [text for text in STRINGS if not text.startswith(" ")]
    ids = [theirs(text)["input_ids"] for text in plain]
    assert [ours(text)["input_ids"] for text in plain] == ids
    assert_equal(ours, theirs, STRINGS + SPECIAL, spaced=True)
    pieces = ours.convert_ids_to_tokens(ours("<|im_end|>a <think> a")["input_ids"])
    assert pieces[2].startswith("\u2581") and "<think>" in pieces
    after = pieces[pieces.index("<think>") + 1 :]
    assert "".join(after) == "\u2581\u2581a"
    assert ours("Hello")["input_ids"][0] == 1  # files that do not say add BOS


def test_gemma(tmp_path):
    """Runs of spaces are stored as such, newlines are user-defined, and ids rank merges."""
    fields = sentencepiece_fields()
    names = ["<unk>", "<bos>", "<eos>", "<pad>", "<mask>"]
    fields["tokenizer.ggml.tokens"][: len(names)] = names
    fields["tokenizer.ggml.padding_token_id"] = 3
    fields["tokenizer.chat_template"] = "{{ bos_token }}{{ messages[0]['content'] }}"
    more = ["\n", "\n\n", "  ", "   ", "    "]
    fields["tokenizer.ggml.tokens"] += more
    fields["tokenizer.ggml.scores"] = [-1000.0] * len(fields["tokenizer.ggml.tokens"])
    fields["tokenizer.ggml.token_type"] += [4] * len(more)
    fields |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": True}
    fields |= {".attention.sliding_window": 5}
    ours, theirs = both(tmp_path, fields, "gemma3_text")
    assert_equal(ours, theirs, STRINGS + SPECIAL)
    assert ours.convert_ids_to_tokens(ours("a   \n")["input_ids"])[2] == "\u2581\u2581\u2581"


def test_it_can_be_saved_as_a_hugging_face_tokenizer(tmp_path):
    ours, _ = both(tmp_path, sentencepiece_fields())
    ours.save_pretrained(str(tmp_path / "saved"))
    again = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "saved"))
    assert_equal(ours, again, STRINGS + SPECIAL)


@pytest.fixture(scope="module")
def smollm2():
    path = next(fetch("smollm2").glob("*.gguf"))
    ours = build_tokenizer(GGUFFile(path).metadata)
    return ours, PreTrainedTokenizerFast.from_pretrained(str(path.parent), gguf_file=path.name)


def test_smollm2(smollm2):
    ours, theirs = smollm2
    assert_equal(ours, theirs, STRINGS + SPECIAL)
    assert len(ours) == 49152 and ours.bos_token == "<|im_start|>"


def test_smollm2_cuts_digits_from_spaces_as_the_original(smollm2):
    """Transformers' loader does not know `smollm` and cuts as GPT-2; the model was trained so."""
    ours, theirs = smollm2
    original = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(original)
    strings = ["1 2  3   44", "   7", "x½ ½ Ⅻ ٣٤ 10² km/h 1,000,000.50", "v1.2.3-rc4\n  5"]
    assert_equal(ours, theirs, STRINGS + SPECIAL + strings)
    assert ours("   7")["input_ids"] == ours("   ")["input_ids"] + ours("7")["input_ids"]
