"""Every layout, horizon and way of saving that `load_torch` is to read; gradients agree, too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common_jax.errors import InputError
from reward_jax.diffusion.schedule import cosine_schedule, linear_schedule
from reward_jax.models.reward_nets import HalfUnet
from reward_jax.torch_import.from_torch import load_torch
from tests.reward import torch_reference as reference

D, H, T, B = 5, 8, 20, 3


def diffusion(seed: int = 3, steps: int = T, **options: Any) -> reference.GaussianDiffusion:
    unet = reference.randomise(reference.TemporalUnet(D, 8, (1, 2), entries=3), seed)
    return reference.GaussianDiffusion(unet, H, D, 2, steps, **options)


def leaves(params: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(params)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("horizon", "options"),
    [
        (4, {"act": "relu", "norm": False, "bias": False}),
        (4, {"act": "leaky_relu", "norm": False}),
        (24, {"act": "mish"}),  # three steps are left for the head
    ],
    ids=["no biases", "the authors'", "a long horizon"],
)
def test_rewards_and_their_gradients(tmp_path, horizon, options):
    model = reference.ValueFunction(D, horizon, 8, (8,), **options)
    model = reference.randomise(model, 1)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, horizon, D)).astype(np.float32)
    t = np.array([0, 7, T - 1])
    leaf = torch.from_numpy(x).requires_grad_()
    wanted = model(leaf, None, torch.from_numpy(t))
    (slope,) = torch.autograd.grad(wanted.sum(), leaf)
    assert slope.abs().max() > 1e-2
    # The head says how many steps are left, so that a horizon is checked, not needed.
    _, plain, _ = load_torch(tmp_path / "a.pt", "reward", act=options["act"])
    module, params, info = load_torch(
        tmp_path / "a.pt", "reward", act=options["act"], horizon=horizon
    )
    assert isinstance(module, HalfUnet) and info.horizon == horizon and info.transition == D
    for a, b in zip(leaves(params), leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)

    @jax.jit
    def ours(x: jax.Array) -> Any:
        value, back = jax.vjp(lambda x: module.apply({"params": params}, x, jnp.asarray(t)), x)
        return value, back(jnp.ones(B))[0]

    value, gradient = ours(jnp.asarray(x))
    np.testing.assert_allclose(value, wanted.detach().numpy()[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(gradient, slope.numpy(), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"final_block\.\d\.weight has shape .* at horizon 96"):
        load_torch(tmp_path / "a.pt", "reward", act=options["act"], horizon=96)


@pytest.mark.slow
def test_every_way_of_saving(tmp_path):
    ours = diffusion()
    state = ours.state_dict()
    torch.save({"step": 3, "model": state, "ema": state}, tmp_path / "trainer.pt")
    _, wanted, _ = load_torch(tmp_path / "trainer.pt", "denoiser")
    discriminator = reference.Discriminator(reference.ValueFunction(D, H, 8, (8,)), ours)
    reward = reference.Reward(reference.SingleStepRewardMLP(D), diffusion(4), ours)
    both = {f"{w}.{k}": v * (w == "ema") for w in ("ema", "model") for k, v in state.items()}
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "state.pt": (state, {}),
        "network.pth": (ours.model.state_dict(), {}),
        "parallel.pt": ({f"module.{k}": v for k, v in state.items()}, {}),
        "state.safetensors": (state, {}),
        "both.safetensors": (both, {}),
        "discriminator.pt": (discriminator.state_dict(), {"part": "diffusion"}),
        "reward.pt": (reward.state_dict(), {"part": "s_general"}),
    }
    for name, (content, options) in ways.items():
        path = tmp_path / name
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
        _, params, info = load_torch(path, "denoiser", **options)
        for a, b in zip(leaves(params), leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
        assert info.which == ("ema" if name == "both.safetensors" else None)


def test_schedules_are_known_by_their_betas(tmp_path):
    def schedule(steps: int, betas: torch.Tensor | None) -> Any:
        state = diffusion(steps=steps, betas=betas).state_dict()
        torch.save(state, tmp_path / "a.pt")
        return load_torch(tmp_path / "a.pt", "denoiser")[2].schedule

    for steps in (2, 100, 1000):  # their tables were rounded to float32 at each step
        found = schedule(steps, None)
        assert found.name == "cosine"
        np.testing.assert_array_equal(found.betas, cosine_schedule(steps).betas)
    linear = torch.from_numpy(np.array(linear_schedule(1000).betas))
    assert schedule(1000, linear).name == "linear"


def test_a_flaw_inside_a_part_is_named_in_full(tmp_path):
    reward = reference.Reward(reference.SingleStepRewardMLP(D), diffusion(), diffusion())
    state = reward.state_dict()
    name = "s_expert.model.final_conv.1.weight"
    torch.save(state | {name: torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=rf"tensor {name} has shape \[2\]"):
        load_torch(tmp_path / "a.pt", "denoiser", part="s_expert")
    state["s_expert.model.downs.4.0.time_mlp.1.bias"] = torch.ones(1)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match="entries of downs are 0, 1, 4"):
        load_torch(tmp_path / "a.pt", "denoiser", part="s_expert")


def test_numbers_too_large_for_float32(tmp_path):
    state = diffusion().state_dict() | {
        "model.final_conv.1.bias": torch.full((D,), 1e300, dtype=torch.float64)
    }
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"model\.final_conv\.1\.bias holds NaN, infinity or num"):
        load_torch(tmp_path / "a.pt", "denoiser")
