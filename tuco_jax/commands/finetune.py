"""`tuco-jax finetune`: a tuned model out of a base, by LoRA or in full."""

from tuco_jax.finetune.finetune import FinetuneConfig as Config
from tuco_jax.finetune.finetune import run_finetune as run

__all__ = ["Config", "run"]
