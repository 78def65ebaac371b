"""Checkpoints in the layout of Diffuser and of the authors give the same numbers here."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common_jax.errors import InputError
from reward_jax.diffusion.denoiser import Denoiser, score_from
from reward_jax.diffusion.process import (
    action_weights,
    first_state,
    posterior_mean,
    prediction_loss,
)
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.reward.guide import GuidanceOptions, guided_sample
from reward_jax.reward.relative import RelativeReward, reward_gradient
from reward_jax.reward.targets import ExtractionOptions, draw_targets
from reward_jax.torch_import.from_torch import load_torch
from tests.reward import torch_reference as reference

D, A, H, T, B = 5, 2, 8, 7, 3


@functools.partial(jax.jit, static_argnums=0)
def forward(module: Any, params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """Compiled once for all modules that are equal."""
    return module.apply({"params": params}, x, t)


def inputs(horizon: int = H, width: int = D, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, horizon, width)).astype(np.float32), rng.integers(0, T, B)


def unet(seed: int = 0, **options: Any) -> Any:
    options = {"dim": 8, "mults": (1, 2, 3)} | options
    return reference.randomise(reference.TemporalUnet(D, **options), seed)


def diffusion(seed: int = 0, net: Any = None, **options: Any) -> reference.GaussianDiffusion:
    net = net or unet(seed)
    return reference.GaussianDiffusion(net, H, D, A, T, action_weight=10.0, **options)


def small(seed: int) -> tuple[reference.GaussianDiffusion, Any]:
    """A diffusion of one level and a reward: quick to compile.

    No norms in the reward: over a group of one number their gradients are rounding alone.
    """
    net = value_function(seed + 9, mults=(4,), norm=False)
    return diffusion(net=unet(seed, mults=(1,))), net


def value_function(seed: int = 0, **options: Any) -> Any:
    options = {"dim": 8, "mults": (4, 8)} | options
    return reference.randomise(reference.ValueFunction(D, H, **options), seed)


def mlp(seed: int = 0, **options: Any) -> Any:
    options = {"dim": 4, "mults": (4, 2), "horizon": 2, "act": "leaky_relu"} | options
    return reference.randomise(reference.SingleStepRewardMLP(D, **options), seed)


def saved(path: pathlib.Path, state: Any) -> pathlib.Path:
    torch.save(state, path)
    return path


def trainer(module: torch.nn.Module, ema: torch.nn.Module | None = None) -> dict[str, Any]:
    """What their trainers save."""
    ema = module if ema is None else ema
    return {"step": 1200, "model": module.state_dict(), "ema": ema.state_dict()}


def same(module: Any, params: Any, theirs: Any, horizon: int = H) -> None:
    """Forward parity, 1e-5 absolute."""
    x, t = inputs(horizon)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(x), None, torch.from_numpy(t)).numpy()
    got = np.asarray(forward(module, params, jnp.asarray(x), jnp.asarray(t)))
    assert np.abs(wanted).max() > 0.05
    np.testing.assert_allclose(got, wanted.reshape(got.shape), rtol=0, atol=1e-5)


def test_the_papers_sizes():
    """Counts that the authors' networks have."""
    hopper = reference.TemporalUnet(14, mults=(1, 2, 4, 8))
    cheetah = reference.TemporalUnet(23, mults=(1, 4, 8), attention=True)
    ours = TemporalUnet(14, 32, (1, 2, 4, 8)), TemporalUnet(23, 32, (1, 4, 8), True)
    x = [jax.ShapeDtypeStruct((1, 8, width), jnp.float32) for width in (14, 23)]
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    for theirs, module, like, wanted in zip(
        (hopper, cheetah), ours, x, (3_956_302, 4_114_423), strict=True
    ):
        assert sum(p.numel() for p in theirs.parameters()) == wanted
        shapes = jax.eval_shape(module.init, jax.random.key(0), like, t)["params"]
        assert sum(p.size for p in jax.tree.leaves(shapes)) == wanted


@pytest.mark.parametrize(
    ("options", "multipliers"),
    [
        ({}, (1, 2, 3)),
        ({"entries": 3, "mults": (1, 4, 8)}, (1, 4, 8)),
        ({"attention": True, "mults": (1, 4)}, (1, 4)),
        ({"mults": (1,)}, (1,)),
    ],
    ids=["four entries", "three entries", "attention", "one level"],
)
def test_temporal_unet(tmp_path, options, multipliers):
    theirs = unet(**options)
    path = saved(tmp_path / "a.pt", trainer(reference.GaussianDiffusion(theirs, H, D, A, T)))
    module, params, info = load_torch(path, "denoiser")
    assert module == TemporalUnet(D, 8, multipliers, bool(options.get("attention")))
    assert (info.which, info.step, info.transition, info.horizon) == ("ema", 1200, D, H)
    same(module, params, theirs)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act": "relu", "mults": (8,)},
        {"act": "leaky_relu", "norm": False, "bias": False},
        {"norm": False, "mults": (4, 8, 8)},
    ],
    ids=["mish", "relu", "bare", "three levels"],
)
def test_half_unet(tmp_path, options):
    theirs = value_function(**options)
    act: Any = options.get("act", "mish")
    path = saved(tmp_path / "a.pt", {"model": {f"model.{k}": v for k, v in named(theirs)}})
    module, params, info = load_torch(path, "reward", which="model", act=act, horizon=H)
    groups = 8 if options.get("norm", True) else None
    mults = options.get("mults", (4, 8))
    assert module == HalfUnet(8, mults, act, groups, options.get("bias", True))
    assert (info.which, info.horizon, info.schedule) == ("model", H, None)
    same(module, params, theirs)


def named(module: torch.nn.Module) -> Any:
    return module.state_dict().items()


@pytest.mark.parametrize("horizon", [1, 2, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_windowed_mlp(tmp_path, horizon, bias):
    theirs = mlp(horizon=horizon, bias=bias)
    path = saved(tmp_path / "a.pt", {f"model.{k}": v for k, v in named(theirs)})
    module, params, info = load_torch(path, "reward", transition=D, act="leaky_relu")
    assert isinstance(module, WindowMLP) and module.window == horizon
    assert module.widths == (16, 8) and info.notes == (
        "the file holds one set of parameters, averaged or not",
    )
    same(module, params, lambda *given: reference.windowed(theirs, *given))


def test_activations_that_no_file_names(tmp_path):
    cases: Any = (({}, "mish"), ({"norm": False}, "leaky_relu"))
    for options, assumed in cases:
        path = saved(tmp_path / "a.pt", value_function(**options).state_dict())
        module, _, info = load_torch(path, "reward", horizon=H)
        assert module == HalfUnet(8, (4, 8), assumed, None if options else 8)
        assert info.notes[-1] == f"no checkpoint names its activation: {assumed} is assumed"


def test_which_parameters(tmp_path):
    last, average = diffusion(0), diffusion(1)
    content = trainer(last, average)
    path = saved(tmp_path / "a.pt", content)
    flat = {f"{w}.{k}": v for w in ("model", "ema") for k, v in content[w].items()}
    other = tmp_path / "a.safetensors"
    save_file({k: v.contiguous() for k, v in flat.items()}, other)
    both: Any = (("model", last), ("ema", average))
    for file in (path, other):
        for which, theirs in both:
            module, params, info = load_torch(file, "denoiser", which=which)
            assert info.which == which
            same(module, params, theirs.model)
    only = saved(tmp_path / "b.pt", {"model": last.state_dict()})
    with pytest.raises(InputError, match=r"b\.pt: holds no 'ema'; ask for which='model'"):
        load_torch(only, "denoiser")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, kind):
    theirs = diffusion().to(kind)
    path = saved(tmp_path / "a.pt", theirs.state_dict())
    module, params, info = load_torch(path, "denoiser")
    same(module, params, theirs.float().model)
    assert info.schedule is not None and info.schedule.name == "cosine"


def test_schedule_and_loss_weights(tmp_path):
    path = saved(tmp_path / "a.pt", trainer(diffusion()))
    info = load_torch(path, "denoiser")[2]
    assert info.schedule is not None and info.schedule.name == "cosine"
    np.testing.assert_array_equal(info.schedule.betas, cosine_schedule(T).betas)
    np.testing.assert_array_equal(info.loss_weights, action_weights(H, D, A, 10.0))
    betas = torch.linspace(0.01, 0.4, T)
    other = saved(tmp_path / "b.pt", trainer(diffusion(betas=betas)))
    found = load_torch(other, "denoiser")[2].schedule
    assert found is not None and found.name == "betas"
    np.testing.assert_allclose(found.betas, betas.numpy(), rtol=1e-6)
    for table, value in (("alphas_cumprod", 0.1), ("sqrt_one_minus_alphas_cumprod", 2e-5)):
        state = diffusion().state_dict()
        state[table][2] += value
        with pytest.raises(InputError, match=f"tensor {table} is .* contradicts itself"):
            load_torch(saved(tmp_path / "c.pt", state), "denoiser")
    state = diffusion().state_dict() | {"betas": torch.full((T,), 1.5)}
    with pytest.raises(InputError, match=r"tensor betas: betas of a schedule are .* below 1"):
        load_torch(saved(tmp_path / "c.pt", state), "denoiser")


def test_teachers_inside_a_reward(tmp_path):
    expert, base = diffusion(1), diffusion(2)
    for net in (value_function(3, act="leaky_relu", norm=False, bias=False), mlp(3)):
        both = reference.Reward(net, expert, base)
        path = saved(tmp_path / "a.pt", trainer(both))
        module, params, info = load_torch(path, "reward")
        assert (info.horizon, info.transition) == (H, D)
        same(module, params, both)
        parts: Any = (("s_expert", expert), ("s_general", base))
        for part, theirs in parts:
            same(*load_torch(path, "denoiser", part=part)[:2], theirs.model)
        with pytest.raises(InputError, match=r"part='s_expert', or kind='reward'"):
            load_torch(path, "denoiser")
        with pytest.raises(InputError, match="there is no diffusion in it"):
            load_torch(path, "denoiser", part="diffusion")


def test_discriminator(tmp_path):
    net = value_function(3)
    path = saved(tmp_path / "a.pt", trainer(reference.Discriminator(net, diffusion())))
    module, params, info = load_torch(path, "reward")
    same(module, params, net)
    assert info.schedule is not None and info.horizon == H


def change(name: str, alter: Any) -> Any:
    """A state with one tensor altered, or left out."""

    def made() -> dict[str, torch.Tensor]:
        state = dict(named(diffusion()))
        value = alter(state.pop(name))
        return state if value is None else state | {name: value}

    return made


FIRST = "model.downs.0.0.blocks.0.block.0"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (change(f"{FIRST}.bias", lambda x: None), r"downs.0.0.blocks.0.block.0.bias is missing;"),
        (change("model.time_mlp.1.weight", lambda x: None), "time_mlp.1.weight is missing; is it"),
        (change(f"{FIRST}.bias", lambda x: x[:3]), rf"{FIRST}.bias has shape \[3\], not \[8\]"),
        (change(f"{FIRST}.weight", lambda x: x[..., 1:]), r"has shape \[8, 5, 4\], not \[8, 5, 5"),
        (change(f"{FIRST}.weight", lambda x: x / 0), f"{FIRST}.weight holds NaN, infinity"),
        (change("betas", lambda x: x[1:]), r"has shape \[7\], betas \[6\]"),
        (change("loss_fn.weights", lambda x: x[:, 1:]), "a transition of 4, the network one of 5"),
        (change("loss_fn.weights", lambda x: x[0]), r"weights is not \[horizon, transition\]"),
        (change("loss_fn.weights", lambda x: x[1:]), "horizon 7 is no multiple of 4"),
        (
            lambda: dict(named(diffusion())) | {"model.extra.weight": torch.ones(1)},
            "tensor model.extra.weight is unknown to TemporalUnet",
        ),
        (
            lambda: dict(named(diffusion())) | {"optimizer": torch.ones(1)},
            "tensor optimizer is unknown",
        ),
        (
            lambda: dict(named(diffusion())) | {"module.model.time_mlp.1.bias": torch.ones(1)},
            "model.time_mlp.1.bias and module.model.time_mlp.1.bias are one tensor, doubled",
        ),
        (lambda: {"a": 1.0}, "'a' is no tensor; save a state_dict"),
        (lambda: [torch.ones(1)], "holds no dictionary of tensors"),
        (lambda: value_function().state_dict(), "holds no temporal U-Net; load it with kind="),
        (lambda: {}, "holds no temporal U-Net; it holds no network"),
    ],
)
def test_states_that_are_not_as_they_should_be(tmp_path, make, message):
    path = saved(tmp_path / "a.pt", make())
    with pytest.raises(InputError, match=rf"a\.pt: .*{message}") as caught:
        load_torch(path, "denoiser")
    assert "\n" not in str(caught.value)


def test_arguments_that_do_not_fit(tmp_path):
    path = saved(tmp_path / "a.pt", trainer(diffusion()))
    with pytest.raises(InputError, match="its horizon is 8, not 16"):
        load_torch(path, "denoiser", horizon=16)
    with pytest.raises(InputError, match="its transition is 5, not 6"):
        load_torch(path, "denoiser", transition=6)
    with pytest.raises(InputError, match="holds a temporal U-Net; load it with kind='denoiser'"):
        load_torch(path, "reward")
    with pytest.raises(InputError, match="kind 'guide' is unknown; known are denoiser, reward"):
        load_torch(path, "guide")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="activation 'tanh' is unknown"):
        load_torch(path, "reward", act="tanh")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"b\.pt: there is no such file"):
        load_torch(tmp_path / "b.pt", "denoiser")
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(InputError, match=r"only \.safetensors, \.pt and \.pth are read"):
        load_torch(tmp_path / "a.ckpt", "denoiser")
    alone = saved(tmp_path / "c.pt", mlp().state_dict())
    with pytest.raises(InputError, match="does not say how wide a transition is; give transition"):
        load_torch(alone, "reward")
    with pytest.raises(InputError, match="windows of 10 values are no whole number of trans"):
        load_torch(alone, "reward", transition=4)
    other = saved(tmp_path / "d.pt", value_function().state_dict())
    with pytest.raises(InputError, match=r"final_block\.\d\.weight has shape .* at horizon 64"):
        load_torch(other, "reward", horizon=64)


# Their processes and losses, on imported weights.


def pair(tmp_path: pathlib.Path, theirs: reference.GaussianDiffusion, clip: float | None = None):
    path = saved(tmp_path / "pair.pt", theirs.state_dict())
    module, params, info = load_torch(path, "denoiser")
    assert info.schedule is not None
    kind = "epsilon" if theirs.epsilon else "x0"
    return score_from(module, params, kind, info.schedule, clip=clip), info


@pytest.mark.parametrize(("epsilon", "clip"), [(False, True), (False, False), (True, True)])
def test_posterior_mean(tmp_path, epsilon, clip):
    theirs = diffusion(net=unet(mults=(1,)), epsilon=epsilon, clip=clip)
    ours, _ = pair(tmp_path, theirs, 1.0 if clip else None)
    x, t = map(jnp.asarray, inputs())
    given = torch.from_numpy(np.array(x)), {}, torch.from_numpy(np.array(t)).long()
    with torch.no_grad():
        wanted = theirs.p_mean_variance(*given)[0].numpy()
    got = posterior_mean(ours.schedule, jax.jit(Denoiser.x0)(ours, x, t), x, t)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("epsilon", [False, True])
def test_diffusion_loss(tmp_path, epsilon):
    """With epsilon prediction, theirs adds a constant: the imposed state against the noise."""
    theirs = diffusion(epsilon=epsilon)
    ours, info = pair(tmp_path, theirs)
    x_0, t = inputs()
    noise = np.random.default_rng(5).normal(size=x_0.shape).astype(np.float32)
    state = torch.from_numpy(x_0[:, 0, A:])
    given = torch.from_numpy(x_0), {0: state}, torch.from_numpy(t), torch.from_numpy(noise)
    wanted = theirs.p_losses(*given).item()
    if epsilon:
        wanted -= ((x_0[:, 0, A:] - noise[:, 0, A:]) ** 2).sum() / x_0.size

    schedule, pinned = ours.schedule, first_state(jnp.asarray(x_0[:, 0, A:]), H, D)
    a, s = (
        np.asarray(v)[t][:, None, None]
        for v in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )
    x_t = pinned(jnp.asarray(a * x_0 + s * noise))
    output = forward(ours.model, ours.params, x_t, jnp.asarray(t))
    assert info.loss_weights is not None
    got = prediction_loss(
        schedule,
        output,
        jnp.asarray(x_0),
        jnp.asarray(t),
        jnp.asarray(noise),
        prediction="epsilon" if epsilon else "x0",
        weights=info.loss_weights,
        pinned=pinned,
    )
    np.testing.assert_allclose(got.mean(), wanted, rtol=1e-5)


def test_gradient_matching(tmp_path):
    """The authors' loss, and its gradient in the parameters, at the draws that we make."""
    (expert, net), (base, _) = small(1), small(2)
    theirs = reference.Reward(net, expert, base)
    path = saved(tmp_path / "a.pt", theirs.state_dict())
    reward, params, _ = load_torch(path, "reward", act="mish")
    ours = [pair(tmp_path, d)[0] for d in (base, expert)]
    x_0, _ = inputs()
    schedule = ours[0].schedule
    given: Any = dict(count=B, key=jax.random.key(3), target="posterior_mean")
    plain, drawn = (
        draw_targets(
            ours[0], ours[1], x_0, schedule, options=ExtractionOptions(B, gradient_at=at), **given
        )
        for at in ("x_t", "posterior_mean")
    )
    x_t, t = (torch.from_numpy(np.array(v)) for v in (plain.x, plain.t))
    clean = x_t / expert.at("sqrt_alphas_cumprod", t.long())  # without noise, x_t again
    loss = theirs.loss(clean, {}, t.long(), torch.zeros_like(x_t))
    loss.backward()

    @jax.jit
    @jax.value_and_grad
    def ours_of(params):
        gradient = reward_gradient(reward, params, drawn.x, drawn.t)
        return jnp.mean(jnp.square(gradient - drawn.value))

    value, gradient = ours_of(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4)
    weight = net.get_parameter("blocks.0.1.blocks.0.block.0.weight").grad
    assert weight is not None
    got = np.asarray(gradient["down_0_1"]["first"]["conv"]["kernel"]).transpose(2, 1, 0)
    scale = weight.abs().max().item()
    np.testing.assert_allclose(got, weight.numpy(), rtol=0, atol=1e-4 * scale)
    wanted = theirs.gradient(x_t, {}, t.long()).detach().numpy()
    got = jax.jit(reward_gradient, static_argnums=0)(reward, params, plain.x, plain.t)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("by_variance", [False, True])
def test_guided_steps(tmp_path, by_variance):
    """Each step of our chain, without noise, is theirs from the same x."""
    theirs, net = small(1)
    ours, _ = pair(tmp_path, theirs)
    path = saved(tmp_path / "a.pt", net.state_dict())
    reward, params, _ = load_torch(path, "reward", act="mish")
    x, _ = inputs()
    state = x[:, 0, A:]
    chain = guided_sample(
        ours,
        ours.schedule,
        x.shape,
        key=jax.random.key(0),
        guide=RelativeReward(params, ours.schedule, reward, "posterior_mean"),
        options=GuidanceOptions(
            scale=0.5,
            t_stopgrad=2,
            n_guide_steps=2,
            step="learned",
            scale_by_variance=by_variance,
            temperature=0.0,
        ),
        pinned=first_state(jnp.asarray(state), H, D),
        chain=True,
    )
    cond = {0: torch.from_numpy(state)}
    for step, level in enumerate(range(T - 1, -1, -1)):
        before = torch.from_numpy(np.array(chain[step]))
        t = torch.full((B,), level)
        options: Any = dict(scale=0.5, t_stopgrad=2, guide_steps=2, by_variance=by_variance)
        after = reference.guided_p_sample(
            theirs, net, before, cond, t, torch.zeros_like(before), **options
        )
        wanted = theirs.impose(after, cond).numpy()
        np.testing.assert_allclose(chain[step + 1], wanted, rtol=0, atol=2e-5)
