"""The host's side of a training loop: several steps a compiled call, checkpoints, exact resume.

Legend: S seeds. Metrics are those of each step, [steps, ...]; `loss` is [steps] or [steps, S].
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree, Shaped

from common_jax import resume
from common_jax.checksum import program_checksum
from common_jax.cli.ranges import PositiveInt
from common_jax.distributed import by_first, count
from common_jax.errors import InputError
from common_jax.io.checkpoint import Checkpoints
from common_jax.mesh import fetch, on_all_devices, put
from common_jax.precision import jit, stated
from common_jax.termination import Terminated, noticed
from reward_jax.diffusion.process import Pinned
from reward_jax.diffusion.schedule import check_schedule

__all__ = [
    "Call",
    "LoopOptions",
    "OnStep",
    "begin",
    "check_applies",
    "check_finite",
    "check_key",
    "check_pin",
    "check_run",
    "check_seeds",
    "model_checksum",
    "pin_checksum",
    "quick_jit",
    "run_loop",
    "steps_done",
    "update_checksum",
]

# (state, first step, number of steps) -> (state, metrics)
Call = Callable[[Any, int, int], tuple[Any, Mapping[str, Float[Array, "steps ..."]]]]
# (steps done, metrics of the last call)
OnStep = Callable[[int, dict[str, Float[np.ndarray, "steps ..."]]], None]


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Sizes of a step, and of a compiled call.

    Args:
        batch_size: rows of a step, where batches are drawn here.
        steps_per_call: steps of one compiled call.
    """

    batch_size: PositiveInt = 128
    steps_per_call: PositiveInt = 100


_LEVEL = "xla_backend_optimization_level"


def quick_jit(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jit` for programs whose time goes into matrix products.

    On a CPU, LLVM's higher optimization levels take a tenth of the time of compiling, and do not
    make such a program faster (a reward of 1M parameters: 28.3 ms a step with them, 28.4 ms
    without). Inside another program, elsewhere, and where XLA_FLAGS names a level, it is no other.
    options: of `jax.jit`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        plain = jit(function, **options)
        if _LEVEL in os.environ.get("XLA_FLAGS", ""):  # chosen already
            return plain
        quick = jit(function, compiler_options={_LEVEL: 1}, **options)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            inside = any(isinstance(x, Tracer) for x in jax.tree.leaves((args, kwargs)))
            on_cpu = jax.default_backend() == "cpu"
            return (quick if on_cpu and not inside else plain)(*args, **kwargs)

        return call

    return decorate


@functools.partial(jit, static_argnames=("optimizer", "seeds"))
def begin(
    params: PyTree[Float[Array, "..."]], *, optimizer: optax.GradientTransformation, seeds: bool
) -> PyTree[Shaped[Array, "..."]]:
    """The optimizer's state, by one program; `init` alone compiles one for every shape.

    seeds: leaves of params have a leading axis [S], and so will the state's.
    """
    return (jax.vmap(optimizer.init) if seeds else optimizer.init)(params)


def update_checksum(
    optimizer: optax.GradientTransformation, params: Any, moments: Any, *, seeds: bool
) -> str:
    """A checksum of what an optimizer does: its learning rate, its schedule, and all else."""
    update = jax.vmap(optimizer.update) if seeds else optimizer.update
    return program_checksum(update, params, moments, params)


def model_checksum(
    apply: Callable[..., Any], params: PyTree[Float[Array, "..."]], *given: Any, seeds: bool
) -> str:
    """A checksum of what a network computes, and of its derivative in its parameters.

    apply: (params, *given) -> an array. seeds: as of `begin`.
    """

    def slope(params: Any, *given: Any) -> Any:
        return jax.grad(lambda params: jnp.sum(jnp.square(apply(params, *given))))(params)

    each = (0, *(None for _ in given))
    return program_checksum(jax.vmap(slope, in_axes=each) if seeds else slope, params, *given)


def pin_checksum(pin: Any, x_0: Float[Array, "B ..."]) -> str | None:
    """A checksum of what a pin imposes, and where; None for none."""
    return None if pin is None else program_checksum(lambda x: (pin(x)(x), pin(x).free(x)), x_0)


def check_run(
    network: Any, schedule: Any, optimizer: Any, steps: Any, key: Any, pin: Any = None
) -> None:
    """Raise InputError for the first that is not what it is called."""
    if not hasattr(network, "apply"):
        raise InputError(
            f"the network is a {type(network).__name__}: give a module with init and apply"
        )
    check_schedule(schedule)
    if pin is not None and (isinstance(pin, Pinned) or not callable(pin)):
        raise InputError(
            f"pin is a {type(pin).__name__}: give a function x_0 -> Pinned, such as FirstState()"
        )
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise InputError(
            f"optimizer is a {type(optimizer).__name__}: give one of optax, such as "
            "optax.adam(1e-3)"
        )
    if not isinstance(steps, int | np.integer) or steps < 1:
        raise InputError(f"steps must be a whole number, 1 or more, not {steps!r}")
    check_key(key)


def check_applies(what: str, function: Callable[..., Any], *given: Any) -> Any:
    """The shapes of what a user's function gives; nothing is computed.

    what: it is, in the message. Raises InputError with the first line of whatever it raises.
    """
    try:
        return jax.eval_shape(function, *given)
    except InputError:
        raise
    except Exception as error:  # it is the user's: anything
        said = next(iter(str(error).strip().splitlines()), "")[:200]
        raise InputError(f"{what}: {said or type(error).__name__}") from error


def check_pin(pin: Any, x_0: Float[Array, "B ..."]) -> None:
    """Raise InputError for a pin of x_0 that gives no `Pinned`."""
    if pin is None:
        return
    made = check_applies(f"pin cannot be applied to x_0 of {list(x_0.shape)}", pin, x_0)
    if not isinstance(made, Pinned):
        raise InputError(
            f"pin gives a {type(made).__name__}: it must give a Pinned, as FirstState() does"
        )


def check_key(key: Any) -> None:
    """Raise InputError for what is no key of `jax.random`, new or old."""
    if not isinstance(key, jax.Array | np.ndarray) or not (
        key.shape == ()
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        else key.dtype == "uint32"
    ):
        raise InputError(f"key is {key!r}: give one key, such as jax.random.key(0)")


def check_seeds(params: PyTree[Float[Array, "..."]], seeds: int | None) -> None:
    """Raise InputError where a leaf lacks the leading axis [S] that `seeds` asks for."""
    if seeds is None:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if np.shape(leaf)[:1] != (seeds,):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise InputError(
                f"params: {name} has shape {list(np.shape(leaf))}; with seeds={seeds} every "
                f"parameter has a leading axis of {seeds}, as those made with seeds have"
            )


def run_loop(
    call: Call,
    state: Any,
    *,
    steps: int,
    per_call: int,
    on_step: OnStep | None = None,
    directory: str | pathlib.Path | None = None,
    save_every: int | None = None,
    settings: Callable[[], Mapping[str, Any]] = dict,
) -> tuple[Any, dict[str, Float[np.ndarray, "steps ..."]]]:
    """Run `steps` steps, from the newest checkpoint in `directory` where there is one.

    state: a tuple, parameters first.
    on_step: called after each compiled call with the steps done and the call's metrics.
    directory: for checkpoints, every `save_every` steps (default: at the end alone), rounded up to
    whole calls. settings: called where there is a directory; what it gives must be the same when a
    run is resumed (`common_jax.resume`), and so must the precision of products.
    Returns the state and the metrics of the steps that were run now.
    Raises InputError when the loss is no longer finite, or the parameters that would be saved or
    returned are not, naming the step; the checkpoints before it stay as they are. After SIGTERM
    there is a checkpoint after the call in which it came, and then `Terminated` is raised.
    """
    if on_step is not None and not callable(on_step):
        raise InputError(f"on_step is a {type(on_step).__name__}: give a function")
    if steps < 1 or per_call < 1:
        raise InputError(f"steps and steps per call must be 1 or more, not {steps} and {per_call}")
    if save_every is not None and save_every < 1:
        raise InputError(f"save_every must be 1 or more, not {save_every}")
    if count() > 1:  # as it comes out of a call: one program for all
        state = jax.tree.map(_everywhere, state)
    if directory is None:
        return _steps(call, state, 0, steps, per_call, on_step, None, None)
    with (
        noticed() as ending,
        resume.hold(directory, {"precision": stated(), **settings()}),
        Checkpoints(directory) as checkpoints,
    ):
        done = checkpoints.latest() or 0
        if done > steps:
            raise InputError(
                f"{directory}: the run there has done {done} steps, more than {steps}; ask for as "
                "many, or name a new directory"
            )
        if done:
            state = checkpoints.restore(done, like=state)
        save = checkpoints.save
        return _steps(call, state, done, steps, per_call, on_step, save, save_every, ending)


def _everywhere(x: Any) -> Any:
    """An array that is not yet spread over all processes, on every device of them."""
    spread = isinstance(x, jax.Array) and not x.is_fully_addressable
    return x if spread else put(x, on_all_devices())


def steps_done(directory: str | pathlib.Path) -> int:
    """Step of the newest checkpoint in `directory`; 0 where there is none."""
    if not by_first(pathlib.Path(directory).is_dir):
        return 0
    with Checkpoints(directory) as checkpoints:
        return checkpoints.latest() or 0


def _steps(
    call: Call,
    state: Any,
    done: int,
    steps: int,
    per_call: int,
    on_step: OnStep | None,
    save: Callable[[int, Any], None] | None,
    save_every: int | None,
    ending: Callable[[], bool] = lambda: False,
) -> tuple[Any, dict[str, np.ndarray]]:
    measured: list[dict[str, np.ndarray]] = []
    saved = done
    while done < steps:
        count = min(per_call, steps - done)
        state, metrics = call(state, done, count)
        metrics = fetch(metrics)
        check_finite(metrics, done, saved if save else None)
        done += count
        ends = ending()
        due = ends or done == steps or (save_every and done - saved >= save_every)
        if due:  # the loss of the step that made them infinite is still finite
            _check_parameters(state[0], done, saved if save else None)
        measured.append(metrics)
        if on_step:
            on_step(done, metrics)
        if save and due:
            save(done, state)
            saved = done
        if ends:
            raise Terminated(f"step {done} of {steps} is saved, from which the run goes on")
    if not measured:
        return state, {}
    return state, {k: np.concatenate([m[k] for m in measured]) for k in measured[0]}


def check_finite(
    metrics: Mapping[str, Float[np.ndarray, "steps ..."]], first: int, saved: int | None
) -> None:
    """Raise InputError naming the first step whose loss is not finite.

    first: steps done before. saved: step of the newest checkpoint, or None.
    """
    loss = metrics["loss"]
    bad = ~np.isfinite(loss).reshape(loss.shape[0], -1).all(axis=1)
    if bad.any():
        raise _diverged(f"the loss is not finite at step {first + int(bad.argmax()) + 1}", saved)
    explained = metrics.get("explained")
    if explained is not None and not np.isfinite(explained).all():
        raise InputError(
            "base and expert have one and the same score: no reward tells them apart; give two "
            "different models"
        )


def _check_parameters(parameters: Any, done: int, saved: int | None) -> None:
    # On the host: a program for every parameter's shape would take half a second to compile.
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(fetch(parameters))):
        raise _diverged(f"the parameters are not finite after step {done}", saved)


def _diverged(what: str, saved: int | None) -> InputError:
    note = f"; the checkpoint of step {saved} is kept" if saved else ""
    return InputError(f"{what}{note}; lower the learning rate, or look for outliers in the data")
