"""Where parameters of a base are, by their Hugging Face names."""

from tests.tuco import random_models as rm
from tuco_jax.weights.peft.places import HEAD, Places


def test_places_and_shapes():
    places = Places(rm.config(tied_head=True))
    up = places.find("model.layers.2.mlp.up_proj.weight")
    assert up is not None and up.at == (2,)
    assert up.name == "model.layers.2.mlp.up_proj.weight"
    assert places.shape(up.row.paths[0]) == (24, 40)
    assert places.find("model.layers.3.mlp.up_proj.weight") is None
    assert places.find("model.layers.0.self_attn.q_norm.weight") is None  # not in this config
    head = places.find("lm_head.weight")  # tied, and yet an adapter may give one
    assert head is not None and head.is_end and places.shape(HEAD) == (24, 61)
    places.rows = 70
    assert places.shape(HEAD) == (24, 70) and places.shape("embed/table") == (70, 24)
