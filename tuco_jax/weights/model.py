"""What every importer returns: a model, or one that is open to be read."""

from typing import NamedTuple, Protocol

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.weights.arrays import Placement

__all__ = ["Model", "OpenModel", "Weights"]


class Model(NamedTuple):
    """A model read from a directory, a file or a store.

    tokenizer: None where it has none. hf_config: the Hugging Face config that `config` was mapped
    from, for an export; None where no such config says the same.
    """

    config: ModelConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    hf_config: PreTrainedConfig | None = None


class Weights(Protocol):
    """Parameters that are read when asked for, each as often as it is asked for."""

    @property
    def stored(self) -> frozenset[str]:
        """The types that the layers' matrices are stored in, such as "bfloat16"."""
        ...

    def read(self, placement: Placement | None = None, *, layers: bool = True) -> Params:
        """All of them, layers stacked on axis 0, on devices; or those outside the layers."""
        ...

    def layer(self, index: int) -> Params:
        """One layer's, arrays of the host: what `read` has at `index` of "layers"."""
        ...


class OpenModel(NamedTuple):
    """A model whose description is read and checked, and whose weights are yet to be read."""

    config: ModelConfig
    weights: Weights
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    hf_config: PreTrainedConfig | None = None

    def load(self, placement: Placement | None = None, *, layers: bool = True) -> Model:
        """The model, its params all of them or those outside the layers (see `Weights`)."""
        params = self.weights.read(placement, layers=layers)
        return Model(self.config, params, self.tokenizer, self.name, self.hf_config)
