"""Each network against diffusers' and transformers', of odd shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from reward_jax import load_stable_diffusion
from tests.reward.stable_diffusion_reference import UNET, VAE, pipeline

UNETS = {
    "as published": UNET,
    "linear, one width, three levels": dict(
        sample_size=9,
        block_out_channels=(12, 8, 20),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=2,
        norm_eps=1e-4,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 1),
        flip_sin_to_cos=False,
        freq_shift=1,
    ),
}
VAES = {
    "as published": VAE,
    "linear, one width, three levels": dict(
        block_out_channels=(4, 8, 12),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=8,
        use_quant_conv=False,
        scaling_factor=0.3,
    ),
}


@pytest.fixture(scope="module", params=UNETS, ids=["two-levels", "three-levels"])
def both(request, tmp_path_factory):
    """A pipeline of diffusers, and ours of its folder."""
    reference = pipeline(1, UNETS[request.param], VAES[request.param])
    path = tmp_path_factory.mktemp("sd")
    reference.save_pretrained(path)
    return reference, load_stable_diffusion(path)


def to_torch(x):
    return torch.from_numpy(np.array(x)).movedim(-1, 1)


def to_jax(x):
    return x.detach().movedim(1, -1).numpy()


def test_text_encoder(both):
    reference, sd = both
    prompts = ["a red cat sits", "", "an image of violence, 3 dogs"]
    ids = reference.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        wanted = reference.text_encoder(ids.input_ids)[0].numpy()
    assert np.array_equal(ids.input_ids.numpy(), sd.tokens(prompts))
    found = sd.encode_text(prompts)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_unet(both):
    reference, sd = both
    height, width = sd.config.unet.sample_size
    rows = [jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(3, height, width, 4)])]
    x_t, t = rows[0], jnp.array([0, 57, 199])
    text = jax.random.normal(jax.random.key(1), (3, 11, sd.config.unet.text_width))
    with torch.no_grad():
        wanted = reference.unet(
            to_torch(x_t), torch.tensor(t.tolist()), torch.from_numpy(np.array(text))
        ).sample
    assert np.abs(to_jax(wanted)).max() > 0.1
    np.testing.assert_allclose(sd.epsilon(x_t, t, text), to_jax(wanted), atol=1e-4)


def test_autoencoder(both):
    reference, sd = both
    factor, scale = sd.config.vae.factor, sd.config.vae.scale
    images = jax.random.uniform(jax.random.key(0), (2, 3 * factor, 5 * factor, 3), minval=-1)
    latents = jax.random.normal(jax.random.key(1), (2, 3, 5, 4))
    with torch.no_grad():
        posterior = reference.vae.encode(to_torch(images)).latent_dist
        decoded = reference.vae.decode(to_torch(latents) / scale).sample
    np.testing.assert_allclose(sd.encode(images), to_jax(posterior.mean) * scale, atol=1e-4)
    np.testing.assert_allclose(sd.decode(latents), to_jax(decoded), atol=1e-4)
    key = jax.random.key(2)
    drawn = (sd.encode(images, key) - sd.encode(images)) / scale
    noise = jax.random.normal(key, drawn.shape)
    np.testing.assert_allclose(drawn, to_jax(posterior.std) * noise, atol=1e-4)
