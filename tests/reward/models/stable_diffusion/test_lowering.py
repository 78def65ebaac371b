"""The main functions, lowered for a TPU and a GPU that are not here; nothing is computed."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from reward_jax.models.stable_diffusion import attention
from reward_jax.models.stable_diffusion.config import (
    SchedulerConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from reward_jax.models.stable_diffusion.safety import Numbers, SafeGuidance
from reward_jax.models.stable_diffusion.sampling import Guided, chain
from reward_jax.models.stable_diffusion.schedulers import plan, schedule_of
from reward_jax.models.stable_diffusion.text import TextEncoder
from reward_jax.models.stable_diffusion.unet import UNet
from reward_jax.models.stable_diffusion.vae import Decoder, Encoder
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.reward.extract import learn
from reward_jax.reward.targets import Targets

SCHEDULER = SchedulerConfig.of(dict(num_train_timesteps=200, skip_prk_steps=True), "here")
STATED: dict[str, Any] = dict(
    sample_size=8,
    block_out_channels=[16, 32],
    layers_per_block=1,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    attention_head_dim=2,  # heads, of 8 and 16 features
    cross_attention_dim=12,
    norm_num_groups=4,
)
UNET = UNet(UNetConfig.of(STATED, "here"))
TRANSFORMERS = 1 + 1 + 2  # on the way down, in the middle, on the way up
# Of a transformer: in and out, two attentions of six, an MLP of two. Then those of the time and
# its part in each residual block, shortcuts, and PNDM's sum of four outputs.
DOTS = TRANSFORMERS * (2 + 2 * 6 + 2) + 2 + 8 + 5 + 1
VAE = VAEConfig.of(
    dict(
        block_out_channels=[8, 136],  # of the one head, which is too wide for cuDNN
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
    ),
    "here",
)
CLIP = TextConfig.of(
    dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2), "here"
)
NAMES = {jnp.float32: "f32", jnp.bfloat16: "bf16"}
of_each_dtype = pytest.mark.parametrize("dtype", NAMES, ids=["float32", "bfloat16"])


@pytest.fixture(params=["tpu", "cuda"])
def platform(request, monkeypatch):
    """What is traced is as if a TPU, or an H100, were here."""
    backend = "gpu" if request.param == "cuda" else "tpu"
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    if backend == "gpu":
        monkeypatch.setattr(attention, "cudnn_width", lambda: 256)
        monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    return request.param


def lowered(platform, function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def shaped(*shape, dtype: Any = jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def params_of(module, dtype, *inputs):
    made = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: shaped(*x.shape, dtype=dtype), made)


def products(text):
    """Of each: its name, the dtypes of its operands, whether it asks for all their bits."""
    found = re.findall(
        r"= stablehlo\.(dot_general|convolution)\b(.*) : "
        r"\(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)",
        text,
    )
    assert len(found) == len(re.findall(r"stablehlo\.(?:dot_general|convolution)\b", text)) > 0
    return [(name, {a, b}, rest.count("HIGHEST") == 2) for name, rest, a, b in found]


@pytest.mark.parametrize(
    ("dtype", "safe"),
    [(jnp.float32, True), (jnp.bfloat16, True), (jnp.bfloat16, False)],
    ids=["safe-float32", "safe-bfloat16", "guided-bfloat16"],
)
def test_chains(platform, dtype, safe):
    latents, text = shaped(2, 8, 8, 4), (2, 5, 12)
    params = params_of(UNET, dtype, latents, shaped(2, dtype=jnp.int32), shaped(*text))
    schedule, steps = schedule_of(SCHEDULER), plan(SCHEDULER, "pndm", 4)
    numbers = Numbers.of(SafeGuidance()) if safe else None

    def run(params, latents, prompt, nothing, concept=None):
        guided = Guided(prompt, nothing, concept, jnp.float32(7.5), numbers)
        given = params, schedule, steps, latents, guided, None
        # Not `chain`: what is traced here must not be what another test finds, on a CPU.
        return chain.__wrapped__(*given, model=UNET, trajectory=True)

    texts = [shaped(*text, dtype=dtype)] * (3 if safe else 2)
    found = lowered(platform, run, params, latents, *texts)
    assert found.count("stablehlo.while") == 1  # the steps, and no attention in parts
    by_cudnn = 2 * TRANSFORMERS if (platform, dtype) == ("cuda", jnp.bfloat16) else 0
    assert found.count("@__cudnn$fmhaSoftmax(") == found.count("custom_call") == by_cudnn
    kinds = products(found)
    assert sum(name == "dot_general" for name, *_ in kinds) == DOTS - 2 * by_cudnn
    # What weights multiply is as they are stored; the chain itself is in float32.
    assert sum(dtypes != {NAMES[dtype]} for _, dtypes, _ in kinds) == (dtype == jnp.bfloat16)
    assert all(precise for *_, precise in kinds)


@of_each_dtype
def test_autoencoder_and_text_encoder(platform, dtype):
    tokens = shaped(2, 7, dtype=jnp.int32)
    for module, given in (
        (Encoder(VAE), shaped(2, 8, 8, 3)),
        (Decoder(VAE), shaped(2, 4, 4, 4)),
        (TextEncoder(CLIP), tokens),
    ):
        params = params_of(module, dtype, given)
        given = given if given is tokens else shaped(*given.shape, dtype=dtype)
        text = lowered(platform, lambda p, x, m=module: m.apply({"params": p}, x), params, given)
        assert "custom_call" not in text
        for _, dtypes, precise in products(text):
            assert dtypes == {NAMES[dtype]} and precise


def test_matching_of_latents(platform):
    half = HalfUNet2D(4, dim=8, groups=4, patch=1)
    x, t, adam = shaped(3, 2, 8, 8, 4), shaped(3, 2, dtype=jnp.int32), optax.adam(1e-3)
    params = params_of(half, jnp.float32, shaped(2, 8, 8, 4), shaped(2, dtype=jnp.int32))
    state = params, jax.eval_shape(adam.init, params)
    fixed: dict[str, Any] = dict(pin=None, seeds=False, apart=False, mesh=None)

    def run(state, weights, targets):
        step = learn.__wrapped__  # as of `chain`
        return step(state, weights, None, targets, reward=half, rule=adam.update, **fixed)

    text = lowered(platform, run, state, shaped(200), Targets(x, t, x, "epsilon"))
    assert text.count("stablehlo.while") == 1 and "custom_call" not in text
    # Six convolutions: their values and slopes, and both of either's derivatives; the first one's
    # value has none by what it is given.
    assert sum(name == "convolution" for name, *_ in products(text)) == 6 * (2 + 2 * 2) - 1
