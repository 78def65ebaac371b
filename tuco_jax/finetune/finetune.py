"""Make a tuned model from a base, by LoRA or in full, and watch TuCo while it trains.

    run/
      config.yaml, environment.json, metrics.jsonl, tensorboard/     (`common_jax/run.py`)
      checkpoints/     the newest few, whole training states
      adapter/         LoRA: the result, as the PEFT library lays it out
      model/           full tuning: the result, as a Hugging Face directory, or as a store where
                       the base did not come from one

A run is a function of its settings and data, since every step's rows follow from (seed, step). One
that was killed is resumed from its last checkpoint and comes to the same result.
"""

import dataclasses
import math
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common_jax import resume
from common_jax.distributed import by_first, count, is_first
from common_jax.errors import InputError
from common_jax.io.checkpoint import Checkpoints
from common_jax.mesh import fetch, mesh_for, put
from common_jax.progress import bar
from common_jax.run import Run
from common_jax.termination import Terminated, noticed
from tuco_jax.core.checksum import weights_checksum
from tuco_jax.finetune import lora as low_rank
from tuco_jax.finetune.batches import Batch, Plan, bucket, pack, rows_checksum
from tuco_jax.finetune.conversations import Conversation, read_conversations, tokenize
from tuco_jax.finetune.metrics import MetricsWindow
from tuco_jax.finetune.options import FinetuneConfig, check
from tuco_jax.finetune.step import (
    Method,
    TrainState,
    make_eval,
    make_step,
    start,
)
from tuco_jax.generation.generate import end_tokens
from tuco_jax.models import sharding
from tuco_jax.models.decoder import Params
from tuco_jax.models.pair import Pair, single
from tuco_jax.prompts.chat_templates import check_template, read_template
from tuco_jax.prompts.encode import encode
from tuco_jax.prompts.read import (
    Prompt,
    read_prompts,
)
from tuco_jax.scoring.score import score_tokens
from tuco_jax.weights.hf import model as huggingface
from tuco_jax.weights.load import load_model
from tuco_jax.weights.model import Model
from tuco_jax.weights.orbax import store
from tuco_jax.weights.peft import write as peft

__all__ = ["run_finetune"]


# Settings that may change when a run goes on; the data is known by its checksum.
_FREE = {"data", "out", "eval_data", "watch", "resume", "keep", "mesh", "export_dtype", "remat"}
_FREE |= {"log_every", "eval_every", "watch_every", "save_every"}


def run_finetune(config: FinetuneConfig) -> pathlib.Path:
    """Train, and return the directory of the result (adapter/ or model/ of the run).

    Raises InputError for bad settings, files or data before anything is written, and when the loss
    is not finite any more, naming the step and the last good checkpoint.
    """
    check(config)
    mesh = mesh_for(dataclasses.asdict(config.mesh))
    if mesh is not None and config.batch % sharding.batch_width(mesh):
        raise InputError(
            f"batch: {config.batch} rows cannot be sharded over {mesh.shape['data']} x "
            f"{mesh.shape['fsdp']} devices (data x fsdp); choose a multiple"
        )
    named = config.chat_template
    template = None if named is None else read_template(named)
    training, held_out = _read(config)
    watched = read_prompts(config.watch) if config.watch else []

    placement = sharding.placement(mesh) if mesh else None
    model = load_model(config.base, dtype=config.dtype, placement=placement)
    precision = "bfloat16" if config.dtype == "bfloat16" else "float32"
    model = model._replace(config=dataclasses.replace(model.config, precision=precision))
    if named is not None and template is not None and model.tokenizer is not None:
        check_template(named, template, model.tokenizer)
        model.tokenizer.chat_template = template
    tables = _tables(config, model, training)
    plan = Plan(tables, config.batch * config.accumulate, config.seed)
    evaluation = Plan(_tables(config, model, held_out), config.batch, 0) if held_out else None
    watched_tokens = _encode(model, watched)

    total = config.steps or config.epochs * plan.steps
    optimizer = config.optimizer.make(total)
    method = Method(config.lora.scale if config.method == "lora" else None, config.dtype)
    state = start(_trained(config, model), optimizer)
    if mesh:
        state = sharding.place(state, mesh)
    trainer = _Trainer(
        config=config,
        model=model,
        method=method,
        mesh=mesh,
        plan=plan,
        total=total,
        step=make_step(model.config, method, optimizer, remat=config.remat, mesh=mesh),
        evaluate=_evaluator(model, method, mesh, evaluation),
        watch=_watcher(model, method, mesh, watched, watched_tokens),
    )
    return _export(config, model, method, trainer.train(state, rows_checksum(tables)), template)


def _read(config: FinetuneConfig) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to train on, and those held out."""
    rows = read_conversations(config.data)
    if config.eval_data:
        return rows, read_conversations(config.eval_data)
    count = math.ceil(config.eval_fraction * len(rows))
    if count >= len(rows):
        raise InputError(f"{config.data}: eval_fraction leaves no row of {len(rows)} to train on")
    order = np.random.default_rng([config.seed, len(rows)]).permutation(len(rows))
    out = set(order[:count].tolist())
    return (
        [row for i, row in enumerate(rows) if i not in out],
        [row for i, row in enumerate(rows) if i in out],
    )


def _tables(
    config: FinetuneConfig, model: Model, conversations: Sequence[Conversation]
) -> list[Batch]:
    if model.tokenizer is None:
        raise InputError(f"{config.base}: has no tokenizer, which training needs")
    length = min(config.length, model.config.max_positions)
    examples = tokenize(
        model.tokenizer,
        conversations,
        max_tokens=length,
        vocab_size=model.config.vocab_size,
        truncate=config.truncate,
    )
    if not config.packing:
        return bucket(examples)
    for rope in model.config.ropes:
        if rope.switch and length > rope.switch:
            raise InputError(
                f"packing: the model's rotary positions change for rows beyond {rope.switch} "
                f"tokens; set packing to false, or length to {rope.switch}"
            )
    return [pack(examples, length)]


def _encode(model: Model, prompts: list[Prompt]) -> list[np.ndarray]:
    if not prompts:
        return []
    assert model.tokenizer is not None
    return encode(
        model.tokenizer,
        prompts,
        max_tokens=model.config.max_positions,
        vocab_size=model.config.vocab_size,
    )


def _trained(config: FinetuneConfig, model: Model) -> Params:
    """The initial values of what is trained: new factors, or a float32 copy of the base."""
    if config.method == "lora":
        return low_rank.init(model.config, config.lora, jax.random.key(config.seed))
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), model.params)


Measure = Callable[[Params], dict[str, float]]


def _evaluator(
    model: Model, method: Method, mesh: Mesh | None, plan: Plan | None
) -> Measure | None:
    """A function that measures the held-out loss, in nats an answer token."""
    if plan is None:
        return None
    evaluate = make_eval(model.config, method, mesh=mesh)
    batches = [_put(batch, mesh, micro=False) for batch in plan.sweep()]

    def measure(trained: Params) -> dict[str, float]:
        parts = [evaluate(trained, _base(model, method), batch) for batch in batches]
        return {"eval_loss": float(sum(p[0] for p in parts) / sum(p[1] for p in parts))}

    return measure


def _watcher(
    model: Model,
    method: Method,
    mesh: Mesh | None,
    prompts: list[Prompt],
    tokens: list[np.ndarray],
) -> Measure | None:
    """A function that measures TuCo of the watched prompts: its mean, also by label, its error."""
    if not prompts:
        return None
    labels = np.asarray([str(p.label) for p in prompts])
    named = sorted({str(p.label) for p in prompts if p.label is not None})

    def measure(trained: Params) -> dict[str, float]:
        params, factors = method.model(trained, {})
        pair = Pair(model.params, params, factors, model.config, model.config)
        scores = score_tokens(pair, tokens, prompts, mesh=mesh)
        tuco = scores.tuco
        means = {f"tuco/{name}": float(tuco[labels == name].mean()) for name in named}
        error = float(scores.telescoping.max())
        return {"tuco/mean": float(tuco.mean()), **means, "tuco/telescoping": error}

    return measure


def _base(model: Model, method: Method) -> Params:
    """The base's parameters if the tuned model needs them, as with an adapter."""
    return {} if method.scale is None else model.params


def _put(batch: Batch, mesh: Mesh | None, *, micro: bool = True) -> Batch:
    """Put a batch on the devices, its rows sharded over data and fsdp; micro: they are axis 1."""
    if mesh is None:
        return jax.device_put(batch)
    rows = ("data", "fsdp")
    spec = PartitionSpec(None, rows) if micro else PartitionSpec(rows)
    return put(batch, NamedSharding(mesh, spec))


@dataclasses.dataclass
class _Trainer:
    """The training loop: steps, and what is logged, measured and saved between them."""

    config: FinetuneConfig
    model: Model
    method: Method
    mesh: Mesh | None
    plan: Plan
    total: int
    step: Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Measure | None
    watch: Measure | None

    def train(self, state: TrainState, data: str) -> Params:
        """Train until step `total`, from the last checkpoint if there is one."""
        directory = pathlib.Path(self.config.out)
        settings = dataclasses.asdict(self.config) | {"resume": False}
        fixed = settings | {
            "steps": self.total,
            "precision": self.model.config.precision,
            "rows of tokens (their checksum)": data,
            "base's weights (their checksum)": weights_checksum(
                single(self.model.config, self.model.params)
            ),
        }
        with (
            noticed() as ending,
            resume.hold(directory, fixed, free=_FREE),
            Checkpoints(directory / "checkpoints", keep=self.config.keep) as checkpoints,
        ):
            done = checkpoints.latest() or 0
            if done:
                state = checkpoints.restore(done, like=state)
            with Run(directory, settings, start=done) as run:
                return self._steps(state, run, checkpoints, ending)

    def _steps(
        self, state: TrainState, run: Run, checkpoints: Checkpoints, ending: Callable[[], bool]
    ) -> Params:
        with bar("training", self.total, start=run.start) as shown:
            if not run.start:
                self._measure(run, 0, state, always=True)
            window = MetricsWindow(
                self.config.out, self.config.optimizer.learning_rate, checkpoints
            )
            for index in range(run.start, self.total):
                batch = self.plan.batch(index)
                micro = (self.config.accumulate, self.config.batch)
                device = Batch(*(a.reshape(*micro, *a.shape[1:]) for a in batch))
                base = _base(self.model, self.method)
                state, metrics = self.step(state, base, _put(device, self.mesh))
                window.add(index + 1, metrics, int(batch.mask.sum()))
                step, last = index + 1, index + 1 == self.total
                logs, saves = self._due(step, "log"), self._due(step, "save")
                if logs or saves or last or self._due(step, "eval") or self._due(step, "watch"):
                    window.check()
                if logs or last:
                    rate = jnp.asarray(self.config.optimizer.schedule(self.total)(index))
                    values = window.close() | {"learning_rate": rate.item()}
                    run.log(step, values)
                    shown.update(step, f"loss {values['loss']:.3f}")
                paused = time.perf_counter()
                self._measure(run, step, state, always=last)
                ends = logs and ending()  # where values have been waited for
                if (
                    saves or last or ends
                ):  # last of all: what is logged up to a checkpoint is kept with it
                    window.check_weights(step, state.trained)
                    checkpoints.save(step, state)
                if ends:
                    done = f"step {step} of {self.total} is saved"
                    raise Terminated(f"{done}, from which the run goes on with --resume true")
                window.began += time.perf_counter() - paused
        return state.trained

    def _due(self, step: int, what: Literal["log", "eval", "watch", "save"]) -> bool:
        return step % getattr(self.config, f"{what}_every") == 0

    def _measure(self, run: Run, step: int, state: TrainState, always: bool) -> None:
        """The held-out loss and TuCo of the watched prompts, where they are due."""
        values: dict[str, float] = {}
        if self.evaluate and (always or self._due(step, "eval")):
            values |= self.evaluate(state.trained)
        if self.watch and (always or self._due(step, "watch")):
            values |= self.watch(state.trained)
        if values:
            run.log(step, values)


def _export(
    config: FinetuneConfig,
    model: Model,
    method: Method,
    trained: Params,
    template: str | None,
) -> pathlib.Path:
    """Write the result under another name, then replace what may be there.

    Of several processes process 0 writes it, from its host's memory; a store, all of them.
    """
    directory = pathlib.Path(config.out) / ("adapter" if config.method == "lora" else "model")
    scratch = directory.with_name(f".{directory.name}")
    by_first(lambda: shutil.rmtree(scratch, ignore_errors=True))
    dtype = jnp.dtype(config.export_dtype)

    def cast(tree: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def replace() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        scratch.replace(directory)

    try:
        if config.method == "lora":
            factors = fetch(cast(low_rank.fold_scale(trained, config.lora.scale)))
            about = {"base_name": config.base, "chat_template": template}
            by_first(lambda: peft.save(scratch, model.config, factors, **about))
        elif model.hf_config is None:  # a GGUF that is like no Hugging Face model
            store.save(scratch, model._replace(params=cast(trained)))
        else:
            params, tokenizer = cast(trained), model.tokenizer
            params = fetch(params) if count() > 1 else params
            ends = end_tokens(tokenizer) if tokenizer else ()
            given = model.config, params, tokenizer, model.hf_config
            by_first(lambda: huggingface.export(scratch, *given, ends=ends))
        by_first(replace)
    finally:
        if is_first():
            shutil.rmtree(scratch, ignore_errors=True)
    print(f"{'adapter' if config.method == 'lora' else 'model'}: {directory}")
    return directory
