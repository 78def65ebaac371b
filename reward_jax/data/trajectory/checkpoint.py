"""Models as single files: parameters in safetensors, what they mean in its header.

A file holds all that using it takes: architecture, prediction, schedule, normaliser, horizon and
stride, and where it came from. Legend: H horizon, D transition width, A actions, O observations.
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
from reward_jax.data.trajectory.terms import Converted
from reward_jax.diffusion.denoiser import Denoiser, Score, score_from
from reward_jax.diffusion.process import FirstState
from reward_jax.diffusion.schedule import Schedule, make_schedule
from reward_jax.models import catalog
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.extract import RelativeReward

__all__ = [
    "Space",
    "TrajectoryGuide",
    "TrajectoryModel",
    "check_same_space",
    "check_same_terms",
    "expert_in_base_terms",
    "load_guide",
    "load_model",
    "save_guide",
    "save_model",
]

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Space:
    """What a trajectory of a model is.

    horizon: H. stride: environment steps between its rows. actions: A. normaliser: of rows [D].
    about: where the data came from (environment, maze, goal, ...), plain JSON.
    """

    horizon: int
    stride: int
    actions: int
    normaliser: Normaliser
    about: dict[str, Any]

    @property
    def width(self) -> int:
        """D."""
        return int(np.shape(self.normaliser.offset)[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(H, D)."""
        return self.horizon, self.width

    @property
    def pin(self) -> FirstState:
        """x_0 -> its first observation, given."""
        return FirstState(self.actions)


@dataclasses.dataclass(frozen=True)
class TrajectoryModel:
    """A denoiser and the space of its trajectories."""

    denoiser: Denoiser
    space: Space


@dataclasses.dataclass(frozen=True)
class TrajectoryGuide:
    """A relative reward, or a discriminator, and the space of its trajectories."""

    guide: RelativeReward | DiscriminatorGuide
    space: Space
    schedule: Schedule


def save_model(path: str | pathlib.Path, model: TrajectoryModel) -> None:
    """Write a denoiser, its parameters as they are."""
    d = model.denoiser
    kind = {"kind": "denoiser", "prediction": d.prediction, "clip": d.clip}
    _write(path, d.params, kind | catalog.describe(d.model) | _about(model.space, d.schedule))


def load_model(path: str | pathlib.Path) -> TrajectoryModel:
    """Read a denoiser; InputError where the file is missing, corrupt or holds something else."""
    params, header = _read(path, "denoiser")
    with _sound(path):
        schedule = _schedule(header)
        denoiser = score_from(
            catalog.make(header, path), params, header["prediction"], schedule, clip=header["clip"]
        )
        return TrajectoryModel(denoiser, _space(header))


def save_guide(path: str | pathlib.Path, guide: TrajectoryGuide) -> None:
    """Write a reward or a discriminator; the unit of a reward is kept with it."""
    g = guide.guide
    if isinstance(g, RelativeReward):
        kind = {"kind": "reward", "target": g.target, "seeds": g.seeds} | catalog.describe(
            g.reward
        )
    else:
        kind = {"kind": "discriminator", "output": g.output} | catalog.describe(g.model)
    _write(path, g.params, kind | _about(guide.space, guide.schedule))


def load_guide(path: str | pathlib.Path) -> TrajectoryGuide:
    """Read what `save_guide` wrote; InputError as for `load_model`."""
    params, header = _read(path, "reward", "discriminator")
    with _sound(path):
        module, schedule = catalog.make(header, path), _schedule(header)
        if header["kind"] == "reward":
            guide = RelativeReward(params, schedule, module, header["target"], header["seeds"])
        else:
            guide = DiscriminatorGuide(params, module, header["output"])
        return TrajectoryGuide(guide, _space(header), schedule)


def expert_in_base_terms(
    base: TrajectoryModel, expert: TrajectoryModel, *, pin: bool = True, most: float = 1.25
) -> tuple[Score, list[str]]:
    """The expert's score for trajectories in the base's terms, and notes on what was converted.

    pin: x_t's first state is given, not noised. Raises InputError naming each difference that
    cannot be converted: horizon, transition, stride, diffusion steps, schedule, or scales whose
    factor differs by dimension, by more than `most` from its mean.
    """
    check_same_space("base and expert", base.space, expert.space)
    theirs = expert.denoiser.schedule
    _check_same_schedule("base and expert", base.denoiser.schedule, theirs)
    a, b = base.space.normaliser, expert.space.normaliser
    if _same_normaliser(a, b):
        return expert.denoiser, []
    between = a.to(b)  # from the base's terms to the expert's
    logs = np.log(np.asarray(between.scale, np.float64))
    ratio, uneven = (float(np.exp(np.abs(x).max())) for x in (logs, logs - logs.mean()))
    alike = "train the expert from the base (--init), which keeps the base's normaliser"
    if uneven > most:
        raise InputError(
            "base and expert differ in their normalisers, by a factor that differs by dimension "
            f"(up to {uneven:.2f} from its mean), too much to convert: {alike}"
        )
    note = (
        f"the normalisers of base and expert differ (scales by a factor of up to {ratio:.3g}): "
        "the expert's score is converted to the base's terms"
    )
    if uneven > 1.02:
        note += (
            f", as if the factor were one for all dimensions (it is up to {uneven:.3g} from its "
            f"mean); to leave nothing to convert, {alike}"
        )
    pinned = base.space.pin if pin else None
    return Converted.between(expert.denoiser, theirs, between, pinned), [note]


def check_same_space(what: str, a: Space, b: Space) -> None:
    """InputError naming the first thing in which two spaces differ, normalisers apart."""
    for name, x, y in (
        ("horizon", a.horizon, b.horizon),
        ("transition width", a.width, b.width),
        ("actions", a.actions, b.actions),
        ("stride", a.stride, b.stride),
        ("maze", a.about.get("maze"), b.about.get("maze")),
    ):
        if name == "maze" and None in (x, y):
            continue  # data from elsewhere do not say
        if x != y:
            raise InputError(f"{what} differ in {name}: {x} and {y}; train both alike")


def check_same_terms(what: str, base: TrajectoryModel, guide: TrajectoryGuide) -> None:
    """InputError naming the first thing for which a guide cannot steer a base."""
    check_same_space(what, base.space, guide.space)
    _check_same_schedule(what, base.denoiser.schedule, guide.schedule)
    if not _same_normaliser(base.space.normaliser, guide.space.normaliser):
        raise InputError(
            f"{what} differ in their normalisers: train this base from the reward's own (--init), "
            "which keeps the normaliser"
        )


def _check_same_schedule(what: str, a: Schedule, b: Schedule) -> None:
    if a.steps != b.steps:
        raise InputError(
            f"{what} differ in diffusion steps: {a.steps} and {b.steps}; train both alike"
        )
    gap = float(jnp.abs(a.alphas_cumprod - b.alphas_cumprod).max())
    if gap > 1e-5:
        raise InputError(
            f"{what} differ in schedule: {a.name} and {b.name} (abar by up to {gap:.3f}); train "
            "both alike"
        )


def _same_normaliser(a: Normaliser, b: Normaliser) -> bool:
    offsets = np.allclose(a.offset, b.offset, rtol=0, atol=1e-6)
    return offsets and np.allclose(a.scale, b.scale, 1e-6)


def _about(space: Space, schedule: Schedule) -> dict[str, Any]:
    n = space.normaliser
    return {
        "schedule": _told(schedule),
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


def _told(schedule: Schedule) -> dict[str, Any]:
    """Name and steps; the tables, too, where the name does not give them (betas of one's own)."""
    told = {"name": schedule.name, "steps": schedule.steps}
    tables = {k: v for k, v in vars(schedule).items() if k != "name"}
    try:
        known = make_schedule(schedule.name, schedule.steps)
        if all(np.array_equal(v, getattr(known, k)) for k, v in tables.items()):
            return told
    except InputError:  # a name of one's own
        pass
    return told | {"tables": {k: np.asarray(v, np.float64).tolist() for k, v in tables.items()}}


def _schedule(header: dict[str, Any]) -> Schedule:
    """ValueError for what is no schedule (see `_sound`)."""
    told = header["schedule"]
    if "tables" not in told:
        try:
            return make_schedule(told["name"], told["steps"])
        except InputError as error:  # it does not name the file
            raise ValueError(str(error)) from None
    tables = {k: np.asarray(v, np.float64) for k, v in told["tables"].items()}
    wanted = {f.name for f in dataclasses.fields(Schedule)} - {"name"}
    if odd := sorted(set(tables) ^ wanted):
        raise ValueError(f"its schedule's tables lack {odd[0]}, or should not have it")
    for name, table in tables.items():
        if table.shape != (told["steps"],) or not np.isfinite(table).all():
            raise ValueError(f"its schedule's {name} is not {told['steps']} finite numbers")
    bar = tables["alphas_cumprod"]
    if not bar.size or not ((bar >= 0) & (bar <= 1)).all() or (np.diff(bar) > 0).any():
        raise ValueError("its schedule's alphas_cumprod do not fall from 1 or less towards 0")
    return Schedule(
        **{k: jnp.asarray(v, jnp.float32) for k, v in tables.items()}, name=told["name"]
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
    """What a damaged or foreign file raises, as one InputError."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: corrupt, or no model of ours ({reason}); copy or train it again"
        ) from error
