"""Tables in both directions: a tensor is split into parameters, which join into the tensor."""

import numpy as np
import pytest

from tests.tuco.tiny import FAMILIES as NAMES
from tests.tuco.tiny import tiny_hf
from tuco_jax.models.families import from_huggingface
from tuco_jax.weights.keys import FAMILIES


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_tensor_join_into_it(name):
    model, hf_config = tiny_hf(name)
    config, family = from_huggingface(hf_config), FAMILIES[name]
    tensors = {family.bare(key): value.numpy() for key, value in model.state_dict().items()}
    found = 0
    for row in family.rows:
        tensor = tensors.get(family.bare(row.tensor.format(l=1, e=2)))
        if tensor is not None:
            parts = row.layout.split(tensor, config)
            assert len(parts) == len(row.paths)
            np.testing.assert_array_equal(row.layout.join(list(parts), config), tensor)
            found += 1
    assert found >= 8


def test_one_tensor_by_its_spellings():
    llama, neox = FAMILIES["llama"], FAMILIES["gpt_neox"]
    assert llama.bare("model.norm.weight") == llama.bare("norm.weight") == "norm.weight"
    assert neox.bare("lm_head.weight") == neox.bare("embed_out.weight")
    gemma = FAMILIES["gemma3_text"]
    spelt = {
        gemma.bare(p + "norm.weight") for p in ("model.language_model.", "language_model.model.")
    }
    assert spelt == {"norm.weight"}
