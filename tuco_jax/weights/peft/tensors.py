"""An adapter's tensors, sorted by what they are.

PEFT names a tensor after its module and the part that it plays there: `lora_A`, `ia3_l`, ...; a
parameter that is replaced whole has the name of the base's. Where a module was wrapped, the name
may hold the wrapper's (`X.ln_tuning_layers.weight`), and a parameter may be there several times:
`X.weight` is what was trained, `X.modules_to_save.weight` the same, and
`X.original_module.weight` what it was before.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from common_jax.io.wrapped_names import unwrapped
from tuco_jax.weights.peft.layout import PREFIX

__all__ = ["PARTS", "Sorted", "sort"]

PARTS = (
    *("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude_vector", "ia3_l"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "trainable_tokens_delta",
)
_PART = re.compile(
    rf"(.+?)\.(?:token_adapter\.)?({'|'.join(PARTS)})(?:\.default)?(?:\.weight|(\.bias))?"
)
_WRAPPERS = ("ln_tuning_layers.default", "ln_tuning_layers")
_WRAPPERS += ("modules_to_save.default", "modules_to_save", "original_module")


class Sorted(NamedTuple):
    """modules: module -> part -> tensor; a bias of B is the part "lora_B.bias".

    whole: a parameter's Hugging Face name -> the tensor that replaces it.
    """

    modules: dict[str, dict[str, str]]
    whole: dict[str, str]


def sort(tensors: Iterable[str]) -> Sorted:
    """Sort tensors by their names."""
    found = Sorted({}, {})
    places: dict[str, int] = {}  # how near to what was trained, of each whole parameter
    for tensor in tensors:
        name = unwrapped(tensor).removeprefix(PREFIX)
        if match := _PART.fullmatch(name):
            module, part, bias = match.groups()
            found.modules.setdefault(module, {})[part + (bias or "")] = tensor
            continue
        name = name.replace(".token_adapter.", ".").replace(".base_layer.", ".")
        place = 0
        for rank, wrapper in enumerate(_WRAPPERS, start=1):
            if f".{wrapper}." in name:
                name, place = name.replace(f".{wrapper}.", "."), rank
                break
        if place < places.get(name, len(_WRAPPERS) + 1):
            found.whole[name], places[name] = tensor, place
    return found
