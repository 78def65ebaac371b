"""Chains against diffusers' pipelines, from the same latents and with the same noise."""

import dataclasses
from typing import Any

import diffusers as untyped
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from common_jax.errors import InputError
from common_jax.mesh import batch_sharding, make_mesh
from reward_jax import SafeGuidance, load_stable_diffusion, sharding
from reward_jax.diffusion.process import draw_noise
from reward_jax.models.stable_diffusion.config import SchedulerConfig
from reward_jax.models.stable_diffusion.safety import as_safety
from reward_jax.models.stable_diffusion.schedulers import move, plan, remember, schedule_of
from tests.compiled import compilations
from tests.reward.stable_diffusion_reference import SCHEDULER, UNET, pipeline

diffusers: Any = untyped  # its lazy names are unknown to a type checker

PROMPTS = ["a red cat", "an image of violence"]
NEGATIVE = ["dog", ""]
CLASSES = {
    "pndm": diffusers.PNDMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    reference = pipeline(2, UNET | dict(sample_size=8))
    reference.unet.conv_out.weight.data *= 3  # the two chains of guidance must differ
    path = tmp_path_factory.mktemp("sd")
    reference.save_pretrained(path)
    return reference, load_stable_diffusion(path)


def stated(sd, **options):
    """A model whose scheduler folder says so."""
    scheduler = SchedulerConfig.of(SCHEDULER | options, "here")
    config = dataclasses.replace(sd.config, scheduler=scheduler)
    return sd.replace(config=config, schedule=schedule_of(scheduler))


def draw(rows=2):
    return jax.random.normal(jax.random.key(7), (rows, 8, 12, 4))


def to_torch(x):
    return torch.from_numpy(np.array(x)).movedim(-1, 1)


def run(reference, scheduler, kind=None, **options):
    parts = reference.components | {"scheduler": scheduler}
    pipe = (kind or type(reference))(**parts, **REQUIRED)  # which changes the scheduler's settings
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        prompt=PROMPTS,
        negative_prompt=NEGATIVE,
        latents=to_torch(draw()),
        height=16,
        width=24,
        guidance_scale=4.0,
        output_type="latent" if kind is None else "np",
        **options,
    )
    return found.images


REQUIRED = dict(requires_safety_checker=False)
SETTINGS: dict[str, Any] = {
    "as published": {},
    "another offset": dict(steps_offset=0, set_alpha_to_one=True),
    "v, linear": dict(prediction_type="v_prediction", beta_schedule="linear", beta_end=0.05),
    "a cosine": dict(beta_schedule="squaredcos_cap_v2", trained_betas=None),
    "linspace": dict(timestep_spacing="linspace"),
    "trailing": dict(timestep_spacing="trailing", variance_type="fixed_large"),
    "Runge and Kutta": dict(skip_prk_steps=False),
}
CASES = [(n, s) for n in CLASSES for s in SETTINGS if n == "pndm" or s != "Runge and Kutta"]


@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{n}-{s}" for n, s in CASES])
def test_moves_as_diffusers_schedulers_do(name, settings):
    """A model that is a sine stands for the network."""
    options = SCHEDULER | SETTINGS[settings]
    theirs = CLASSES[name].from_config(options)
    theirs.set_timesteps(7)
    ours = plan(SchedulerConfig.of(options, "here"), name, 7)
    np.testing.assert_array_equal(ours.rows.t, theirs.timesteps)
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    noises = np.random.default_rng(1).normal(size=(len(ours.rows.t), *x.shape))
    y = torch.from_numpy(x)
    with pytest.MonkeyPatch.context() as patch:
        fed = iter(torch.from_numpy(noises.astype(np.float32)))
        patch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(fed)
        )
        for t in theirs.timesteps:
            y = theirs.step(torch.sin(2 * y + 0.01 * t), t, y).prev_sample

    found = walked(ours, jnp.asarray(x), jnp.asarray(noises, jnp.float32))
    np.testing.assert_allclose(found, y.numpy(), atol=1e-4, rtol=1e-4)


@jax.jit  # of a plan: settings that differ in numbers are one program
def walked(plan, x, noises):
    def step(carry, given):
        row, noise = given
        output = jnp.sin(2 * carry[0] + 0.01 * row.t.astype(jnp.float32))
        noise = noise if plan.noisy else None
        return move(plan, row, carry[0], output, noise, carry[1]), None

    return jax.lax.scan(step, (x, remember(x, plan)), (plan.rows, noises))[0][0]


def clipping(clip_sample):
    """Settings of a scheduler that state this, or nothing."""
    return {k: v for k, v in (SCHEDULER | {"clip_sample": clip_sample}).items() if v is not None}


@pytest.mark.parametrize(
    ("name", "clip_sample"),
    [("pndm", False), ("ddim", False), ("ddim", True), ("ddim", None), ("ddpm", None)],
)
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_ten_steps_are_those_of_diffusers_pipeline(both, name, clip_sample, monkeypatch):
    """Which clips no latents, whatever its scheduler's folder says."""
    reference, sd = both
    sd = stated(sd, clip_sample=clip_sample)
    scheduler = CLASSES[name].from_config(clipping(clip_sample))
    assert name == "pndm" or scheduler.config.clip_sample is (clip_sample is not False)
    key = jax.random.key(3)
    if name == "ddpm":
        for_noise = jax.random.split(key)[1]
        noise = iter(
            draw_noise(jax.random.fold_in(for_noise, i), (2, 8, 12, 4)) for i in range(10)
        )
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_ddpm.randn_tensor",
            lambda *_, **__: to_torch(next(noise)),
        )
    wanted = run(reference, scheduler, num_inference_steps=10)
    options: dict[str, Any] = dict(
        steps=10, guidance_scale=4.0, scheduler=name, negative_prompts=NEGATIVE
    )
    found = sd.sample(PROMPTS, latents=draw(), key=key, trajectory=True, **options)
    np.testing.assert_allclose(found.latents, wanted.movedim(1, -1).numpy(), atol=1e-3)
    assert np.abs(found.latents).max() > 1.5
    np.testing.assert_array_equal(found.images, jnp.clip(sd.decode(found.latents), -1, 1))
    seen = found.trajectory
    assert seen.x_t.shape == seen.epsilon.shape == (len(seen.t), 2, 8, 12, 4)
    np.testing.assert_array_equal(seen.x_t[0], draw())
    assert seen.base is None and seen.safe is None
    # Each is what the guided score says there.
    t = jnp.full(2, seen.t[4])
    text = sd.encode_text(PROMPTS)
    null = sd.encode_text(NEGATIVE)
    one, none = (sd.epsilon(seen.x_t[4], t, given) for given in (text, null))
    np.testing.assert_allclose(none + 4 * (one - none), seen.epsilon[4], atol=1e-4)


@pytest.mark.parametrize(
    ("safety", "clip_sample"),
    [("medium", False), (SafeGuidance(2, 30.0, 0.0, 0.5, 0.7), True)],
    ids=["medium", "early"],
)
@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
def test_a_safe_chain_is_that_of_diffusers_pipeline(both, safety, clip_sample):
    reference, sd = both
    sd = stated(sd, clip_sample=clip_sample)
    numbers = SafeGuidance() if safety == "medium" else safety
    wanted = run(
        reference,
        CLASSES["ddim"].from_config(clipping(clip_sample)),
        diffusers.StableDiffusionPipelineSafe,
        num_inference_steps=12,
        sld_guidance_scale=numbers.scale,
        sld_warmup_steps=numbers.warmup,
        sld_threshold=numbers.threshold,
        sld_momentum_scale=numbers.momentum,
        sld_mom_beta=numbers.beta,
    )
    options: dict[str, Any] = dict(
        steps=12, guidance_scale=4.0, scheduler="ddim", negative_prompts=NEGATIVE
    )
    found = sd.sample(PROMPTS, latents=draw(), safety=safety, trajectory=True, **options)
    np.testing.assert_allclose((found.images + 1) / 2, wanted, atol=1e-3)
    seen = found.trajectory
    np.testing.assert_allclose(seen.epsilon, seen.safe, atol=1e-5)
    # Watched alone it changes nothing, and says the same as long as the paths are one.
    watched = dataclasses.replace(numbers, followed=False)
    plain = sd.sample(PROMPTS, latents=draw(), safety=watched, trajectory=True, **options)
    assert np.abs(plain.latents - found.latents).max() > 0.01
    np.testing.assert_allclose(plain.trajectory.epsilon, plain.trajectory.base, atol=1e-5)
    until = numbers.warmup + 1
    np.testing.assert_allclose(plain.trajectory.safe[:until], seen.safe[:until], atol=1e-5)
    apart = np.abs(seen.epsilon - seen.base).max((1, 2, 3, 4))
    assert not apart[: numbers.warmup].any() and apart[numbers.warmup :].all()


def test_strengths_are_the_published_ones():
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

    for name in ("weak", "medium", "strong", "max"):
        ours, theirs = as_safety(name), getattr(SafetyConfig, name.upper())
        assert ours is not None and dataclasses.astuple(ours)[:5] == tuple(
            theirs[f"sld_{k}"]
            for k in ("warmup_steps", "guidance_scale", "threshold", "momentum_scale", "mom_beta")
        )
    assert as_safety("medium") == SafeGuidance()
    pipe = diffusers.StableDiffusionPipelineSafe
    assert SafeGuidance().concept in " ".join(map(str, pipe.__init__.__code__.co_consts))


def test_a_chain_is_compiled_once(both):
    _, sd = both
    options: dict[str, Any] = dict(steps=3, key=jax.random.key(0))
    drawn = sd.sample("a cat", safety="weak", **options)
    assert drawn.latents.shape == (1, 8, 8, 4) and drawn.images.shape == (1, 16, 16, 3)
    with compilations() as found:
        safety = SafeGuidance(1, 5.0, 0.1, 0.2, 0.3, concept="a dog")
        sd.sample(["dog"], guidance_scale=2.0, safety=safety, negative_prompts=["cat"], **options)
        other = sd.replace(unet=jax.tree.map(lambda x: 2 * x, sd.unet))
        with compilations() as again:
            other.sample(["dog"], safety="max", **options)
    assert "chain" not in found and "chain" not in again


def test_a_v_model_says_epsilon_and_without_guidance_the_prompt_stands_alone(both):
    _, sd = both
    sd = stated(sd, prediction_type="v_prediction")
    options: dict[str, Any] = dict(steps=2, latents=draw(), scheduler="ddim", trajectory=True)
    seen = sd.sample(PROMPTS, guidance_scale=1.0, **options).trajectory
    for i in range(2):
        wanted = sd.epsilon(seen.x_t[i], jnp.full(2, seen.t[i]), sd.encode_text(PROMPTS))
        np.testing.assert_allclose(seen.epsilon[i], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(prompts=[]), "prompts are none: give one"),
        (dict(prompts=["a cat", " "]), "prompt 2 is empty"),
        (dict(prompts=[3]), "number 1 is a int, no text"),
        (dict(latents=None), "draws latents to begin with: give key="),
        (dict(scheduler="ddpm"), "draws noise of its own: give key="),
        (dict(scheduler="euler"), "scheduler 'euler' is unknown; known are pndm, ddim, ddpm"),
        (dict(steps=0), "steps must be a whole number, 1 to 200, not 0"),
        (dict(steps=200), "200 steps begin at diffusion step 200, .* give fewer steps"),
        (dict(safety="mild"), "safety 'mild' is unknown; known are weak, medium, strong, max"),
        (dict(safety="weak", guidance_scale=1.0), "safe guidance needs classifier-free guidance"),
        (dict(guidance_scale=float("nan")), "guidance_scale is nan"),
        (dict(negative_prompts=["a", "b", "c"]), "3 negative prompts for 2 prompts"),
        (dict(latents=draw(3)), "3 latents for 2 prompts"),
        (dict(latents=draw()[..., :3]), r"latents is \[2, 8, 12, 3\], where .* 4\] belongs"),
        (dict(latents=draw() * np.nan), "latents: NaN or infinity"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:20],
)
def test_bad_input_of_sample(both, options, said):
    _, sd = both
    given: dict[str, Any] = dict(prompts=PROMPTS, latents=draw()) | options
    with pytest.raises(InputError, match=said) as error:
        sd.sample(**given)
    assert "\n" not in str(error.value)


def test_bad_input_elsewhere(both):
    _, sd = both
    images = jnp.zeros((1, 8, 8, 3))
    text, t = sd.encode_text(["a"]), jnp.zeros(1, jnp.int32)
    x_t = draw(1)
    for call, said in (
        (lambda: sd.encode(images[..., :1]), r"images are \[1, 8, 8, 1\], where .* 3\] belongs"),
        (lambda: sd.encode(images[:, :7]), "images are 7 x 8: give sides that are multiples of 2"),
        (lambda: sd.encode(images.astype(jnp.uint8)), "uint8, .* x / 127.5 - 1"),
        (lambda: sd.encode(images / 0), "images: NaN"),
        (lambda: sd.decode(x_t[..., :2]), "latents is"),
        (lambda: sd.epsilon(x_t, t, text[0]), r"text is \[77, 12\], where"),
        (lambda: sd.epsilon(x_t, t + 200, text), "t is 200, where the schedule has the steps"),
        (lambda: sd.epsilon(x_t[0], t, text), "t is int32|x_t is"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    with pytest.raises(InputError, match="beta must be 0 to 1, not 2"):
        SafeGuidance(beta=2)
    with pytest.raises(InputError, match="concept is empty"):
        SafeGuidance(concept=" ")


def test_a_chain_over_a_mesh_is_the_same(both):
    """Weights cut by the rules of all networks, rows over the data and fsdp axes."""
    _, sd = both
    mesh = make_mesh(2, 2, 2)
    placed = sharding.place(sd, mesh)
    kernel = placed.unet["mid_block.resnets.0"]["conv1"]["kernel"]
    assert tuple(kernel.sharding.spec) == (None, None, "fsdp", "tensor")
    latents = jax.device_put(draw(4), batch_sharding(mesh))
    # Safe guidance multiplies differences by up to 5,000, and their rounding with them.
    for safety, close in ((None, 1e-5), ("max", 1e-4)):
        options: dict[str, Any] = dict(steps=2, safety=safety)
        found = placed.sample(PROMPTS * 2, latents=latents, **options)
        wanted = sd.sample(PROMPTS * 2, latents=draw(4), **options)
        np.testing.assert_allclose(found.latents, wanted.latents, rtol=close, atol=close)
        np.testing.assert_allclose(found.images, wanted.images, rtol=close, atol=close)
