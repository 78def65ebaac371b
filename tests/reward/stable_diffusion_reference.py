"""Tiny random Stable Diffusions, written by diffusers: the reference of tests."""

import json
import pathlib
from typing import Any

import diffusers as untyped
import torch
import transformers

diffusers: Any = untyped  # its lazy names are unknown to a type checker

# Steps of a scheduler as published folders state them, of a schedule that is quicker to walk.
SCHEDULER: dict[str, Any] = dict(
    num_train_timesteps=200,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    clip_sample=False,
)
UNET: dict[str, Any] = dict(
    sample_size=(8, 12),
    block_out_channels=(8, 24),
    layers_per_block=(1, 2),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=(2, 3),
    cross_attention_dim=12,
    norm_num_groups=4,
    use_linear_projection=False,
)
VAE: dict[str, Any] = dict(
    block_out_channels=(8, 12),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=16,
)
WORDS = ("a", "cat", "dog", "red", "sits", "an", "image", "nude", "violence")


def tokenizer() -> Any:
    """Letters, and a few words that are merged."""
    pieces = [chr(c) for c in range(33, 127)]
    merges = []
    vocabulary = pieces + [f"{c}</w>" for c in pieces]
    for text in WORDS:
        parts = [*text[:-1], f"{text[-1]}</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            parts = ["".join(merge), *parts[2:]]
            if merge not in merges:
                merges.append(merge)
                vocabulary.append(parts[0])
    vocabulary = list(dict.fromkeys(vocabulary)) + ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(
        vocab={text: i for i, text in enumerate(vocabulary)}, merges=merges, model_max_length=77
    )


def pipeline(seed: int = 0, unet: Any = UNET, vae: Any = VAE, scheduler: Any = SCHEDULER) -> Any:
    """A pipeline with weights that are no small perturbation of nothing."""
    torch.manual_seed(seed)
    clip_tokenizer = tokenizer()
    text = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=unet["cross_attention_dim"],
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
    )
    made = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**vae),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=clip_tokenizer,
        unet=diffusers.UNet2DConditionModel(**unet),
        scheduler=diffusers.PNDMScheduler.from_config(scheduler),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    for part in (made.unet, made.vae, made.text_encoder):
        for parameter in part.parameters():
            if parameter.ndim == 1:  # norms and biases begin at ones and zeros
                parameter.data += 0.1 * torch.randn_like(parameter)
        part.eval()
    made.set_progress_bar_config(disable=True)
    return made


def restate(folder: pathlib.Path, file: str, **options: Any) -> None:
    """Change options of a JSON file."""
    path = folder / file
    stated = json.loads(path.read_text()) | options
    path.write_text(json.dumps(stated))
