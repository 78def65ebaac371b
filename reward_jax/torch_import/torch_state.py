"""The tensors of a PyTorch checkpoint, sorted: a network's, a schedule's, those of others inside.

A trainer's `.pt` of Diffuser or of the authors holds {"step", "model", "ema"}, each the state of a
diffusion (`model.*`, the tables of its schedule, `loss_fn.weights`), of a reward (`model.*`, and
its teachers `s_expert.*` and `s_general.*`) or of a discriminator (`model.*`, `diffusion.*`). The
state of a network alone is read, too, a checkpoint of Lightning (`state_dict`), and a safetensors
file of any of these; where that holds two states, names begin with `ema.` and `model.`. What
`torch.compile` and `DataParallel` put into names, at whatever depth (`_orig_mod.`, `module.`), is
taken out of them.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from common_jax.errors import InputError
from common_jax.io.wrapped_names import unwrapped
from reward_jax.diffusion.schedule import Schedule, cosine_schedule, from_betas, linear_schedule
from reward_jax.torch_import.torch_files import Tensor, read_pt, read_safetensors

__all__ = [
    "WEIGHTS",
    "File",
    "Part",
    "Which",
    "and_more",
    "around",
    "holds",
    "open_state",
    "sort",
    "values",
]

Which = Literal["ema", "model"]
Part = Literal["s_expert", "s_general", "diffusion"]

_TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
_ROOTS = ("time_mlp.", "downs.", "ups.", "mid_", "final_", "blocks.", "mlp.")
WEIGHTS = "loss_fn.weights"
State = dict[str, Tensor]
_CLOSE = 1e-5  # between tables of a schedule


@dataclasses.dataclass(frozen=True)
class File:
    """The tensors of one state, sorted; `full` gives the names that they have in the file."""

    path: pathlib.Path
    network: State
    tables: State
    parts: Mapping[str, State]
    full: Mapping[str, str]


def open_state(path: pathlib.Path, which: Which) -> tuple[State, Which | None, int | None]:
    """The state of that name, which it is, and the step."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        if not any(name.startswith("ema.") for name in tensors):
            return tensors, None, None
        own = {
            n.removeprefix(f"{which}."): t for n, t in tensors.items() if n.startswith(f"{which}.")
        }
        return own, which, None
    if path.suffix not in (".pt", ".pth"):
        raise InputError(f"{path}: only .safetensors, .pt and .pth are read")
    content = read_pt(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no dictionary of tensors; save a state_dict()")
    step = content.get("step", content.get("global_step"))
    step = step if type(step) is int else None
    if isinstance(content.get("state_dict"), dict):  # Lightning's, and many others'
        return _tensors(path, content["state_dict"]), None, step
    there = [name for name in get_args(Which) if isinstance(content.get(name), dict)]
    if not there:
        return _tensors(path, content), None, None
    if which not in there:
        raise InputError(f"{path}: holds no {which!r}; ask for which={there[0]!r}")
    return _tensors(path, content[which]), which, step


def _tensors(path: pathlib.Path, content: Mapping[Any, Any]) -> State:
    for name, value in content.items():
        if not isinstance(name, str) or not hasattr(value, "read"):
            inside = [key for key, held in content.items() if isinstance(held, dict)][:5]
            advice = "save a state_dict()"
            if inside:
                named = ", ".join(f"{key!s:.40}" for key in inside)
                advice += f" alone, or one under 'state_dict' (what it holds: {named})"
            raise InputError(f"{path}: {name!r:.80} is no tensor; {advice}")
    return dict(content)


def sort(path: pathlib.Path, state: State, prefix: str = "") -> File:
    """Split a state by the beginnings of its names; prefix: what they begin with in the file."""
    network: State = {}
    tables: State = {}
    parts: dict[str, State] = {}
    full: dict[str, str] = {}
    unknown = []
    for name, tensor in state.items():
        bare = unwrapped(name)
        owner, _, rest = bare.partition(".")
        short = bare.removeprefix("model.")
        if owner in get_args(Part):
            if rest in parts.setdefault(owner, {}):
                raise InputError(f"{path}: {prefix}{bare} is there twice")
            parts[owner][rest] = tensor
        elif bare in _TABLES or bare == WEIGHTS:
            _add(path, tables, full, bare, prefix + name, tensor)
        elif owner == "model" or short.startswith(_ROOTS):
            _add(path, network, full, short, prefix + name, tensor)
        else:
            unknown.append(prefix + name)
    if unknown:
        raise InputError(f"{path}: tensor {unknown[0]} is unknown{and_more(unknown)}")
    return File(path, network, tables, parts, full)


def _add(
    path: pathlib.Path, group: State, full: dict[str, str], short: str, name: str, tensor: Tensor
) -> None:
    if short in group:
        raise InputError(f"{path}: {full[short]} and {name} are one tensor, doubled")
    group[short], full[short] = tensor, name


def and_more(names: list[str]) -> str:
    """How many beside the first."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def holds(state: Iterable[str], prefix: str) -> bool:
    """Whether any name begins so."""
    return any(name.startswith(prefix) for name in state)


def values(file: File, name: str, tensor: Tensor) -> Float[np.ndarray, "..."]:
    """The tensor as float32; raises InputError where it is not finite."""
    stored = tensor.read()
    with np.errstate(over="ignore"):
        value = np.asarray(stored, np.float32)
    if not np.isfinite(value).all():
        full = file.full[name]
        raise InputError(f"{file.path}: tensor {full} holds NaN, infinity or numbers too large")
    return value


def around(file: File) -> tuple[Schedule | None, Float[np.ndarray, "H D"] | None]:
    """Schedule and loss weights, of the state itself or of the diffusions inside it."""
    schedule = weights = None
    for name, state in (("", None), *file.parts.items()):
        inner = file if state is None else sort(file.path, state, f"{name}.")
        schedule = schedule or _schedule(inner)
        if weights is None and WEIGHTS in inner.tables:
            weights = values(inner, WEIGHTS, inner.tables[WEIGHTS])
            if weights.ndim != 2:
                full = inner.full[WEIGHTS]
                raise InputError(f"{file.path}: tensor {full} is not [horizon, transition]")
    return schedule, weights


def _schedule(file: File) -> Schedule | None:
    """The schedule whose tables the file holds.

    Those that decide all others, beta and alpha-bar, are compared; the rest are checked for shape.
    Theirs were rounded to float32 at every step, which shows in logarithms and quotients.
    """
    if "betas" not in file.tables:
        return None
    betas = values(file, "betas", file.tables["betas"])
    shape = betas.shape
    for name, tensor in file.tables.items():
        if name != WEIGHTS and tensor.shape != shape:
            raise InputError(
                f"{file.path}: tensor {file.full[name]} has shape {list(tensor.shape)}, "
                f"betas {list(shape)}"
            )
    # Half precision leaves fewer digits than float32 does.
    close = max(_CLOSE, float(jnp.finfo(file.tables["betas"].dtype).eps))
    made = None
    if len(shape) == 1 and shape[0]:
        for known in (cosine_schedule(shape[0]), linear_schedule(shape[0])):
            if np.abs(np.asarray(known.betas) - betas).max() < close:
                made = known
    try:
        made = made or from_betas(betas)
    except InputError as error:
        raise InputError(f"{file.path}: tensor {file.full['betas']}: {error}") from None
    for name in ("alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
        if name in file.tables:
            theirs = values(file, name, file.tables[name])
            gap = float(np.abs(np.asarray(getattr(made, name)) - theirs).max())
            if gap > close:
                raise InputError(
                    f"{file.path}: tensor {file.full[name]} is {gap:.1e} from what betas give; "
                    "the schedule contradicts itself"
                )
    return made
