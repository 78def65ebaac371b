"""Models as single files: parameters in safetensors, and in its header what they are.

A file holds all that its use takes: architecture, prediction, schedule, normaliser, horizon and
stride, and where it came from.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common_jax.errors import InputError
from common_jax.io.files import atomic, make_folder
from reward_jax.data.trajectory.normalisers import Normaliser
from reward_jax.data.trajectory.space import Space, TrajectoryGuide, TrajectoryModel
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.schedule import Schedule, make_schedule
from reward_jax.models import catalog
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.extract import RelativeReward

__all__ = ["load_guide", "load_model", "save_guide", "save_model"]

_FORMAT = 1


def save_model(path: str | pathlib.Path, model: TrajectoryModel) -> None:
    """Write a denoiser and its space; raises InputError for a model that no file can hold."""
    d = model.denoiser
    kind = {"kind": "denoiser", "prediction": d.prediction, "clip": d.clip}
    _write(path, d.params, kind | catalog.describe(d.model) | _about(model.space, d.schedule))


def load_model(path: str | pathlib.Path) -> TrajectoryModel:
    """Read a denoiser; raises InputError for a file that is missing, corrupt or something else."""
    params, header = _read(path, "denoiser")
    with _sound(path):
        schedule = _schedule(header)
        denoiser = score_from(
            catalog.make(header, path), params, header["prediction"], schedule, clip=header["clip"]
        )
        return TrajectoryModel(denoiser, _space(header))


def save_guide(path: str | pathlib.Path, guide: TrajectoryGuide) -> None:
    """Write a reward, with the unit of its output, or a discriminator; errors as `save_model`."""
    g = guide.guide
    if isinstance(g, RelativeReward):
        kind = {"kind": "reward", "target": g.target, "seeds": g.seeds} | catalog.describe(
            g.reward
        )
    else:
        kind = {"kind": "discriminator", "output": g.output} | catalog.describe(g.model)
    _write(path, g.params, kind | _about(guide.space, guide.schedule))


def load_guide(path: str | pathlib.Path) -> TrajectoryGuide:
    """Read a reward or a discriminator; errors as `load_model`."""
    params, header = _read(path, "reward", "discriminator")
    with _sound(path):
        module, schedule = catalog.make(header, path), _schedule(header)
        if header["kind"] == "reward":
            guide = RelativeReward(params, schedule, module, header["target"], header["seeds"])
        else:
            guide = DiscriminatorGuide(params, module, header["output"])
        return TrajectoryGuide(guide, _space(header), schedule)


def _about(space: Space, schedule: Schedule) -> dict[str, Any]:
    n = space.normaliser
    return {
        "schedule": _described(schedule),
        "horizon": space.horizon,
        "stride": space.stride,
        "actions": space.actions,
        "normaliser": {
            "kind": n.kind,
            "offset": np.asarray(n.offset, np.float64).tolist(),
            "scale": np.asarray(n.scale, np.float64).tolist(),
        },
        "about": space.about,
    }


def _space(header: dict[str, Any]) -> Space:
    n = header["normaliser"]
    offset, scale = (np.asarray(n[k], np.float32) for k in ("offset", "scale"))
    return Space(
        header["horizon"],
        header["stride"],
        header["actions"],
        Normaliser(offset, scale, n["kind"]),
        header["about"],
    )


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


def _schedule(header: dict[str, Any]) -> Schedule:
    """The schedule of a header; raises ValueError where it has none (see `_sound`)."""
    described = header["schedule"]
    if "tables" not in described:
        try:
            return make_schedule(described["name"], described["steps"])
        except InputError as error:  # it does not name the file
            raise ValueError(str(error)) from None
    tables = {k: np.asarray(v, np.float64) for k, v in described["tables"].items()}
    wanted = {f.name for f in dataclasses.fields(Schedule)} - {"name"}
    if odd := sorted(set(tables) ^ wanted):
        raise ValueError(f"its schedule's tables lack {odd[0]}, or should not have it")
    for name, table in tables.items():
        if table.shape != (described["steps"],) or not np.isfinite(table).all():
            raise ValueError(f"its schedule's {name} is not {described['steps']} finite numbers")
    bar = tables["alphas_cumprod"]
    if not bar.size or not ((bar >= 0) & (bar <= 1)).all() or (np.diff(bar) > 0).any():
        raise ValueError("its schedule's alphas_cumprod do not fall from 1 or less towards 0")
    return Schedule(
        **{k: jnp.asarray(v, jnp.float32) for k, v in tables.items()}, name=described["name"]
    )


def _write(path: str | pathlib.Path, params: Any, header: dict[str, Any]) -> None:
    path = pathlib.Path(path)
    flat = {
        jax.tree_util.keystr(k, simple=True, separator="/"): np.ascontiguousarray(v)
        for k, v in jax.tree_util.tree_leaves_with_path(params)
    }
    try:
        make_folder(path.parent)
        with atomic(path) as scratch:
            save_file(flat, scratch, {"reward_jax": json.dumps({"format": _FORMAT} | header)})
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({error}); name another place") from error


def _read(path: str | pathlib.Path, *kinds: str) -> tuple[Any, dict[str, Any]]:
    path = pathlib.Path(path)
    wanted = " or ".join(kinds)
    if path.is_dir():  # a run's directory stands for what it made
        found = [path / f"{kind}.safetensors" for kind in kinds]
        path = next((p for p in found if p.is_file()), found[0])
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; a {wanted} is wanted")
    params: dict[str, Any] = {}
    with _sound(path):
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {})["reward_jax"])
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                value = file.get_tensor(name)
                if not np.isfinite(value).all():
                    raise InputError(f"{path}: parameter {name} is not finite; train it again")
                *parents, leaf = name.split("/")
                node = params
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[leaf] = jnp.asarray(value)
        if header["format"] != _FORMAT:
            raise InputError(f"{path}: is of another version ({header['format']}); train it again")
        if header["kind"] not in kinds:
            raise InputError(f"{path}: holds a {header['kind']}, where a {wanted} is wanted")
    return params, header


@contextlib.contextmanager
def _sound(path: Any) -> Iterator[None]:
    """Turn what a damaged or foreign file raises into one InputError."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: corrupt, or no model of ours ({reason}); copy or train it again"
        ) from error
