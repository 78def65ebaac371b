"""`tuco-jax finetune`: a tuned model out of a base, by LoRA or in full."""

from tuco_jax.finetune.conversations import read_conversations
from tuco_jax.finetune.options import FinetuneConfig as Config
from tuco_jax.finetune.options import check

__all__ = ["Config", "run"]


def run(config: Config) -> None:
    """Train; the run prints where its result is."""
    check(config)
    for data in (config.data, config.eval_data):
        if data is not None:
            read_conversations(data)  # it may be refused, long before it is used
    from tuco_jax.finetune.finetune import run_finetune

    run_finetune(config)
