"""What a tensor of an adapter is, by its name."""

from tuco_jax.weights.peft.tensors import sort

Q = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def test_parts_of_modules():
    names = {
        f"{PREFIX}{Q}.lora_A.weight": (Q, "lora_A"),
        f"{PREFIX}{Q}.lora_B.default.weight": (Q, "lora_B"),
        f"{PREFIX}{Q}.lora_B.bias": (Q, "lora_B.bias"),
        f"{PREFIX}_orig_mod.{Q}.lora_magnitude_vector": (Q, "lora_magnitude_vector"),
        f"module.{PREFIX}{Q}.lokr_w1_a": (Q, "lokr_w1_a"),
        f"{Q}.lokr_w1": (Q, "lokr_w1"),
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": (
            "model.embed_tokens",
            "trainable_tokens_delta",
        ),
        f"{PREFIX}model.embed_tokens.lora_embedding_A": ("model.embed_tokens", "lora_embedding_A"),
    }
    found = sort(names)
    assert not found.whole
    for tensor, (module, part) in names.items():
        assert found.modules[module][part] == tensor


def test_of_one_parameter_what_was_trained_counts():
    name = f"{PREFIX}model.embed_tokens"
    before, again, trained = (
        f"{name}.original_module.weight",
        f"{name}.modules_to_save.weight",
        f"{name}.weight",
    )
    for tensors, chosen in (
        ([before, again, trained], trained),
        ([trained, again, before], trained),
        ([before, again], again),
        ([before], before),
    ):
        assert sort(tensors).whole == {"model.embed_tokens.weight": chosen}
    norm = "model.layers.0.input_layernorm"
    assert sort([f"{PREFIX}{norm}.ln_tuning_layers.weight"]).whole == {
        f"{norm}.weight": f"{PREFIX}{norm}.ln_tuning_layers.weight"
    }
    assert sort([f"{PREFIX}{Q}.base_layer.bias"]).whole == {
        f"{Q}.bias": f"{PREFIX}{Q}.base_layer.bias"
    }
