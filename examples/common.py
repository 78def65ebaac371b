"""The pair of every example: the shipped refusal adapter's, or with --tiny a random one."""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig, Rope
from tuco_jax.models.pair import Pair

__all__ = ["arguments", "load"]


def arguments(about: str) -> argparse.ArgumentParser:
    """A parser with --tiny, for the example's own options to be added to."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--tiny", action="store_true", help="a random model, for a quick try")
    return parser


def load(tiny: bool) -> tuple[Pair, Any]:
    """(pair, tokenizer); the default pair is fetched once and checked (about 100 MB)."""
    if tiny:
        return _tiny_pair(), _tiny_tokenizer()
    from tuco_jax.studies.base import StudiedPairOptions, load_studied_pair

    pair, tokenizer, _ = load_studied_pair(StudiedPairOptions())
    return pair, tokenizer


def _tiny_pair() -> Pair:
    """Two random three-layer models, the second near the first."""
    config = ModelConfig(
        family="llama",
        vocab_size=259,
        width=24,
        depth=3,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp_width=40,
        max_positions=256,
        ropes=(Rope(tuple(10000.0 ** (-i / 8) for i in range(0, 8, 2)), base=10000.0),),
    )
    old, change = (decoder.init(config, jax.random.key(seed)) for seed in (0, 1))
    new = jax.tree.map(lambda a, b: a + 0.3 * jnp.asarray(b), old, change)
    return Pair(old, new, {}, config, config)


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer
