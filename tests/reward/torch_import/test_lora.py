import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import safetensors.numpy
import torch

from common_jax.errors import InputError
from common_jax.mesh import make_mesh
from reward_jax import (
    ExtractionOptions,
    SafeGuidance,
    extract_reward,
    load_stable_diffusion,
)
from reward_jax.torch_import import lora
from reward_jax.torch_import.lora import load_expert, with_lora
from tests.reward.stable_diffusion_reference import SCHEDULER, UNET, pipeline, restate


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A pipeline with two adapters; its base's folder, and the adapters as diffusers saves."""
    path = tmp_path_factory.mktemp("sd")
    reference = pipeline(4)
    reference.save_pretrained(path / "base")
    changed = {
        "unet": ["to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj", "ff.net.2"],
        "text_encoder": ["q_proj", "fc1"],
    }
    given: dict[str, Any] = {}
    for name, modules in changed.items():
        config = peft.LoraConfig(
            target_modules=modules, r=3, lora_alpha=5, init_lora_weights=False
        )
        part = peft.inject_adapter_in_model(config, getattr(reference, name))
        given[f"{name}_lora_layers"] = peft.get_peft_model_state_dict(part)
        stated = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        given[f"{name}_lora_adapter_metadata"] = stated
    type(reference).save_lora_weights(path / "lora", **given)
    return reference, load_stable_diffusion(path / "base"), path


FILE = "pytorch_lora_weights.safetensors"


def test_a_lora_of_diffusers_is_merged(both):
    reference, base, path = both
    expert = load_expert(base, path / "lora")
    ids = torch.from_numpy(base.tokens(["a red cat"]).astype(np.int64))
    x_t, t = jax.random.normal(jax.random.key(0), (1, 8, 12, 4)), jnp.array([70])
    with torch.no_grad():
        text = reference.text_encoder(ids)[0]
        given = torch.from_numpy(np.array(x_t)).movedim(-1, 1)
        wanted = reference.unet(given, torch.tensor([70]), text).sample.movedim(1, -1).numpy()
    found = expert.encode_text(["a red cat"])
    np.testing.assert_allclose(found, text.numpy(), atol=1e-4)
    assert np.abs(found - base.encode_text(["a red cat"])).max() > 0.01
    found = expert.epsilon(x_t, t, found)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    # What it does not change is held once.
    assert expert.decoder is base.decoder
    assert jax.tree.structure(expert) == jax.tree.structure(base)


def test_each_device_is_given_its_own_part_of_the_products(both, monkeypatch):
    _, base, path = both
    wanted, asked, part = with_lora(base, path / "lora"), [], lora._Product.part

    def counted(product, place):
        found = part(product, place)
        asked.append((product, found.shape))
        return found

    monkeypatch.setattr(lora._Product, "part", counted)
    spread = load_stable_diffusion(path / "base", mesh=make_mesh(2, 2, 2))
    expert = load_expert(spread, path / "lora")
    assert expert.decoder is spread.decoder
    assert jax.tree.structure(expert) == jax.tree.structure(spread)
    changed = []
    for x, old, alone in zip(*map(jax.tree.leaves, (expert, spread, wanted)), strict=True):
        assert x.sharding == old.sharding and x.dtype == old.dtype
        np.testing.assert_allclose(x, alone, atol=1e-6)
        if x is not old:
            changed += [x.sharding.shard_shape(x.shape)] * len(
                set(map(str, x.sharding.devices_indices_map(x.shape).values()))
            )
    assert sorted(changed) == sorted(shape for _, shape in asked)
    assert len(changed) > 2 * len({id(product) for product, _ in asked}) > 20


def test_an_expert_that_is_a_folder_lies_as_the_base_does(both):
    _, base, path = both
    mesh = make_mesh(1, 2, 4)
    spread = load_stable_diffusion(path / "base", mesh=mesh)
    expert = load_expert(spread, path / "base", mesh=mesh)
    for x, old in zip(*map(jax.tree.leaves, (expert, spread)), strict=True):
        assert x.sharding == old.sharding
        np.testing.assert_array_equal(x, old)


def test_older_layouts_say_the_same(both, tmp_path):
    """down and up with alphas, and the attention processors' names."""
    _, base, path = both
    tensors = safetensors.numpy.load_file(path / "lora" / FILE)
    old, oldest = {}, {}
    for name, value in tensors.items():
        module, kind = name.removesuffix(".weight").rsplit(".", 1)
        kind = {"lora_A": "down", "lora_B": "up"}[kind]
        between = "lora_linear_layer" if name.startswith("text") else "lora"
        old[f"{module}.{between}.{kind}.weight"] = value
        old[f"{module}.alpha"] = np.array(5, np.float32)
        front, _, part = module.removeprefix("unet.").rpartition(".to_")
        if name.startswith("unet") and front:
            part = part.removesuffix(".0")
            scaled = value * np.float32(5 / 3) if kind == "up" else value
            oldest[f"{front}.processor.to_{part}_lora.{kind}.weight"] = scaled
    wanted = with_lora(base, path / "lora")
    safetensors.numpy.save_file(old, tmp_path / "old.safetensors")
    found = load_expert(base, tmp_path / "old.safetensors")
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    safetensors.numpy.save_file(oldest, tmp_path / "oldest.safetensors")
    found = with_lora(base, tmp_path / "oldest.safetensors").unet
    moved = 0
    for name, module in found.items():
        for p, part in module.items():
            for ours, theirs, first in zip(
                *map(jax.tree.leaves, (part, wanted.unet[name][p], base.unet[name][p])),
                strict=True,
            ):
                if not np.array_equal(ours, first):
                    np.testing.assert_allclose(ours, theirs, atol=1e-6)
                    moved += 1
    assert moved == len(oldest) // 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {"lora_unet_mid.lora_down.weight": np.ones(1)}, "is in kohya's layout"),
        (lambda t: t | {"unet.mid.scale": np.ones(1)}, "unet.mid.scale is no factor of a LoRA"),
        (lambda t: t | {"unet.mid.lora_A.weight": np.ones((1, 2))}, "changes unet.mid, which the"),
        (lambda t: dict(list(t.items())[1:]), "has no down factor"),
        (lambda t: {k: v[:, :2] for k, v in t.items()}, "do not belong together|does not fit"),
        (lambda t: {k: v.reshape(-1) for k, v in t.items()}, "do not belong together"),
        (lambda t: {k: v[:0] for k, v in t.items()}, "do not belong together"),
        (lambda t: {k: v * np.nan for k, v in t.items()}, "holds NaN"),
        (lambda t: {}, "holds no tensor"),
    ],
    ids=["kohya", "unknown", "elsewhere", "half", "misshaped", "flat", "empty", "nan", "none"],
)
def test_bad_factors_are_named(both, tmp_path, change, said):
    _, base, path = both
    tensors = safetensors.numpy.load_file(path / "lora" / FILE)
    safetensors.numpy.save_file(change(tensors), tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=said):
        with_lora(base, tmp_path / "x.safetensors")


def test_unequal_pairs_are_refused(both, tmp_path):
    _, base, path = both
    wider = dict(attention_head_dim=(4, 3))
    pipeline(5, UNET | wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(InputError, match=r"two architectures: heads of the unet is \(2, 3\) and"):
        load_expert(base, tmp_path / "wider")
    for number, (option, said) in enumerate(
        [
            (dict(beta_end=0.02), "two noise schedules"),
            (dict(prediction_type="v_prediction"), "predict epsilon and v"),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(path / "base", folder)
        restate(folder, "scheduler/scheduler_config.json", **(SCHEDULER | option))
        with pytest.raises(InputError, match=said):
            load_expert(base, folder)


class _Reward:
    """A reward that is linear in x_t; its gradient can only be the targets' mean."""

    def init(self, key, x, t):
        return {"params": {"w": jnp.zeros(x.shape[1:])}}

    def apply(self, variables, x, t):
        return jnp.sum(x * variables["params"]["w"][None], axis=(1, 2, 3))


def test_a_pair_is_what_extract_reward_takes(both):
    """Guided and safe scores, which agree with epsilon."""
    _, base, _ = both
    latents = jax.random.normal(jax.random.key(0), (4, 8, 12, 4))
    text = base.encode_text(["a cat", "dog", "a", "red"])
    t = jnp.array([3, 60, 100, 199])
    s = base.schedule.sqrt_one_minus_alphas_cumprod[t].reshape(-1, 1, 1, 1)
    none = base.encode_text([""] * 4)
    one, zero = (base.epsilon(latents, t, given) for given in (text, none))
    evaluate = jax.jit(lambda score, *given: score(*given))
    guided = base.guided_score(3.0)
    wanted = zero + 3 * (one - zero)
    np.testing.assert_allclose(-s * evaluate(guided, latents, t, text), wanted, atol=1e-4)
    # Without momentum a safe chain's epsilon is a function, the one that its trajectory holds.
    safety = SafeGuidance(3, 50.0, 0.2, 0.0, 0.0, concept="nude")
    options: dict[str, Any] = dict(guidance_scale=3.0, scheduler="ddim", steps=6)
    safe = base.safe_score(safety, **options)
    prompts = ["a cat", "dog", "a", "red"]
    seen = base.sample(
        prompts, latents=latents, safety=safety, trajectory=True, **options
    ).trajectory
    assert seen is not None
    for i in (2, 3):
        at = jnp.full(4, seen.t[i])
        spread = base.schedule.sqrt_one_minus_alphas_cumprod[at].reshape(-1, 1, 1, 1)
        found = -spread * evaluate(safe, seen.x_t[i], at, text)
        np.testing.assert_allclose(found, seen.epsilon[i], atol=1e-4)
    with pytest.raises(InputError, match="momentum 0.3 is no function of x_t and t: set momentum"):
        base.safe_score("medium")
    reward = _Reward()
    params = reward.init(None, latents, t)["params"]
    _, history = extract_reward(
        guided,
        safe,
        reward,
        params,
        (latents, text),
        base.schedule,
        optax.sgd(0.1),
        steps=2,
        key=jax.random.key(2),
        options=ExtractionOptions(batch_size=4),
    )
    assert (history.loss > 0).all()
