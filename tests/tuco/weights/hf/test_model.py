"""Checkpoints in and out: what is read, what is refused and how it says so."""

import json
import pathlib
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common_jax.errors import InputError
from tests.tuco.tiny import FAMILIES, save_tiny, tiny_hf, tiny_tokenizer
from tests.tuco.weights.refused import refusal
from tuco_jax.weights.hf.model import export, load, read_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def llama(tmp_path):
    """A small llama checkpoint that a test may damage."""
    save_tiny(tmp_path, "llama", num_hidden_layers=2)
    return tmp_path


def edit(directory: pathlib.Path, change):
    """Rewrite the weights after change(tensors), which may return another dict."""
    tensors = load_file(directory / WEIGHTS)
    tensors = change(tensors) or tensors
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def edit_config(directory: pathlib.Path, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


# Reading


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_half_precision_files_give_the_same_parameters(family, dtype, tmp_path):
    save_tiny(tmp_path / "one", family, dtype=dtype)
    save_tiny(tmp_path / "many", family, dtype=dtype, max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    half = load(str(tmp_path / "one"), dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype(dtype)}
    full = load(str(tmp_path / "many"), dtype="float32")
    assert {x.dtype for x in jax.tree.leaves(full.params)} == {jnp.dtype("float32")}
    assert_equal(jax.tree.map(lambda x: x.astype("float32"), half.params), full.params)
    assert full.config == half.config


def test_float32_rounds_to_the_dtype_asked_for(llama):
    full, half = load(str(llama)), load(str(llama), dtype="bfloat16")
    assert_equal(jax.tree.map(lambda x: x.astype("bfloat16"), full.params), half.params)


def test_model_holds_name_and_tokenizer(llama):
    model = load(str(llama))
    assert model.name == str(llama)
    assert model.tokenizer is not None
    assert model.tokenizer("hey").input_ids == tiny_tokenizer()("hey").input_ids
    assert model.tokenizer.chat_template == tiny_tokenizer().chat_template
    assert load(str(llama), tokenizer=False).tokenizer is None
    for path in llama.glob("tokenizer*"):
        path.unlink()
    assert load(str(llama)).tokenizer is None


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("llama", "model."), ("gpt2", "transformer."), ("gpt_neox", "gpt_neox.")],
)
def test_names_without_prefix_and_old_buffers(family, prefix, tmp_path):
    """As the hub's gpt2 is stored, with the causal masks and frequencies of old releases."""
    save_tiny(tmp_path, family)
    plain = load(str(tmp_path))
    layers = {"llama": "layers.0.self_attn", "gpt2": "h.0.attn", "gpt_neox": "layers.0.attention"}
    old = {
        "llama": ["rotary_emb.inv_freq"],
        "gpt2": ["bias", "masked_bias"],
        "gpt_neox": ["bias", "masked_bias", "rotary_emb.inv_freq"],
    }

    def strip(tensors):
        bare = {name.removeprefix(prefix): value for name, value in tensors.items()}
        buffers = {f"{layers[family]}.{name}": np.ones((2, 2), np.uint8) for name in old[family]}
        return bare | buffers

    edit(tmp_path, strip)
    assert_equal(plain.params, load(str(tmp_path)).params)


def test_gpt_neox_head_under_its_new_name(tmp_path):
    save_tiny(tmp_path, "gpt_neox")
    plain = load(str(tmp_path))
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("embed_out.weight")}))
    assert_equal(plain.params, load(str(tmp_path)).params)


@pytest.mark.parametrize("spelling", ["language_model.model.", "model.language_model."])
def test_text_model_of_a_multimodal_gemma3(spelling, tmp_path):
    save_tiny(tmp_path, "gemma3_text")
    plain = load(str(tmp_path))
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="gemma3", text_config=text)))

    def rename(tensors):
        renamed = {spelling + name.removeprefix("model."): t for name, t in tensors.items()}
        return renamed | {"vision_tower.patch.weight": np.ones((2, 2), np.float32)}

    edit(tmp_path, rename)
    whole = load(str(tmp_path))
    assert whole.config == plain.config
    assert_equal(plain.params, whole.params)


def test_large_tensors_are_read_in_blocks(tmp_path, monkeypatch):
    save_tiny(tmp_path, "gemma2", tie_word_embeddings=False)
    whole = load(str(tmp_path))
    monkeypatch.setattr("tuco_jax.weights.assemble._BLOCK", 100)  # 3 rows of width 32
    assert_equal(whole.params, load(str(tmp_path)).params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_go_straight_to_their_shards(dtype, tmp_path, monkeypatch):
    save_tiny(tmp_path, "phi3")
    whole = load(str(tmp_path), dtype=dtype)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def placement(path, shape):
        axes = [axis for axis, size in enumerate(shape) if size % 8 == 0]
        names = ["fsdp" if axes and axis == axes[-1] else None for axis in range(len(shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))

    put, sizes = jax.device_put, []  # never whole on one device first
    monkeypatch.setattr(jax, "device_put", lambda x, to: sizes.append(x.nbytes) or put(x, to))
    sharded = load(str(tmp_path), dtype=dtype, placement=placement)
    monkeypatch.undo()
    leaves = jax.tree.leaves(sharded.params)
    assert max(sizes) == max(x.addressable_shards[0].data.nbytes for x in leaves)
    kernel = sharded.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding == placement("", kernel.shape)
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 32, 6)}
    assert_equal(whole.params, sharded.params)


# Tied embeddings


def test_a_tied_models_equal_head_is_fine_and_a_differing_one_is_not_dropped(tmp_path):
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    plain = load(str(tmp_path))
    assert "head" not in plain.params
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_equal(plain.params, load(str(tmp_path)).params)

    def nudge(tensors):
        tensors["lm_head.weight"][-1, -1] += 1

    edit(tmp_path, nudge)
    message = refusal(tmp_path)
    assert (
        f"{tmp_path / WEIGHTS}: tensor lm_head.weight differs from model.embed_tokens" in message
    )
    assert "tie_word_embeddings" in message
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1]}))
    assert "differs from model.embed_tokens.weight" in refusal(tmp_path)


# Bad tensors

K = "model.layers.1.self_attn.k_proj.weight"


def spoil(value):
    def change(tensors):
        tensors[K][3, 2] = value

    return change


BAD_TENSORS = {
    "missing": (lambda t: {name: t[name] for name in t if name != K}, f"tensor {K} is missing"),
    "unknown": (
        lambda t: t.update({"model.layers.1.self_attn.k_proj.lora": np.ones(2, np.float32)}),
        "tensor model.layers.1.self_attn.k_proj.lora is unknown to family 'llama'",
    ),
    "a layer too many": (
        lambda t: t.update({"model.layers.2.input_layernorm.weight": np.ones(2, np.float32)}),
        "tensor model.layers.2.input_layernorm.weight is unknown",
    ),
    "misshaped": (
        lambda t: t.update({K: t[K][:, :-1].copy()}),
        f"{WEIGHTS}: tensor {K} has shape [32, 31], which does not give layers/attention/k/kernel "
        "the shape [32, 32] that the config calls for",
    ),
    "doubled by prefix": (
        lambda t: t.update({K.removeprefix("model."): t[K].copy()}),
        f"is doubled: {WEIGHTS} holds it as",
    ),
    "nan": (spoil(np.nan), f"{WEIGHTS}: tensor {K} holds NaN or infinity"),
    "infinity": (spoil(-np.inf), f"{WEIGHTS}: tensor {K} holds NaN or infinity"),
    "integers": (
        lambda t: t.update({K: t[K].astype(np.int8)}),
        f"{WEIGHTS}: tensor {K} is stored as I8; only F32, F16, BF16 are read",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_named(case, llama):
    change, message = BAD_TENSORS[case]
    edit(llama, change)
    error = refusal(llama)
    assert message in error
    assert str(llama) in error


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.query_key_value.weight"),
    ],
)
def test_a_misshaped_fused_tensor_is_named(family, tensor, tmp_path):
    save_tiny(tmp_path, family)
    edit(tmp_path, lambda t: t.update({tensor: t[tensor][:-1].copy()}))
    assert f"{WEIGHTS}: tensor {tensor} has shape" in refusal(tmp_path)


def test_numbers_beyond_the_dtype_are_named(llama):
    edit(llama, spoil(1e5))
    load(str(llama), dtype="bfloat16")
    with pytest.raises(InputError, match=f"tensor {K} holds numbers too large for float16"):
        load(str(llama), dtype="float16")


def test_dtype_is_checked(llama):
    with pytest.raises(InputError, match="dtype 'int4' is not one of float32, bfloat16, float16"):
        load(str(llama), dtype="int4")


# Bad files


@pytest.fixture
def sharded(tmp_path):
    save_tiny(tmp_path, "qwen2", max_shard_size="20KB", tokenizer=False)
    return tmp_path


def test_a_truncated_file_is_named(llama):
    data = (llama / WEIGHTS).read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100, 4, 0):
        (llama / WEIGHTS).write_bytes(data[:size])
        assert f"{llama / WEIGHTS}: truncated or corrupt safetensors" in refusal(llama)


def test_a_corrupt_header_is_named(llama):
    data = bytearray((llama / WEIGHTS).read_bytes())
    data[8:40] = b"\xff" * 32
    (llama / WEIGHTS).write_bytes(data)
    assert f"{llama / WEIGHTS}: truncated or corrupt safetensors" in refusal(llama)


def test_a_truncated_or_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    assert f"{shard}: truncated or corrupt safetensors" in refusal(sharded)
    shard.unlink()
    assert f"{shard}: no such file, though {INDEX} names it" in refusal(sharded)


def test_a_tensor_in_two_shards_is_named(sharded):
    one, two = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(one)
    name = next(iter(tensors))
    save_file(load_file(two) | {name: tensors[name]}, two, metadata={"format": "pt"})
    error = refusal(sharded)
    assert f"tensor {name} is doubled" in error
    assert one.name in error
    assert two.name in error


def test_an_index_and_its_shards_must_agree(sharded):
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(sharded.glob("*.safetensors"))
    name = next(iter(load_file(shards[0])))
    index["weight_map"][name] = shards[1].name
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{shards[1]}: tensor {name} is missing, though {INDEX} places it" in refusal(sharded)
    (sharded / INDEX).write_text("{")
    assert f"{sharded / INDEX}: not an index of shards" in refusal(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_the_way_to_convert_them(name, llama):
    (llama / WEIGHTS).rename(llama / name)
    for source in (llama, llama / name):
        message = refusal(source)
        assert f"{llama / name}: pickled weights can run code" in message
        assert f"M.from_pretrained('{llama}').save_pretrained('{llama}-safetensors')" in message


def test_a_directory_without_weights_or_config_is_named(llama):
    (llama / WEIGHTS).unlink()
    message = refusal(llama)
    assert message.startswith(f"{llama}: holds neither {WEIGHTS} nor {INDEX}; ")
    assert "pickled weights only, convert it with transformers' save_pretrained" in message
    (llama / "config.json").unlink()
    assert refusal(llama) == f"{llama / 'config.json'}: no such file; is this a model's directory?"
    (llama / "adapter_config.json").write_text("{}")
    assert "a PEFT adapter, which needs its base model" in refusal(llama)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "not a JSON object"),
        ('{"vocab_size": 3}', "no field model_type"),
        (
            '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}',
            "model_type 'mine' is not supported",
        ),
        ('{"model_type": "bloom"}', "model_type 'bloom' is not supported"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', "multiple"),
    ],
)
def test_a_bad_config_is_named(text, message, llama):
    (llama / "config.json").write_text(text)
    error = refusal(llama)
    assert error.startswith(f"{llama / 'config.json'}: ")
    assert message in error


def test_a_bad_tokenizer_is_named(llama):
    (llama / "tokenizer.json").write_text('{"model": 3}')
    assert f"{llama}: its tokenizer cannot be read" in refusal(llama)
    load(str(llama), tokenizer=False)


def test_a_config_for_another_model_finds_missing_tensors(llama):
    edit_config(llama, num_hidden_layers=3)
    error = refusal(llama)
    assert (
        f"{llama}: tensor model.layers.2.input_layernorm.weight is missing (and 15 more)" in error
    )


# Sources


def test_sources_that_are_no_directory(tmp_path):
    assert "no such directory, nor is it a hub id" in refusal(tmp_path / "nowhere")
    assert "no such directory, nor is it a hub id" in refusal("./nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file; give the directory" in refusal(tmp_path / "file")
    assert refusal("some/model") == (
        "some/model: no such directory, and the hub cannot be reached and its cache holds no "
        "copy; give a directory"
    )


def test_a_hub_id_is_read_from_the_cache(llama, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(llama, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    model = load("some/model")
    assert model.name == "some/model"
    assert_equal(model.params, load(str(llama)).params)


# Writing


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_model_again(family, tmp_path):
    """transformers loads it with equal logits, and so do we; in shards, too."""
    theirs, _ = save_tiny(tmp_path / "in", family, seed=4)
    model = load(str(tmp_path / "in"))
    out = tmp_path / "runs" / "out"
    hf_config = read_config(tmp_path / "in")
    export(out, model.config, model.params, model.tokenizer, hf_config, max_shard_bytes=20_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    tokens = torch.arange(12)[None] * 7
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, again(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("hey").input_ids == tiny_tokenizer()("hey").input_ids
    ours = load(str(out))
    assert ours.config == model.config
    assert_equal(ours.params, model.params)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_export_keeps_dtype_and_places(tmp_path):
    """bfloat16 stays bfloat16, sharded parameters are gathered, a single file stays single."""
    save_tiny(tmp_path / "in", "gpt_neox", dtype="bfloat16")
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    model = load(
        str(tmp_path / "in"),
        dtype="bfloat16",
        placement=lambda path, shape: spread if path.startswith("layers/") else None,
    )
    out = tmp_path / "out"
    export(out, model.config, model.params, None, read_config(tmp_path / "in"))
    old, new = load_file(tmp_path / "in" / WEIGHTS), load_file(out / WEIGHTS)
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert new[name].dtype == value.dtype
        np.testing.assert_array_equal(new[name], value)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_of_changed_parameters_and_an_occupied_directory(tmp_path):
    hf_model, hf_config = tiny_hf("qwen3")
    hf_model.save_pretrained(tmp_path / "in")
    model = load(str(tmp_path / "in"))
    changed = jax.tree.map(lambda x: 1.5 * x + 0.25, model.params)
    export(tmp_path / "out", model.config, changed, None, hf_config)
    assert_equal(load(str(tmp_path / "out")).params, changed)
    with pytest.raises(InputError, match="exists and is not empty; name a new directory"):
        export(tmp_path / "out", model.config, changed, None, hf_config)
    assert_equal(load(str(tmp_path / "out")).params, changed)
    _, other = tiny_hf("qwen3", rms_norm_eps=0.1)
    with pytest.raises(ValueError, match="hf_config describes another model"):
        export(tmp_path / "new", model.config, changed, None, other)
    assert not (tmp_path / "new").exists()
