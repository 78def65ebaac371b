"""Checkpoints of Diffuser and of the paper's authors, as our modules and their parameters.

    module, params, info = load_torch("state_1000000.pt", kind="denoiser")

Widths, levels, attention, norms and biases are read off the shapes; a tensor that is unknown,
missing, doubled, misshaped or not finite is an error that names it. What a checkpoint does not
say stays with the caller: what the model predicts (theirs: x_0), whether x_0 was clipped, the
normaliser of the data, and a reward's activation. Names in the files: `torch_state`, `torch_keys`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float

from common_jax.errors import InputError
from reward_jax.diffusion.schedule import Schedule
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.models.temporal.layers import Activation, activation
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.torch_import import torch_keys
from reward_jax.torch_import.torch_state import (
    WEIGHTS,
    File,
    Part,
    Which,
    and_more,
    around,
    holds,
    open_state,
    sort,
    values,
)

__all__ = ["Kind", "TorchInfo", "load_torch"]

Kind = Literal["denoiser", "reward"]
_DEEPEST = 32  # levels or layers of a network


@dataclasses.dataclass(frozen=True)
class TorchInfo:
    """What else a checkpoint says; None where it does not.

    Attributes:
        which: whose parameters these are; None where the file holds one set only.
        step: of the training.
        transition: D, actions and observations.
        horizon: H.
        schedule: ours by name if its tables are cosine or linear, else made from the file's betas.
        loss_weights: [H, D].
        notes: what had to be assumed.
    """

    path: pathlib.Path
    which: Which | None
    step: int | None
    transition: int
    horizon: int | None
    schedule: Schedule | None
    loss_weights: Float[np.ndarray, "H D"] | None
    notes: tuple[str, ...]


def load_torch(
    path: str | pathlib.Path,
    kind: Kind,
    *,
    which: Which = "ema",
    horizon: int | None = None,
    act: Activation | None = None,
    transition: int | None = None,
    part: Part | None = None,
) -> tuple[nn.Module, dict[str, Any], TorchInfo]:
    """A module, its parameters (float32) and what else the checkpoint says.

    Args:
        path: `.safetensors`, or `.pt` or `.pth` as torch.save writes it; no code of it is run.
        kind: "denoiser" gives a `TemporalUnet`, "reward" a `HalfUnet` or a `WindowMLP`.
        which: the averaged parameters or the last ones, where the file holds both.
        horizon: H, where the file does not say; it is checked where it does.
        act: of a reward, which no file says. By default Mish with group norms (Diffuser's value
            function), leaky ReLU without (the authors' rewards); a note says so.
        transition: D, for an MLP on windows in a file without its teachers.
        part: a diffusion inside a reward's or discriminator's checkpoint.

    Raises:
        InputError: see the module; also for a schedule that contradicts itself.
    """
    path = pathlib.Path(path)
    for name, value, known in (("kind", kind, Kind), ("which", which, Which)):
        if value not in get_args(known):
            raise InputError(
                f"{name} {value!r} is unknown; known are {', '.join(get_args(known))}"
            )
    if act is not None:
        activation(act)
    state, found, step = open_state(path, which)
    file = sort(path, state)
    if part is not None:
        if not file.parts.get(part):
            raise InputError(f"{path}: there is no {part} in it")
        file = sort(path, file.parts[part], f"{part}.")
    schedule, weights = around(file)
    given = weights.shape if weights is not None else None
    if given and horizon not in (None, given[0]):
        raise InputError(f"{path}: its horizon is {given[0]}, not {horizon}")
    horizon = int(given[0]) if given else horizon
    notes = []
    if found is None:
        notes.append("the file holds one set of parameters, averaged or not")
    if kind == "denoiser":
        plan = _denoiser(file)
    elif holds(file.network, "mlp."):
        width = transition or (given[1] if given else _teacher_width(file))
        plan = _mlp(file, act or "leaky_relu", width)
    else:
        plan = _half_unet(file, act or _usual(file), horizon)
    if kind == "reward" and act is None:
        assumed = plan.module.act  # pyright: ignore[reportAttributeAccessIssue]
        notes.append(f"no checkpoint names its activation: {assumed} is assumed")
    if given and given[1] != plan.transition:
        raise InputError(
            f"{path}: {WEIGHTS} has a transition of {given[1]}, the network one of "
            f"{plan.transition}"
        )
    if transition not in (None, plan.transition):
        raise InputError(f"{path}: its transition is {plan.transition}, not {transition}")
    if horizon and horizon % plan.multiple:
        raise InputError(
            f"{path}: horizon {horizon} is no multiple of {plan.multiple}, as it must"
        )
    params = _assemble(file, plan)
    info = TorchInfo(path, found, step, plan.transition, horizon, schedule, weights, tuple(notes))
    return plan.module, params, info


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A module, where its parameters stand, and an input that fits.

    multiple: what its horizon must be a multiple of. zeros: parameters that the file's network
    does without.
    """

    module: nn.Module
    table: Mapping[str, tuple[str, str]]
    transition: int
    horizon: int
    multiple: int = 1
    zeros: tuple[str, ...] = ()


def _shape(file: File, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in file.network:
        raise InputError(f"{file.path}: tensor {name} is missing; is it another kind of network?")
    shape = file.network[name].shape
    if len(shape) != dimensions or 0 in shape:
        raise InputError(f"{file.path}: tensor {file.full[name]} has shape {list(shape)}")
    return shape


def _count(file: File, list_name: str) -> int:
    """Entries of a module list."""
    found = {n.split(".")[1] for n in file.network if n.startswith(f"{list_name}.")}
    numbers = {int(n) for n in found if n.isdigit() and len(n) < 4}
    if numbers != set(range(len(found))):
        entries = ", ".join(sorted(found)[:20])
        raise InputError(f"{file.path}: entries of {list_name} are {entries:.200}")
    if len(found) > _DEEPEST:
        raise InputError(
            f"{file.path}: {list_name} has {len(found)} entries; more than {_DEEPEST}"
        )
    return len(found)


def _levels(file: File, list_name: str) -> tuple[int, int, tuple[int, ...]]:
    """Transition width, dim and multipliers."""
    dim = _shape(file, "time_mlp.1.weight", 2)[1]
    shapes = [
        _shape(file, f"{list_name}.{i}.0.blocks.0.block.0.weight", 3)
        for i in range(_count(file, list_name))
    ]
    if not shapes:
        raise InputError(f"{file.path}: holds another network, one without {list_name}")
    multipliers = tuple(features // dim for features, _, _ in shapes)
    for level, (features, _, _) in enumerate(shapes):
        if features % dim:
            raise InputError(
                f"{file.path}: {list_name}.{level} has {features} channels, no multiple of {dim}"
            )
    return shapes[0][1], dim, multipliers


def _denoiser(file: File) -> _Plan:
    if not holds(file.network, "downs."):
        advice = "load it with kind='reward'" if file.network else "it holds no network"
        if file.parts:
            advice = f"name a diffusion inside it, part={min(file.parts)!r}, or kind='reward'"
        raise InputError(f"{file.path}: holds no temporal U-Net; {advice}")
    transition, dim, multipliers = _levels(file, "downs")
    if multipliers[0] != 1:
        raise InputError(f"{file.path}: downs.0 has other channels than {dim}, the embedding's")
    attention = "downs.0.2.fn.fn.to_qkv.weight" in file.network
    entries = 3 if "downs.0.2.conv.weight" in file.network else 4
    module = TemporalUnet(transition, dim, multipliers, attention)
    levels = len(multipliers)
    table = dict(torch_keys.unet(levels, entries))
    multiple = 2 ** (levels - 1)
    return _Plan(module, table, transition, 2 * multiple, multiple)


def _usual(file: File) -> Activation:
    return "mish" if "blocks.0.0.blocks.0.block.2.weight" in file.network else "leaky_relu"


def _half_unet(file: File, act: Activation, horizon: int | None) -> _Plan:
    if holds(file.network, "downs."):
        raise InputError(f"{file.path}: holds a temporal U-Net; load it with kind='denoiser'")
    transition, dim, multipliers = _levels(file, "blocks")
    first = "blocks.0.0.blocks.0.block"
    groups = 8 if f"{first}.2.weight" in file.network else None
    module = HalfUnet(dim, multipliers, act, groups, f"{first}.0.bias" in file.network)
    # Without a horizon: one that leaves as many steps at the end as the head has room for.
    flat = _shape(file, "final_block.0.weight", 2)[1] - dim
    left = max(1, flat // max(1, dim * multipliers[-1] // 4))
    fits = left << (len(multipliers) + 2)
    table = dict(torch_keys.half_unet(len(multipliers)))
    return _Plan(module, table, transition, fits if horizon is None else horizon)


def _teacher_width(file: File) -> int:
    """Transition width of a diffusion inside the file."""
    for state in file.parts.values():
        tensor = state.get("model.downs.0.0.blocks.0.block.0.weight")
        if tensor is not None and len(tensor.shape) == 3:
            return tensor.shape[1]
    raise InputError(
        f"{file.path}: an MLP on windows does not say how wide a transition is; give transition"
    )


def _mlp(file: File, act: Activation, transition: int) -> _Plan:
    count = _count(file, "mlp") - 1
    embedding = _shape(file, "time_mlp.1.weight", 2)[1]
    shapes = [_shape(file, f"mlp.{i}.0.weight", 2) for i in range(count)]
    if not shapes:
        raise InputError(f"{file.path}: tensor mlp.0.0.weight is missing")
    room = shapes[0][1] - embedding
    if room < 1 or room % transition:
        raise InputError(
            f"{file.path}: its windows of {room} values are no whole number of transitions of "
            f"{transition}"
        )
    window = room // transition
    widths = tuple(s[0] for s in shapes[:-1])
    module = WindowMLP(window, widths, embedding, act, "strided", "mean", "activated")
    table = dict(torch_keys.mlp(count))
    biases = [(path, name) for path, (name, _) in table.items() if "time_mlp" not in name]
    biases = [(path, name) for path, name in biases if name.endswith(".0.bias")]
    plain = not any(name in file.network for _, name in biases)
    zeros = tuple(path for path, _ in biases) if plain else ()
    return _Plan(module, table, transition, window, window, zeros)


def _assemble(file: File, plan: _Plan) -> dict[str, Any]:
    """Read every parameter that the module calls for."""
    x = jax.ShapeDtypeStruct((1, plan.horizon, plan.transition), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    kind = type(plan.module).__name__
    try:
        shapes = jax.eval_shape(plan.module.init, jax.random.key(0), x, t)["params"]
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InputError(
            f"{file.path}: no {kind} has such shapes ({str(error).splitlines()[0]})"
        ) from None
    wanted: dict[str, Any] = flatten_dict(shapes, sep="/")
    expected = {plan.table[path][0]: path for path in wanted if path not in plan.zeros}
    missing = [name for name in expected if name not in file.network]
    if missing:
        raise InputError(
            f"{file.path}: tensor {missing[0]} is missing{and_more(missing)}; the checkpoint is "
            "incomplete, or of another network"
        )
    unknown = [file.full[name] for name in file.network if name not in expected]
    if unknown:
        raise InputError(
            f"{file.path}: tensor {unknown[0]} is unknown to {kind}{and_more(unknown)}"
        )
    params = {path: jnp.zeros(wanted[path].shape) for path in plan.zeros}
    for name, path in expected.items():
        theirs, ours = plan.table[path][1].split("->")
        sizes = dict(zip(ours, wanted[path].shape, strict=True))
        shape, tensor = tuple(sizes.get(a, 1) for a in theirs), file.network[name]
        if tensor.shape != shape:
            raise InputError(
                f"{file.path}: tensor {file.full[name]} has shape {list(tensor.shape)}, not "
                f"{list(shape)} as {kind} calls for at horizon {plan.horizon}"
            )
        letters = theirs.replace("1", "")
        value = values(file, name, tensor).reshape([sizes[a] for a in letters])
        params[path] = jnp.asarray(value.transpose([letters.index(a) for a in ours]))
    return unflatten_dict(params, sep="/")
