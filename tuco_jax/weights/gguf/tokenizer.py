"""The tokenizer that a GGUF file's metadata describes, as transformers would have it.

Two kinds: byte-level BPE ("gpt2": merges in the file, text cut by a rule that `pre` names) and
SentencePiece BPE ("llama": merges follow from the vocabulary, unknown characters become bytes).
"""

import math
from collections.abc import Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

from common_jax.errors import InputError
from tuco_jax.weights.rust import rust_errors

__all__ = ["build_tokenizer"]

_CONTROL, _USER_DEFINED = 3, 4
_LONGEST = 2048  # characters of a token, or of the two of a merge
_SPACE = "\u2581"

# How text is cut into words before merges, as the models' own tokenizers do.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASELESS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _CASELESS % "{1,3}", _CASELESS % ""
_CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# There, a word that is a token is never built by merges, and BOS is the default.
_LLAMA3_NAMES = ("llama-bpe", "llama-v3", "llama3")


def build_tokenizer(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast | None:
    """The tokenizer with its special tokens, default BOS and chat template; None without one.

    Raises InputError, which names the field, for a kind of tokenizer that is not supported.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return None
    fields = {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.")
    }
    kind, tokens = fields.get("model"), fields["tokens"]
    _check_texts(fields)
    if kind == "gpt2":
        core = _byte_level(fields, tokens)
    elif kind == "llama":
        gemma = metadata["general.architecture"].startswith("gemma")
        core = _sentencepiece(fields, tokens, gemma)
    else:
        raise InputError(f"tokenizer.ggml.model {kind!r} is not supported; gpt2 and llama are")
    usual = kind == "llama" or fields.get("pre") in _LLAMA3_NAMES
    return _wrap(core, fields, tokens, add_bos=bool(fields.get("add_bos_token", usual)))


def _check_texts(fields: Mapping[str, Any]) -> None:
    """Tokens and merges are texts, and no longer than one of a vocabulary can be."""
    for name in ("tokens", "merges"):
        texts = fields.get(name, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"tokenizer.ggml.{name} must be a list of texts")
        longest = max(map(len, texts), default=0)
        if longest > _LONGEST:
            raise InputError(
                f"tokenizer.ggml.{name} holds a text of {longest} characters; the file is corrupt"
            )
    template = fields.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise InputError("tokenizer.chat_template must be a text")


def _byte_level(fields: Mapping[str, Any], tokens: list[str]) -> Tokenizer:
    pre = fields.get("pre", "default")
    if pre not in _CUTS:
        raise InputError(
            f"tokenizer.ggml.pre {pre!r} is not supported; supported are {', '.join(_CUTS)}"
        )
    if "merges" not in fields:
        raise InputError("tokenizer.ggml.merges is missing; convert the model again")
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in fields["merges"])]
    core = _bpe(tokens, merges, ignore_merges=pre in _LLAMA3_NAMES)
    if _CUTS[pre] == (_QWEN2,):
        core.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in _CUTS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(fields: Mapping[str, Any], tokens: list[str], gemma: bool) -> Tokenizer:
    """Merges by descending score; Gemma's scores do not rank its tokens, their ids do."""
    if gemma:  # spaces of runs of them are written as such, not as in other tokens
        tokens = [_SPACE * len(t) if t.strip(" ") == "" else t for t in tokens]
        scores = [-float(i) for i in range(len(tokens))]
    elif len(fields.get("scores", ())) == len(tokens):
        scores = [float(s) for s in fields["scores"]]
        if not all(map(math.isfinite, scores)):
            raise InputError("tokenizer.ggml.scores holds NaN or infinity")
    else:
        raise InputError("tokenizer.ggml.scores must hold one number a token")
    unk = _token(tokens, fields.get("unknown_token_id", 0), "unknown")
    core = _bpe(tokens, _merges(tokens, scores), fuse_unk=True, byte_fallback=True, unk_token=unk)
    decode = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    if fields.get("add_space_prefix", True):
        # As llama.cpp: a space before the text, and before what follows each special token, also
        # where one stands there.
        spaces.insert(0, normalizers.Prepend(_SPACE))
        decode.append(decoders.Strip(" ", left=1))
    core.normalizer = normalizers.Sequence(spaces)
    core.decoder = decoders.Sequence(decode)
    return core


def _merges(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of a token into two tokens, best token first, ties by the shorter left part."""
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (-scores[i], cut, len(token) - cut, token)
        for token, i in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    return [(token[:cut], token[cut:]) for _, cut, _, token in sorted(merges, key=lambda m: m[:3])]


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    with rust_errors("the tokenizer's vocabulary and merges disagree"):
        vocabulary = {token: i for i, token in enumerate(tokens)}
        return Tokenizer(models.BPE(vocabulary, merges, **options))


def _wrap(
    core: Tokenizer, fields: Mapping[str, Any], tokens: list[str], add_bos: bool
) -> PreTrainedTokenizerFast:
    """Register tokens that are never cut, name the special ones, set defaults and template."""
    with rust_errors("the tokenizer's special tokens cannot be used"):
        tokenizer = _wrapped(core, fields, tokens, add_bos)
        tokenizer("a b", verbose=False)  # what does not work together shows when it is used
        return tokenizer


def _wrapped(
    core: Tokenizer, fields: Mapping[str, Any], tokens: list[str], add_bos: bool
) -> PreTrainedTokenizerFast:
    types = fields.get("token_type", ())
    known = core.get_vocab(with_added_tokens=False)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, t in zip(tokens, types, strict=False)
            if t == kind and token in known
        ]
        (core.add_special_tokens if special else core.add_tokens)(added)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{name}_token": _token(tokens, fields[f"{key}_token_id"], key)
        for name, key in names.items()
        if f"{key}_token_id" in fields
    }
    if add_bos and "bos_token" not in special:
        raise InputError("tokenizer.ggml.bos_token_id is missing, but add_bos_token is set")
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=core,
        add_bos_token=add_bos,
        add_eos_token=bool(fields.get("add_eos_token", False)),
        clean_up_tokenization_spaces=False,
        **special,
    )
    wrapped.chat_template = fields.get("chat_template")
    return wrapped


def _token(tokens: list[str], index: Any, key: str) -> str:
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise InputError(f"tokenizer.ggml.{key}_token_id {index} is beyond the vocabulary")
    return tokens[index]
