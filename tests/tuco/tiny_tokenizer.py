"""A byte-level tokenizer that begins plain texts with a BOS, as Llama's does."""

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.tuco.tiny import tiny_tokenizer

BOS = 256


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with <s> before every plain text; its chat template writes its own <s>."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer
