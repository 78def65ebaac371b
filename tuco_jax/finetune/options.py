"""Options of fine-tuning; reads no weights, so that a refusal is quick."""

import dataclasses
from typing import Literal

from common_jax.cli.options import RunOptions
from common_jax.cli.ranges import BelowOne, PositiveInt, check_ranges
from common_jax.errors import InputError
from common_jax.run import check_directory
from tuco_jax.finetune.lora import LoraOptions
from tuco_jax.finetune.step import OptimizerOptions
from tuco_jax.weights.options import BaseOptions, check_source

__all__ = ["FinetuneConfig", "check"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(BaseOptions, RunOptions):
    """Tune a model on conversations; the loss is on the assistant's turns.

    The base's weights are held in dtype, and both operands of products with weights are of it;
    what is trained is float32.

    Args:
        data: .jsonl; rows have messages, and truncated: true where the answer was cut short.
        chat_template: gemma, chatml or a .jinja file, which is kept with the result; by default
            that of the base's tokenizer.
        method: train an adapter (lora), or all parameters (full).
        lora: the adapter.
        optimizer: AdamW and its schedule.
        steps: optimizer steps; by default those of the epochs.
        epochs: passes over all rows.
        batch: rows of a micro-batch, over all devices.
        accumulate: micro-batches of a step.
        length: tokens of a row, at most.
        packing: put several conversations in one row, none of which attends to another; else one
            in each row, with rows of a few different lengths.
        truncate: cut the end off conversations beyond length; else an error.
        eval_data: .jsonl of conversations that are held out.
        eval_fraction: share of data to hold out where there is no eval_data.
        watch: held-out prompts (.jsonl .csv .parquet .txt) whose TuCo is logged, by label.
        log_every: steps between lines of metrics.
        eval_every: steps between held-out losses.
        watch_every: steps between scores of the watched prompts.
        keep: how many checkpoints are kept, the newest.
        export_dtype: of the result.
        remat: recompute activations in the backward pass: less memory, up to half more time.
    """

    data: str
    chat_template: str | None = None
    method: Literal["lora", "full"] = "lora"
    lora: LoraOptions = dataclasses.field(default_factory=LoraOptions)
    optimizer: OptimizerOptions = dataclasses.field(default_factory=OptimizerOptions)
    steps: PositiveInt | None = None
    epochs: PositiveInt = 1
    batch: PositiveInt = 8
    accumulate: PositiveInt = 1
    length: PositiveInt = 512
    packing: bool = True
    truncate: bool = False
    eval_data: str | None = None
    eval_fraction: BelowOne = 0.0
    watch: str | None = None
    log_every: PositiveInt = 1
    eval_every: PositiveInt = 50
    watch_every: PositiveInt = 50
    save_every: PositiveInt = 50
    keep: PositiveInt = 2
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    remat: bool = False


def check(config: FinetuneConfig) -> None:
    """Raise InputError for settings, or a directory, that no run can have; reads no weights."""
    check_ranges(config)
    if config.dtype == "float16":
        raise InputError(
            "dtype: float16 has too small a range to train in; choose bfloat16 or float32"
        )
    if config.dtype == "int8" and config.method == "full":
        raise InputError(
            "dtype: int8 weights are not trained themselves: give --method lora, or another dtype"
        )
    if config.eval_data and config.eval_fraction:
        raise InputError("give eval_data or eval_fraction, not both")
    check_directory(config.out, resume=config.resume)
    check_source(config.base)
