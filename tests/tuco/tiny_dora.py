"""A DoRA adapter on disk: what it makes of each matrix is no low-rank sum."""

import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.weights.peft.write import save

__all__ = ["save_dora"]


def save_dora(folder: pathlib.Path, config: ModelConfig, factors: Params) -> None:
    """Low-rank factors, their scale in "b", and magnitudes from a half to one and a half."""
    save(folder, config, jax.tree.map(np.asarray, factors), base_name="owner/name")
    settings, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    tensors = load_file(weights)
    outputs = {name: len(x) for name, x in tensors.items() if "lora_B" in name}
    for name, size in outputs.items():
        magnitude = np.linspace(0.5, 1.5, size, dtype=np.float32)
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude
    save_file(tensors, weights)
