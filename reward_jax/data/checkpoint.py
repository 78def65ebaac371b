"""Models as single files: parameters in safetensors, and in its header what they are.

A file holds all that its use takes: network, prediction, schedule, the space that the model lives
in (`spaces.py`), and where it came from. The names of its tensors begin with `params/`; of a
conditional model, those of the condition that stands for none with `null`. Files of the first
format, in which the space's parts stood beside the rest, are read, too. Over a mesh each device's
part of a parameter is read from the file by itself, once the header is known to be sound.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common_jax.errors import InputError
from common_jax.io.files import atomic, is_full, make_folder, parse_json
from common_jax.mesh import read_shards
from reward_jax.data import spaces
from reward_jax.data.model import Space, SpaceGuide, SpaceModel
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.schedule import Schedule, make_schedule
from reward_jax.models import catalog
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.relative import RelativeReward
from reward_jax.sharding import placement

__all__ = ["load_guide", "load_model", "save_guide", "save_model", "space_class"]

_FORMAT = 2
_MOST_STEPS = 10**6  # diffusion steps that a file may name: their tables are made from the number

S = TypeVar("S", bound=Space)


def save_model(path: str | pathlib.Path, model: SpaceModel[Any]) -> None:
    """Write a denoiser and its space; raises InputError for a model that no file can hold."""
    d = model.denoiser
    kind = {"kind": "denoiser", "prediction": d.prediction, "clip": d.clip}
    trees = {"params": d.params} | ({} if model.null is None else {"null": model.null})
    _write(path, trees, kind | catalog.describe(d.model) | _about(model.space, d.schedule))


def space_class(path: str | pathlib.Path) -> type[Space]:
    """Of what space the denoiser of a file is; errors as of `load_model`."""
    path, header, _ = _open(path, "denoiser")
    with _sound(path):
        return spaces.SPACES[header["space"]["kind"]]


def load_model(
    path: str | pathlib.Path, space: type[S], mesh: Mesh | None = None
) -> SpaceModel[S]:
    """Read a denoiser of such a space; a run's directory stands for its file.

    mesh: over whose fsdp and tensor axes parameters are cut (`reward_jax/sharding.py`). Raises
    InputError for a file that is missing, corrupt, or something else.
    """
    file = _open(path, "denoiser")
    path, header, _ = file
    with _sound(path):
        schedule, network = _schedule(header), catalog.make(header, path)
        clip, own = _clip(header), spaces.make(header["space"], space, path)
        trees = _read(file, mesh)
        denoiser = score_from(network, trees["params"], header["prediction"], schedule, clip=clip)
        return SpaceModel(denoiser, own, trees.get("null"))


def save_guide(path: str | pathlib.Path, guide: SpaceGuide[Any]) -> None:
    """Write a reward, with the unit of its output, or a discriminator; errors as `save_model`."""
    g = guide.guide
    if isinstance(g, RelativeReward):
        network, kind = g.reward, {"kind": "reward", "target": g.target, "seeds": g.seeds}
    else:
        network, kind = g.model, {"kind": "discriminator", "output": g.output}
        kind |= {"conditional": g.conditional}
    _write(
        path,
        {"params": g.params},
        kind | catalog.describe(network) | _about(guide.space, guide.schedule),
    )


def load_guide(
    path: str | pathlib.Path, space: type[S], mesh: Mesh | None = None
) -> SpaceGuide[S]:
    """Read a reward or a discriminator of such a space; mesh and errors as of `load_model`."""
    file = _open(path, "reward", "discriminator")
    path, header, _ = file
    with _sound(path):
        module, schedule = catalog.make(header, path), _schedule(header)
        own = spaces.make(header["space"], space, path)
        params = _read(file, mesh)["params"]
        if header["kind"] == "reward":
            guide = RelativeReward(params, schedule, module, header["target"], header["seeds"])
        else:
            guide = DiscriminatorGuide(params, module, header["output"], header["conditional"])
        return SpaceGuide(guide, own, schedule)


def _about(space: Space, schedule: Schedule) -> dict[str, Any]:
    return {"schedule": _described(schedule), "space": spaces.describe(space)}


def _described(schedule: Schedule) -> dict[str, Any]:
    """Name and steps; and the tables, where the name does not give them (custom betas)."""
    described = {"name": schedule.name, "steps": schedule.steps}
    tables = {k: v for k, v in vars(schedule).items() if k != "name"}
    try:
        known = make_schedule(schedule.name, schedule.steps)
        if all(np.array_equal(v, getattr(known, k)) for k, v in tables.items()):
            return described
    except InputError:  # a custom schedule
        pass
    values = {k: np.asarray(v, np.float64).tolist() for k, v in tables.items()}
    return described | {"tables": values}


def _clip(header: Mapping[str, Any]) -> float | None:
    return None if header["clip"] is None else float(header["clip"])


def _schedule(header: Mapping[str, Any]) -> Schedule:
    """The schedule of a header; raises ValueError where it has none (see `_sound`)."""
    described = header["schedule"]
    steps = described["steps"]
    if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"its schedule has {steps!r} steps")
    if "tables" not in described:
        try:
            return make_schedule(described["name"], steps)
        except InputError as error:  # it does not name the file
            raise ValueError(str(error)) from None
    tables = {k: np.asarray(v, np.float64) for k, v in described["tables"].items()}
    wanted = {f.name for f in dataclasses.fields(Schedule)} - {"name"}
    if odd := sorted(set(tables) ^ wanted):
        raise ValueError(f"its schedule's tables lack {odd[0]}, or should not have it")
    for name, table in tables.items():
        if table.shape != (steps,) or not np.isfinite(table).all():
            raise ValueError(f"its schedule's {name} is not {steps} finite numbers")
    bar = tables["alphas_cumprod"]
    if not bar.size or not ((bar >= 0) & (bar <= 1)).all() or (np.diff(bar) > 0).any():
        raise ValueError("its schedule's alphas_cumprod do not fall from 1 or less towards 0")
    return Schedule(
        **{k: jnp.asarray(v, jnp.float32) for k, v in tables.items()}, name=described["name"]
    )


def _write(path: str | pathlib.Path, trees: dict[str, Any], header: dict[str, Any]) -> None:
    path = pathlib.Path(path)
    flat = {
        jax.tree_util.keystr(k, simple=True, separator="/"): np.ascontiguousarray(v)
        for k, v in jax.tree_util.tree_leaves_with_path(trees)
    }
    if jax.tree.structure(_nested(flat)) != jax.tree.structure(trees):
        raise InputError(
            f"{path}: files hold parameters and conditions that are arrays, or dictionaries of "
            "them with texts as keys, to any depth; make the model's tree such"
        )

    def write(scratch: pathlib.Path) -> None:
        try:
            save_file(flat, scratch, {"reward_jax": json.dumps({"format": _FORMAT} | header)})
        except SafetensorError as error:
            if is_full(error):
                raise
            raise InputError(f"{path}: cannot be written ({error}); name another place") from error

    make_folder(path.parent)
    atomic(path, write)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}; raises ValueError where a name is a group, too."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{parent} of {name} is a parameter, and no group")
        if leaf in node:
            raise ValueError(f"{name} is a group, and a parameter, too")
        node[leaf] = value
    return tree


class _File(NamedTuple):
    """A file whose parameters are not read yet; stored: by path, name and shape of each there."""

    path: pathlib.Path
    header: dict[str, Any]
    stored: Mapping[str, tuple[str, tuple[int, ...]]]


def _open(path: str | pathlib.Path, *kinds: str) -> _File:
    """The file of one of these kinds, whose header and names are sound."""
    path = pathlib.Path(path)
    wanted = " or ".join(kinds)
    if path.is_dir():  # a run's directory stands for what it made
        found = [path / f"{kind}.safetensors" for kind in kinds]
        path = next((p for p in found if p.is_file()), found[0])
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; a {wanted} is wanted")
    with _sound(path), safe_open(path, "numpy") as file:
        header = parse_json((file.metadata() or {})["reward_jax"])
        first = header["format"] == 1
        if first:
            header = _of_format_1(header)
        if header["format"] != _FORMAT:
            raise InputError(f"{path}: is of another version ({header['format']}); train it again")
        if header["kind"] not in kinds:
            raise InputError(f"{path}: holds a {header['kind']}, where a {wanted} is wanted")
        stored = {
            f"params/{name}" if first else name: (name, tuple(file.get_slice(name).get_shape()))
            for name in file.keys()  # noqa: SIM118 (it is no mapping)
        }
        _nested(stored)
        return _File(path, header, stored)


def _read(opened: _File, mesh: Mesh | None) -> dict[str, Any]:
    """The trees of parameters, on their devices."""
    where = placement(mesh)
    return _nested(
        {
            path: read_shards(
                shape, where(path, shape), functools.partial(_part, opened, path, mesh is not None)
            )
            for path, (_, shape) in opened.stored.items()
        }
    )


def _part(
    opened: _File, path: str, cut: bool, place: tuple[slice, ...]
) -> Shaped[np.ndarray, "..."]:
    """The numbers of a parameter at a place, or all of them."""
    name, _ = opened.stored[path]
    with safe_open(opened.path, "numpy") as file:  # anew: what was mapped before is let go
        value = file.get_slice(name)[place] if cut else file.get_tensor(name)
    if not np.isfinite(value).all():
        own = path.removeprefix("params/")
        raise InputError(f"{opened.path}: parameter {own} is not finite; train it again")
    return value


_IN_SPACE = "horizon", "stride", "actions", "normaliser", "about"


def _of_format_1(header: Mapping[str, Any]) -> dict[str, Any]:
    """A header of the first format, with its trajectories' space in one place.

    All its tensors are parameters, and no discriminator has a condition.
    """
    space: dict[str, Any] = {"kind": "trajectories"} | {name: header[name] for name in _IN_SPACE}
    rest = {name: value for name, value in header.items() if name not in _IN_SPACE}
    return {"conditional": False} | rest | {"format": _FORMAT, "space": space}


@contextlib.contextmanager
def _sound(path: Any) -> Iterator[None]:
    """Turn what a damaged or foreign file raises into one InputError."""
    try:
        yield
    except (
        OSError,
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: corrupt, or no model of ours ({reason}); copy or train it again"
        ) from error
