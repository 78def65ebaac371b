"""What every importer returns."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params

__all__ = ["Model"]


class Model(NamedTuple):
    """A model read from a directory, a file or a store; `tokenizer` is None where it has none."""

    config: ModelConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase | None
    name: str
