import json
import math
import shutil
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from transformers import tokenization_utils_base

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from reward_jax import load_stable_diffusion
from reward_jax.sharding import placement
from reward_jax.torch_import import torch_files
from reward_jax.torch_import.stable_diffusion import Axes, check_stable_diffusion, theirs
from tests.reward.stable_diffusion_reference import pipeline, restate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "base"
    pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sd(folder):
    return load_stable_diffusion(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "sd")


def same(one, other):
    leaves = zip(*map(jax.tree.leaves, (one, other)), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in leaves)


def test_a_folder_as_published_is_the_same_model(folder, copy, sd):
    """Old names of the autoencoder's attention, tokenizer in two files, an index, text prefix."""
    vae = copy / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = safetensors.numpy.load_file(vae)
    for new, name in old.items():
        tensors = {n.replace(f".{new}.", f".{name}."): t for n, t in tensors.items()}
    safetensors.numpy.save_file(tensors, vae)
    text = copy / "text_encoder/model.safetensors"
    tensors = safetensors.numpy.load_file(text)
    tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in tensors.items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    safetensors.numpy.save_file(tensors, text)
    unet = copy / "unet/diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(unet)
    unet.unlink()
    half = len(tensors) // 2
    names = sorted(tensors)
    for i, part in enumerate((names[:half], names[half:])):
        safetensors.numpy.save_file(
            {n: tensors[n] for n in part}, unet.parent / f"{i}.safetensors"
        )
    index = unet.parent / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("{}")
    places = {n: f"{int(i >= half)}.safetensors" for i, n in enumerate(names)}
    restate(index.parent, index.name, weight_map=places)
    tokenizer = sd.tokens.tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    whole = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]
    (copy / "tokenizer/tokenizer.json").unlink()
    (copy / "tokenizer/vocab.json").write_text(json.dumps(whole["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in whole["merges"]]
    (copy / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    again = load_stable_diffusion(copy)
    assert same(sd, again)
    prompts = ["a red cat", "an image of DOGS, 3!", ""]
    assert tokenizer(prompts)["input_ids"][0] == again.tokens(prompts)[0, :5].tolist()
    assert np.array_equal(sd.tokens(prompts), again.tokens(prompts))


def test_two_of_one_folder_are_one_to_the_compiler(folder, sd):
    other = jax.tree.structure(load_stable_diffusion(folder))
    assert jax.tree.structure(sd) == other and hash(jax.tree.structure(sd)) == hash(other)


def test_bfloat16(folder, sd):
    half = load_stable_diffusion(folder, "bfloat16")
    text = half.encode_text(["a cat"])
    assert text.dtype == jnp.bfloat16
    x = jax.random.normal(jax.random.key(0), (1, 8, 12, 4))
    wanted = sd.epsilon(x, jnp.array([50]), text.astype(jnp.float32))
    found = half.epsilon(x, jnp.array([50]), text)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=0.05)


FOLDERS = {"unet": "unet", "encoder": "vae", "decoder": "vae", "text": "text_encoder"}


@pytest.mark.parametrize(
    ("layout", "stored", "dtype"),
    [
        ((2, 2, 2), np.float32, "float32"),
        ((1, 8, 1), jnp.bfloat16, "float32"),
        ((1, 2, 4), np.float16, "bfloat16"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_each_device_reads_its_own_part_once(copy, monkeypatch, layout, stored, dtype):
    """Of kernels, whose axes are in another order there, too."""
    for path in copy.rglob("*.safetensors"):
        tensors = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file({n: t.astype(stored) for n, t in tensors.items()}, path)
    wanted, asked, read = load_stable_diffusion(copy, dtype), {}, torch_files._SafeTensor.read

    def counted(tensor, place=()):
        part = read(tensor, place)
        name = tensor.path.parent.name, tensor.name.removeprefix("text_model.")
        asked.setdefault(name, []).append(part.size)
        return part

    monkeypatch.setattr(torch_files._SafeTensor, "read", counted)
    mesh = make_mesh(*layout)
    found, cut = load_stable_diffusion(copy, dtype, mesh), 0
    for tree, folder in FOLDERS.items():
        params: list[Any] = [flatten_dict(getattr(sd, tree), sep="/") for sd in (found, wanted)]
        assert set(params[0]) == set(params[1])
        for path, x in params[0].items():
            assert x.sharding == placement(mesh)(path, x.shape) and x.dtype == dtype
            np.testing.assert_array_equal(x, params[1][path], err_msg=path)
            share = math.prod(x.sharding.shard_shape(x.shape))
            assert asked.pop((folder, theirs(path))) == [share] * (x.size // share), path
            cut += share < x.size
    assert not asked and cut > 50
    assert jax.tree.structure(found) == jax.tree.structure(wanted)


@pytest.mark.parametrize(
    ("path", "stored", "shape"),
    [
        ("a/kernel", (5, 7), (7, 5)),
        ("a/kernel", (5, 7, 1, 1), (7, 5)),
        ("a/kernel", (5, 7, 3, 2), (3, 2, 7, 5)),
        ("a/embedding", (5, 7), (5, 7)),
        ("a/bias", (5,), (5,)),
    ],
)
def test_a_part_of_a_parameter_is_that_part_of_the_tensor(path, stored, shape):
    whole, axes = np.random.default_rng(0).normal(size=stored), Axes.of(path, stored, shape)
    assert axes is not None
    wanted = axes.ours(whole)
    assert wanted.shape == shape
    place = tuple(slice(size // 3, size) for size in shape)
    part = axes.ours(whole[axes.place(place, len(stored))])
    np.testing.assert_array_equal(part, wanted[place])
    for other in ((*stored, 2), (*stored[:-1], 11), stored[:-1]):
        assert Axes.of(path, other, shape) is None


@pytest.mark.parametrize("damage", ["missing", "misshaped", "truncated", "unknown"])
def test_over_a_mesh_nothing_is_read_of_what_does_not_fit(copy, monkeypatch, damage):
    path = copy / "text_encoder/model.safetensors"  # the last to be read
    tensors = safetensors.numpy.load_file(path)
    name, value = next((n, t) for n, t in tensors.items() if n.endswith("fc1.weight"))
    changes = {"missing": {}, "misshaped": {name: value.T.copy()}, "unknown": {"more": value}}
    remaining = {n: t for n, t in tensors.items() if n != name or damage == "unknown"}
    safetensors.numpy.save_file(remaining | changes.get(damage, {name: value}), path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(torch_files._SafeTensor, "read", None)
    with pytest.raises(InputError, match=r"missing|has shape|truncated|unknown") as error:
        load_stable_diffusion(copy, mesh=make_mesh(1, 2, 4))
    assert "\n" not in str(error.value)


def test_over_a_mesh_what_is_not_finite_is_named(copy):
    path = copy / "unet/diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["conv_in.weight"][-1, -1, -1, -1] = np.inf
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(InputError, match="tensor conv_in.weight holds NaN, infinity or"):
        load_stable_diffusion(copy, mesh=make_mesh(1, 2, 4))


def test_long_prompts_are_cut_and_said_once(sd, monkeypatch):
    long = "a red cat sits " * 40
    of_library = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", of_library.append)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokens = sd.tokens(["a cat", long, long])
    assert tokens.shape == (3, 77)
    assert [str(w.message)[:65] for w in said] == [
        "prompts of more than 77 tokens are cut there: 2 of 3, the first a"
    ]
    assert not of_library


def refused(folder, match):
    with pytest.raises(InputError, match=match) as error:
        load_stable_diffusion(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("StableDiffusionXLPipeline", r"holds SDXL \(StableDiffusionXLPipeline\), not"),
        ("StableDiffusion3Pipeline", r"holds SD 3 \("),
        ("FluxPipeline", r"holds Flux \(FluxPipeline\)"),
        ("KandinskyPipeline", "holds KandinskyPipeline, not Stable Diffusion 1.x; give"),
        (["a\nb"] * 99, r"holds \['a.nb', .{51}, not Stable Diffusion 1.x; give"),
    ],
)
def test_other_pipelines_are_named(copy, name, said):
    restate(copy, "model_index.json", _class_name=name)
    refused(copy, said)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_missing_component_is_named(copy, part):
    shutil.rmtree(copy / part)
    refused(copy, f"sd/{part}: (is missing|has neither)")


def test_a_tokenizer_that_knows_no_text_is_refused(copy):
    part = copy / "tokenizer"
    restate(part, "tokenizer_config.json", model_max_length=0)
    refused(copy, r"tokenizer: no tokenizer of CLIP \(model_max_length is 0\); fetch it again")
    (part / "tokenizer.json").unlink()
    (part / "vocab.json").write_text("{}")
    refused(copy, "tokenizer: has neither tokenizer.json nor vocab.json with merges.txt; fetch it")
    (part / "merges.txt").write_text("#version: 0.2\n")
    restate(part, "tokenizer_config.json", model_max_length=77)
    refused(copy, r"no tokenizer of CLIP \(Unk token `<\|endoftext\|>` not found")


def test_weights_of_torch_are_refused_with_the_mend(copy):
    path = copy / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    refused(copy, "unet: has diffusion_pytorch_model.bin and no safetensors; .* convert it: Stab")


def test_what_is_no_folder_is_refused(tmp_path):
    refused(tmp_path, "no diffusers folder, for it has no model_index.json")
    (tmp_path / "x.safetensors").touch()
    refused(tmp_path / "x.safetensors", "a file, where a diffusers folder belongs; .*from_single")


@pytest.mark.parametrize(
    ("file", "options", "said"),
    [
        (
            "unet/config.json",
            {"class_embed_type": "timestep"},
            "class_embed_type is unk.* take a model that was saved without it$",
        ),
        (
            "unet/config.json",
            {"act_fn": "mish"},
            "act_fn 'mish' is not .*; take a model that has silu or swish$",
        ),
        ("unet/config.json", {"in_channels": 9}, "in_channels 9 and out_channels 4 differ"),
        ("unet/config.json", {"down_block_types": ["AttnDownBlock2D"] * 2}, "AttnDownBlock2D is"),
        ("unet/config.json", {"block_out_channels": [8, 16]}, "has shape|missing|3 equal heads"),
        (
            "unet/config.json",
            {"layers_per_block": [2, 2]},
            "attentions.1.norm.bias is missing .and .*; fetch it again$",
        ),
        (
            "unet/config.json",
            {"cross_attention_dim": 24},
            "texts of width 24, .* gives 12; .*one folder$",
        ),
        ("unet/config.json", {"norm_eps": "small"}, "norm_eps is 'small', no number of 0 to"),
        ("unet/config.json", {"sample_size": [9**5, 8]}, "sample_size .* is more than 2048"),
        ("unet/config.json", {"down_block_types": [[], {}]}, "is of another kind"),
        (
            "unet/config.json",
            {"layers_per_block": 10**5},
            "says 2.* layers, .*: take both from one folder$",
        ),
        *(
            ("unet/config.json", {"time_embedding_dim": value}, "_dim is .*, no whole number of 1")
            for value in ("x", -4, [4], 0, 1.5)
        ),
        ("unet/config.json", {"in_channels": "4"}, "in_channels is '4', no whole number of 1"),
        (
            "vae/config.json",
            {"scaling_factor": float("nan")},
            "scaling_factor is nan, no number of",
        ),
        ("vae/config.json", {"scaling_factor": 1e39}, "no number of 0 to 1,000,000$"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor is 0, by which latents are"),
        ("vae/config.json", {"shift_factor": 0.1}, "option shift_factor is unknown"),
        (
            "vae/config.json",
            {"latent_channels": 16},
            "of 4 channels, .* gives 16; .*: take all from one",
        ),
        *(
            ("text_encoder/config.json", {option: 2**31}, "is 2.*, no whole number of 1 to 1,000")
            for option in ("vocab_size", "max_position_embeddings")
        ),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act 'relu' is not"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample' is not imp"),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0}, "betas of a schedule are a list"),
        (
            "scheduler/scheduler_config.json",
            {"steps_offset": -1},
            "is -1, no whole number of 0 to",
        ),
        ("scheduler/scheduler_config.json", {"steps_offset": 200}, "must be below the 200 diff"),
        *(
            ("scheduler/scheduler_config.json", {option: value}, f"{option} is .*, neither true")
            for option in ("set_alpha_to_one", "skip_prk_steps")
            for value in ([], "false", 0)
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**6}, "are more than 100"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "'sigmoid' is not imp"),
    ],
)
def test_an_option_that_is_not_implemented_is_named(copy, file, options, said):
    restate(copy, file, **options)
    refused(copy, said)


def test_null_stands_for_a_default(copy):
    restate(copy, "unet/config.json", time_embedding_dim=None)
    nothing = dict.fromkeys(("steps_offset", "trained_betas", "set_alpha_to_one"))
    restate(copy, "scheduler/scheduler_config.json", **nothing)
    found = check_stable_diffusion(copy)
    assert found.unet.time_width == 4 * found.unet.channels[0]
    s = found.scheduler
    assert (s.offset, s.betas, s.last_is_clean) == (0, None, None)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/merges.txt"])
def test_a_file_that_no_folder_has_so_large_is_not_read(copy, file):
    with (copy / file).open("ab") as grown:
        grown.truncate(3 << 30)  # a hole: it takes no room
    refused(copy, f"{file}: is of 3,221 MB, which none of a diffusers folder is; fetch it again")


def test_weights_that_are_not_finite_are_named(copy):
    path = copy / "unet/diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["conv_in.bias"][1] = np.nan
    safetensors.numpy.save_file(tensors, path)
    refused(copy, "tensor conv_in.bias holds NaN")
    path.write_bytes(path.read_bytes()[:-100])
    refused(copy, "truncated or corrupt")
