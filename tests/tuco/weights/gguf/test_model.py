"""GGUF files made here, every type and architecture, against transformers; and SmolLM2 itself."""

import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf import dequant

from common_jax.errors import InputError
from tests.tuco.tiny import VOCAB, tiny_hf
from tests.tuco.weights.gguf.writer import encode, llama3_factors, write
from tuco_jax.datasets.assets import fetch
from tuco_jax.models import decoder
from tuco_jax.models.families import from_huggingface
from tuco_jax.models.positions import Positions
from tuco_jax.weights.gguf.file import GGUFFile
from tuco_jax.weights.gguf.model import load, read_config
from tuco_jax.weights.hf.model import export, model_config

LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", rope_theta=300.0, factor=4.0)
GEMMA = dict(query_pre_attn_scalar=16)  # the file does not say: a head's width
GEMMA_FIELDS = {
    ".attention.sliding_window": 5,
    ".rope.freq_base_swa": 100.0,
    ".rope.scaling.type": "linear",
    ".rope.scaling.factor": 4.0,
}
BLOCKS = {
    "attn_q": "Q4_0",
    "attn_k": "Q4_1",
    "attn_v": "Q5_0",
    "attn_output": "Q5_1",
    "ffn_gate": "Q8_0",
    "ffn_up": "F16",
    "ffn_down": "BF16",
    "token_embd": "Q8_0",
    "output": "F16",
}
K_BLOCKS = {
    "attn_q": "Q4_K",
    "attn_k": "Q5_K",
    "attn_v": "Q6_K",
    "attn_output": "Q2_K",
    "ffn_gate": "Q3_K",
    "ffn_up": "Q4_K",
    "ffn_down": "Q6_K",
    "token_embd": "Q8_0",
    "output": "Q6_K",
}
WIDE = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)

# name: (family, changes to tests/tuco/tiny.py's config of it, arguments of `write`)
CASES = {
    "mistral, as llama with a window": (
        "mistral",
        dict(sliding_window=5),
        dict(metadata={".attention.sliding_window": 5}),
    ),
    "llama": (
        "llama",
        dict(rope_parameters=dict(rope_type="default", rope_theta=77.0), rms_norm_eps=0.3),
        dict(metadata={".rope.dimension_count": 16, ".attention.value_length": 16}),
    ),
    "llama, tied, linear by its old key": (
        "llama",
        dict(tie_word_embeddings=True, attention_bias=False, rope_parameters=LINEAR),
        dict(metadata={".rope.scale_linear": 4.0}),
    ),
    "llama, blocks": ("llama", dict(hidden_size=64, intermediate_size=96), dict(kinds=BLOCKS)),
    "llama, K-blocks, linear": (
        "llama",
        WIDE | dict(rope_parameters=LINEAR),
        dict(
            kinds=K_BLOCKS,
            metadata={".rope.scaling.type": "linear", ".rope.scaling.factor": 4.0},
        ),
    ),
    "llama 3.1": (
        "llama",
        dict(rope_parameters=LLAMA3),
        dict(rope_factors=llama3_factors(LLAMA3, 16)),
    ),
    "qwen2, tied, heads alike": (
        "qwen2",
        dict(use_sliding_window=False, tie_word_embeddings=True, num_key_value_heads=4),
        dict(kinds={"": "F16"}, metadata={".attention.head_count_kv": None}),
    ),
    "qwen2, yarn": (
        "qwen2",
        dict(use_sliding_window=False, rope_parameters=YARN),
        dict(
            metadata={
                ".rope.scaling.type": "yarn",
                ".rope.scaling.factor": 4.0,
                ".rope.scaling.original_context_length": 16,
            }
        ),
    ),
    "gemma3, pattern in the file": (
        "gemma3_text",
        GEMMA | dict(intermediate_size=64),
        dict(
            metadata=GEMMA_FIELDS | {".attention.sliding_window_pattern": [True, False, True]},
            kinds={"": "Q8_0"},
        ),
    ),
    "gemma3, five to one": (
        "gemma3_text",
        GEMMA
        | dict(
            num_hidden_layers=7,
            layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        ),
        dict(metadata=GEMMA_FIELDS),
    ),
}


def logits_of(model, ids, mask=None):
    config = model.config

    @jax.jit
    def run(params, ids, mask):
        positions = Positions.of(config, mask)
        x = decoder.embed(config, params, ids, positions)
        x, _ = decoder.forward(config, params, x, positions)
        return decoder.logits(config, params, x)

    mask = np.ones(ids.shape, bool) if mask is None else mask
    return np.asarray(run(model.params, jnp.asarray(ids), jnp.asarray(mask)))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_with_the_dequantised_weights(name, tmp_path):
    family, changes, arguments = CASES[name]
    hf, hf_config = tiny_hf(family, **changes)
    held = write(tmp_path / "m.gguf", hf, hf_config, **arguments)
    hf.load_state_dict(held)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 14))
    with torch.no_grad():
        expected = hf(torch.tensor(ids)).logits.numpy()
    model = load(str(tmp_path / "m.gguf"))
    np.testing.assert_allclose(logits_of(model, ids), expected, atol=1e-4, rtol=0)
    assert model.tokenizer is None and model.name == str(tmp_path / "m.gguf")
    assert read_config(model.name) == model.config
    assert model.config == from_huggingface(hf_config)

    # Written as a Hugging Face directory, it is the same model to transformers.
    assert model.hf_config is not None
    export(tmp_path / "out", model.config, model.params, None, model.hf_config)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert model.hf_config.architectures == [type(again).__name__]
    with torch.no_grad():
        np.testing.assert_allclose(
            again(torch.tensor(ids)).logits.numpy(), expected, atol=1e-4, rtol=0
        )


def test_factors_of_another_formula_are_taken_as_they_are(tmp_path):
    """Frequencies are the quotients; no Hugging Face config says so, and none is claimed."""
    hf, hf_config = tiny_hf("llama", rope_parameters=LLAMA3)
    factors = llama3_factors(LLAMA3, 16)
    factors[1] *= 1.1
    write(tmp_path / "m.gguf", hf, hf_config, rope_factors=factors)
    model = load(str(tmp_path / "m.gguf"))
    plain = 500.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(model.config.ropes[0].frequencies, plain / factors, rtol=1e-6)
    assert model.hf_config is None


def test_biases_that_only_a_file_can_have(tmp_path):
    """Query, key and value biases without the output's: no LlamaConfig has that."""
    hf, hf_config = tiny_hf("llama")
    held = write(tmp_path / "m.gguf", hf, hf_config, without="attn_output.bias")
    model = load(str(tmp_path / "m.gguf"))
    assert model.config.qkv_bias and not model.config.out_bias and model.hf_config is None
    hf.load_state_dict(held)
    ids = np.random.default_rng(0).integers(0, VOCAB, (2, 14))
    with torch.no_grad():
        expected = hf(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, ids), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_hold_what_transformers_reads_from_them(kind, tmp_path):
    value = np.random.default_rng(1).normal(size=(37, 512)).astype(np.float32)
    data = encode(value, kind, seed=2)
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("before", np.ones(5, np.float32))
    writer.add_tensor("t", data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(path)
    number = GGMLQuantizationType[kind].value
    expected = dequant.dequantize(torch.tensor(data).flatten(), number).reshape(37, 512).numpy()
    assert file.tensors["t"].shape == (37, 512) and np.abs(expected).max() > 0.5
    np.testing.assert_allclose(file.read("t"), expected, rtol=2e-6, atol=2e-6)
    np.testing.assert_array_equal(file.read("t", slice(5, 21)), file.read("t")[5:21])
    np.testing.assert_array_equal(file.read("before", slice(2, 4)), [1, 1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_come_in_the_dtype_asked_for(dtype, tmp_path):
    hf, hf_config = tiny_hf("gemma3_text")
    write(tmp_path / "m.gguf", hf, hf_config, metadata=GEMMA_FIELDS)
    full = load(str(tmp_path / "m.gguf"))
    half = load(str(tmp_path / "m.gguf"), dtype=dtype)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(dtype), b), full.params, half.params
    )


def test_gemma_27b_has_a_query_scale_of_its_own(tmp_path):
    hf, hf_config = tiny_hf("gemma3_text", num_hidden_layers=62, layer_types=None)
    write(tmp_path / "m.gguf", hf, hf_config, metadata=GEMMA_FIELDS)
    assert read_config(str(tmp_path / "m.gguf")).query_scale == (32 / 4) ** -0.5


# ---- what cannot be read ----

REFUSALS = {
    "architecture": ({"general.architecture": "mamba"}, r"architecture 'mamba' is not supported"),
    "no epsilon": (
        {".attention.layer_norm_rms_epsilon": None},
        r"llama\.attention\.layer_norm_rms_epsilon is missing",
    ),
    "width as a word": ({".embedding_length": "wide"}, r"embedding_length is 'wide', not a posi"),
    "no layers": ({".block_count": 0}, r"block_count is 0, not a positive number"),
    "layers that differ": (
        {".attention.head_count": [4, 4, 2]},
        r"attention\.head_count differs by layer",
    ),
    "half a layer": ({".block_count": 2.5}, r"block_count is 2\.5, not an integer"),
    "other heads": (
        {".attention.key_length": 2**30},
        r"tensor blk\.0\.attn_q\.weight has shape \[64, 32\], but .* 4 heads of 1073741824",
    ),
    "layers beyond number": (
        {".block_count": 2**31},
        r"tensor blk\.2147483647\.attn_norm\.weight is missing",
    ),
    "partial rotation": (
        {".rope.dimension_count": 8},
        r"rope\.dimension_count is 8, but heads are 16 wide",
    ),
    "experts": ({".expert_count": 8}, r"expert_count: mixtures of experts"),
    "a part": ({"split.count": 2}, r"one part of a split model; merge"),
    "rope": ({".rope.scaling.type": "longrope"}, r"rope\.scaling\.type 'longrope'"),
    "one layer more": ({".block_count": 4}, r"tensor blk\.3\.attn_norm\.weight is missing, but"),
    "one layer less": ({".block_count": 2}, r"tensor blk\.2\.attn_k\.bias is unknown"),
    "other width": (
        {".feed_forward_length": 50},
        r"tensor blk\.0\.ffn_down\.weight has shape \[32, 48\], which does not give",
    ),
    "more tokens than rows": (
        {"tokenizer.ggml.tokens": [str(i) for i in range(300)]},
        r"300 tokens, but token_embd\.weight has 272 rows",
    ),
    "tokenizer": (
        {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.model": "rwkv"},
        r"tokenizer\.ggml\.model 'rwkv' is not supported",
    ),
    "pre": (
        {
            "tokenizer.ggml.tokens": ["a"],
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "superbpe",
        },
        r"tokenizer\.ggml\.pre 'superbpe' is not supported; supported are gpt-2",
    ),
    "merges": (
        {
            "tokenizer.ggml.tokens": ["a"],
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.merges": ["a b"],
        },
        r"vocabulary and merges disagree",
    ),
    "bos": (
        {
            "tokenizer.ggml.tokens": ["a"],
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": [0.0],
            "tokenizer.ggml.bos_token_id": 9,
        },
        r"tokenizer\.ggml\.bos_token_id 9 is beyond the vocabulary",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_file_and_the_field(name, tmp_path):
    metadata, message = REFUSALS[name]
    metadata = dict(metadata)
    hf, hf_config = tiny_hf("llama")
    path = tmp_path / "m.gguf"
    architecture = metadata.pop("general.architecture", None)
    write(path, hf, hf_config, metadata=metadata)
    if architecture:
        path.write_bytes(path.read_bytes().replace(b"llama", architecture.encode(), 1))
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: .*{message}") as error:
        load(str(path))
    assert "\n" not in str(error.value)


def test_qwen2_without_its_biases_is_incomplete(tmp_path):
    hf, hf_config = tiny_hf("llama", head_dim=8, attention_bias=False, mlp_bias=False)
    write(tmp_path / "m.gguf", hf, hf_config)
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole.replace(b"llama", b"qwen2"))
    with pytest.raises(InputError, match=r"m\.gguf: tensor blk\.0\.attn_k\.bias is missing"):
        load(str(tmp_path / "m.gguf"))


def test_a_tensor_that_is_not_finite_is_named(tmp_path):
    hf, hf_config = tiny_hf("llama")
    hf.state_dict()["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    write(tmp_path / "m.gguf", hf, hf_config)
    with pytest.raises(InputError, match=r"m\.gguf: tensor blk\.1\.ffn_up\.weight holds NaN"):
        load(str(tmp_path / "m.gguf"))


def test_a_type_that_is_not_supported_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"tensor token_embd\.weight has type F64, .* Q6_K"):
        load(str(tmp_path / "m.gguf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "a", "b", "ab"],
        "tokenizer.ggml.scores": [0.0, 0.0, -2.0, -3.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 1, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
    }
    hf, hf_config = tiny_hf("llama", num_hidden_layers=1)
    write(path, hf, hf_config, metadata=metadata)
    load(str(path))
    return path.read_bytes()


def test_truncated_files_say_so(whole, tmp_path):
    path = tmp_path / "m.gguf"
    for length in (0, 3, 4, 20, 24, 100, 999, 1500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"m\.gguf: .*(truncated|is not a GGUF)"):
            load(str(path))
    with pytest.raises(InputError, match="none.gguf: cannot be read"):
        load(str(tmp_path / "none.gguf"))


def test_corrupt_headers_raise_nothing_else(whole, tmp_path):
    """Any byte of the header changed: a file that still makes sense, or an InputError."""
    rng = np.random.default_rng(0)
    path = tmp_path / "m.gguf"
    refused = 0
    header = whole.index(b"blk.0.ffn_up.weight") + 60
    for place in rng.integers(0, header, 400):
        changed = bytearray(whole)
        changed[place] = rng.integers(0, 256)
        path.write_bytes(changed)
        try:
            file = GGUFFile(path)
            read_config(str(path))
            assert file.tensors
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100


# ---- the real one ----

STORY = (
    "The lighthouse keeper climbed the stairs every evening, as his father had done before him. "
    "He lit the lamp, checked the glass for salt, and sat down to write in the book. On most "
    "nights he wrote only the weather and the names of the ships. But on the night of the storm "
    "he wrote a whole page, and in the morning the villagers found the lamp still burning and "
    "the boats safe in the harbour."
)


@pytest.fixture(scope="module")
def smollm2():
    return load(str(next(fetch("smollm2").glob("*.gguf"))))


def test_smollm2_is_read_as_it_is(smollm2):
    config = smollm2.config
    assert sum(x.size for x in jax.tree.leaves(smollm2.params)) == 134_515_008
    assert (config.depth, config.width, config.heads, config.kv_heads) == (30, 576, 9, 3)
    assert config.tied_head and config.norm_eps == 1e-5 and config.ropes[0].base == 1e5


def test_smollm2_predicts_a_story_and_answers(smollm2):
    """Perplexity 30.93 here, and to 1e-3 with transformers' own GGUF loader."""
    tokenizer = smollm2.tokenizer
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    start = tokenizer("The capital of France is")["input_ids"]
    rows = [tokenizer(STORY)["input_ids"], start, chat, chat + start]
    ids = np.zeros((4, max(map(len, rows))), int)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    logits = logits_of(smollm2, ids, mask)
    story = np.asarray(rows[0])
    log_p = np.asarray(jax.nn.log_softmax(logits[0]))
    losses = -log_p[np.arange(len(story) - 1), story[1:]]
    assert len(story) == 84 and np.exp(losses.mean()) == pytest.approx(30.93, abs=0.02)
    best = [tokenizer.decode(logits[i, len(rows[i]) - 1].argmax()) for i in (1, 2, 3)]
    assert best == [" Paris", "The", " Paris"]


def test_smollm2_as_a_huggingface_directory_reads_its_tokens(smollm2, tmp_path):
    """Config, tokenizer and chat template, as an export writes them; weights are left out."""
    assert smollm2.hf_config is not None
    smollm2.hf_config.save_pretrained(str(tmp_path))
    smollm2.tokenizer.save_pretrained(str(tmp_path))
    assert model_config(tmp_path) == smollm2.config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer(STORY)["input_ids"] == smollm2.tokenizer(STORY)["input_ids"]
    turns = [{"role": "user", "content": "Hello?"}]
    assert tokenizer.apply_chat_template(turns) == smollm2.tokenizer.apply_chat_template(turns)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_token_ids_are_the_file_s_own(family, tmp_path):
    """Not those that the config's class would have, of another vocabulary."""
    hf, hf_config = tiny_hf(family, **({"use_sliding_window": False} if family == "qwen2" else {}))
    given = {"bos": 11, "eos": 12, "padding": 13}
    ids = {f"tokenizer.ggml.{name}_token_id": i for name, i in given.items()}
    write(tmp_path / "m.gguf", hf, hf_config, metadata=ids)
    found = load(str(tmp_path / "m.gguf")).hf_config
    assert found is not None
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (11, 12, 13)
    write(tmp_path / "n.gguf", hf, hf_config)
    found = load(str(tmp_path / "n.gguf")).hf_config
    assert found is not None and found.bos_token_id is None and found.eos_token_id is None
