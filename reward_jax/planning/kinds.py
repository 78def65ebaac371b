"""The two kinds of samples that commands know, trajectories and images, behind one contract.

    kind = kind_of_data("faces/")  # IMAGES, for the folder holds some
    kind = kind_of_model("runs/base")  # the kind of its file's space
    score, notes = kind.expert_score(base, expert)

What differs between the two stands here, and nowhere else in training, extracting and steering:
how data are read and drawn from, which networks there are, and whether two models fit each other.
The rest (`fit`, `fit_reward`, `guided_sample`) takes samples of any space.
"""

import abc
import dataclasses
import pathlib
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from common_jax.errors import InputError
from reward_jax.data.checkpoint import space_class
from reward_jax.data.episodes import Episodes
from reward_jax.data.images.pixels import (
    ImageRows,
    Images,
    ImageSpace,
    LabelledRows,
    scaled,
)
from reward_jax.data.images.read import holds_images, read_images, read_like
from reward_jax.data.model import Space, SpaceGuide, SpaceModel
from reward_jax.data.spaces import SPACES
from reward_jax.data.trajectory.convert import expert_in_base_coordinates
from reward_jax.data.trajectory.space import TrajectorySpace, check_same_space, check_steers
from reward_jax.data.trajectory.windows import Padding
from reward_jax.diffusion.denoiser import Score
from reward_jax.diffusion.schedule import check_same_schedule
from reward_jax.diffusion.sources import Source
from reward_jax.planning.extract import hold_out
from reward_jax.planning.fit import Network, NetworkOptions, space_of, window_source
from reward_jax.planning.image_options import check_network
from reward_jax.planning.options import AnyRewardNetOption, CutOption, NewSpaceOptions
from reward_jax.tasks.find import read

__all__ = [
    "IMAGES",
    "TRAJECTORIES",
    "HeldOut",
    "ImageSamples",
    "Kind",
    "Samples",
    "WindowSamples",
    "check_own",
    "kind_of_data",
    "kind_of_model",
    "kind_of_space",
]

S = TypeVar("S", bound=Space)
_ASKED = 2000  # held-out images that a reward is asked about, at most


class Samples(abc.ABC, Generic[S]):
    """Data to learn from."""

    @abc.abstractmethod
    def source(self, space: S) -> Source:
        """Of batches in that space; raises InputError where they do not fit it."""

    @abc.abstractmethod
    def hold_out(self, share: float, space: S) -> tuple[Self, Self]:
        """Those to train on, and a `share` held out; both are all where there are too few."""


class HeldOut(NamedTuple):
    """Samples that a reward is asked about: x_0, and which have what the expert was tuned without.

    lacking: None where nothing says so.
    """

    x_0: Float[np.ndarray, "N ..."]
    lacking: Bool[np.ndarray, " N"] | None


@dataclasses.dataclass(frozen=True, eq=False)
class WindowSamples(Samples[TrajectorySpace]):
    """Windows of episodes."""

    episodes: Episodes
    padding: Padding

    def source(self, space: TrajectorySpace) -> Source:
        return window_source(self.episodes, space, self.padding)

    def hold_out(self, share: float, space: TrajectorySpace) -> tuple[Self, Self]:
        parts = hold_out(self.episodes, share, space, self.padding)
        if parts[0] is parts[1]:
            return self, self
        trained, apart = (dataclasses.replace(self, episodes=part) for part in parts)
        return trained, apart


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSamples(Samples[ImageSpace]):
    """Images, but for classes that are left out; by_class: with their labels as the condition."""

    images: Images
    left_out: tuple[str, ...] = ()
    by_class: bool = False

    @property
    def chosen(self) -> Images:
        """Those of the other classes; InputError where there are none."""
        if not self.left_out:
            return self.images
        numbers = self.images.numbers(self.left_out)
        others = ~np.isin(self.images.known_labels(), numbers)
        if not others.any():
            raise InputError(f"{self.images.source}: every image is of a class that is left out")
        return self.images.choose(np.flatnonzero(others))

    def source(self, space: ImageSpace) -> Source:
        found = self.chosen
        pixels = jnp.asarray(found.pixels)
        if not self.by_class:
            return ImageRows(pixels)
        if list(found.classes) != space.about["classes"]:
            raise InputError(
                f"{found.source}: its classes are {', '.join(found.classes) or 'none'}, the "
                f"model's {', '.join(space.about['classes'])}: give data of the model's classes"
            )
        return LabelledRows(pixels, jnp.asarray(found.known_labels(), jnp.int32))

    def hold_out(self, share: float, space: ImageSpace) -> tuple[Self, Self]:
        """Always the same ones of as many images, whichever classes are left out."""
        order = np.random.default_rng(0).permutation(len(self.images))
        apart = order < round(share * len(order))
        if not apart.any():
            return self, self
        parts = (self.images.choose(np.flatnonzero(rows)) for rows in (~apart, apart))
        trained, held = (dataclasses.replace(self, images=part) for part in parts)
        return trained, held


class Kind(abc.ABC, Generic[S]):
    """One kind of samples.

    name: in messages. parts: what its data are made of, likewise. space: what its models live in.
    foreign: options of commands that are of the other kind, and refused. reward_option: that of
    the reward's network. made: what a planner makes, in messages.
    """

    name: str
    parts: str
    made: str
    space: type[S]
    foreign: tuple[str, ...]
    reward_option: Literal["reward", "half_unet_2d"]

    def reward(self, options: AnyRewardNetOption) -> Any:
        """Of the reward's network; raises InputError where the other kind's are given."""
        for kind in _KINDS:
            if kind is not self:
                _check_default(kind.reward_option, options, self, "the models are")
        return getattr(options, self.reward_option)

    @abc.abstractmethod
    def to_learn(self, options: NewSpaceOptions, like: SpaceModel[S] | None) -> tuple[Source, S]:
        """Data to train on, and the space of the model that is trained on them.

        like: the model to begin with, whose space is kept, but for `about`; None for a new one.
        """

    @abc.abstractmethod
    def network(self, options: NewSpaceOptions, space: S) -> Network[S]:
        """Of a new denoiser; raises InputError where it does not fit the space."""

    @abc.abstractmethod
    def taken_over(self, like: SpaceModel[S]) -> dict[str, Any]:
        """Options that a model to begin with has, by their names with dots, and its values."""

    @abc.abstractmethod
    def read(self, path: str, space: S, options: CutOption) -> Samples[S]:
        """Data, read as those of a model of that space were."""

    @abc.abstractmethod
    def size(self, space: S) -> str:
        """Of one sample, in words."""

    @abc.abstractmethod
    def observed(
        self, x: Float[Array, "B ..."] | Float[np.ndarray, "B ..."], space: S
    ) -> Shaped[np.ndarray, "B ..."]:
        """What of samples is seen, in the world's own units, as `Task.recorded` takes it."""

    def held_out(self, path: str, space: S) -> HeldOut | None:
        """Data for a reward to be asked about, of a model of the expert's space; None for none."""
        return None

    @abc.abstractmethod
    def check_reward(self, options: Any, space: S) -> None:
        """Raise InputError for a reward's network that does not fit the space."""

    @abc.abstractmethod
    def expert_score(
        self, base: SpaceModel[S], expert: SpaceModel[S], *, pin: bool = True
    ) -> tuple[Score, list[str]]:
        """The expert's score in the base's coordinates, and notes; InputError for no pair."""

    @abc.abstractmethod
    def check_same(self, what: str, a: S, b: S) -> None:
        """Raise InputError naming the first difference of two spaces; what: both, in words."""

    @abc.abstractmethod
    def check_steers(self, what: str, base: SpaceModel[S], guide: SpaceGuide[S]) -> None:
        """Raise InputError naming the first reason why a guide cannot steer a base."""


class _Trajectories(Kind[TrajectorySpace]):
    name, parts, made = "trajectories", "episodes", "plans"
    space = TrajectorySpace
    foreign = ("images", "unet_2d")
    reward_option = "reward"

    def to_learn(
        self, options: NewSpaceOptions, like: SpaceModel[TrajectorySpace] | None
    ) -> tuple[Source, TrajectorySpace]:
        episodes = _episodes(options.data, options)
        if like:
            space = like.space
        else:
            space = space_of(
                episodes,
                horizon=options.horizon,
                stride=options.stride,
                actions=options.actions,
                normaliser=options.normaliser,
            )
        source = window_source(episodes, space, options.cut.padding)  # of its task, or refused
        return source, dataclasses.replace(space, about=dict(episodes.about))

    def network(self, options: NewSpaceOptions, space: TrajectorySpace) -> NetworkOptions:
        options.network.check(space.horizon)
        return options.network

    def taken_over(self, like: SpaceModel[TrajectorySpace]) -> dict[str, Any]:
        space = like.space
        own = NetworkOptions.of(like.denoiser.model).items()
        return {
            "horizon": space.horizon,
            "stride": space.stride,
            "actions": space.actions > 0,
            "normaliser": space.normaliser.kind,
        } | {f"network.{name}": value for name, value in own}

    def read(self, path: str, space: TrajectorySpace, options: CutOption) -> WindowSamples:
        episodes = _episodes(path, options)
        return WindowSamples(episodes, options.cut.padding)

    def size(self, space: TrajectorySpace) -> str:
        return f"{space.horizon} rows, one every {space.stride} environment steps"

    def observed(
        self, x: Float[Array, "B H D"] | Float[np.ndarray, "B H D"], space: TrajectorySpace
    ) -> Shaped[np.ndarray, "B ..."]:
        return space.plans(x).observations

    def check_reward(self, options: Any, space: TrajectorySpace) -> None:
        if options.kind != "energy":
            options.check(space.horizon)

    def expert_score(
        self,
        base: SpaceModel[TrajectorySpace],
        expert: SpaceModel[TrajectorySpace],
        *,
        pin: bool = True,
    ) -> tuple[Score, list[str]]:
        return expert_in_base_coordinates(base, expert, pin=pin)

    def check_same(self, what: str, a: TrajectorySpace, b: TrajectorySpace) -> None:
        check_same_space(what, a, b)

    def check_steers(
        self, what: str, base: SpaceModel[TrajectorySpace], guide: SpaceGuide[TrajectorySpace]
    ) -> None:
        check_steers(what, base, guide)


def _episodes(path: str, options: CutOption) -> Episodes:
    if holds_images(path):
        raise InputError(f"{path}: holds images, where episodes are wanted: give a file of them")
    return read(path, ends=options.cut.ends, env=options.env)


class _Images(Kind[ImageSpace]):
    name, parts, made = "images", "images", "samples"
    space = ImageSpace
    reward_option = "half_unet_2d"
    foreign = (
        *("env", "cut", "horizon", "stride", "actions", "normaliser", "network"),
        *("rollout", "goal", "windows", "bins"),
    )

    def to_learn(
        self, options: NewSpaceOptions, like: SpaceModel[ImageSpace] | None
    ) -> tuple[Source, ImageSpace]:
        o, by_class = options.images, options.unet_2d.by_class
        classes, left_out = (tuple(map(str, names)) for names in (o.classes, o.leave_out))
        if like:
            by_class = like.null is not None
            found = read_like(options.data, like.space)
        else:
            sizes: dict[str, Any] = {"size": o.size, "channels": o.channels}
            found = read_images(options.data, classes=classes, **sizes)
        if by_class:
            found.known_labels()
        about = {"task": self.name, "data": found.source, "classes": list(found.classes)}
        about |= {"goal": list(left_out)} if left_out else {}
        height, width, channels = found.pixels.shape[1:]
        space = ImageSpace(height, width, channels, about)
        samples = ImageSamples(found, left_out, by_class)
        return samples.source(like.space if like else space), space

    def network(self, options: NewSpaceOptions, space: ImageSpace) -> Network[ImageSpace]:
        check_network("unet_2d", options.unet_2d, space)
        return options.unet_2d

    def taken_over(self, like: SpaceModel[ImageSpace]) -> dict[str, Any]:
        space, model = like.space, like.denoiser.model
        fields = ("dim", "multipliers", "blocks", "attention", "patch")
        return {
            "images.size": space.height if space.height == space.width else None,
            "images.channels": space.channels,
            "images.classes": tuple(space.about.get("classes", ())),
            "unet_2d.by_class": like.null is not None,
        } | {f"unet_2d.{name}": getattr(model, name) for name in fields if hasattr(model, name)}

    def read(self, path: str, space: ImageSpace, options: CutOption) -> ImageSamples:
        return ImageSamples(read_like(path, space), tuple(space.about.get("goal") or ()))

    def size(self, space: ImageSpace) -> str:
        return " x ".join(map(str, space.shape))

    def observed(
        self, x: Float[Array, "B H W C"] | Float[np.ndarray, "B H W C"], space: ImageSpace
    ) -> Shaped[np.ndarray, "B ..."]:
        return space.plans(x)

    def held_out(self, path: str, space: ImageSpace) -> HeldOut:
        """Images of the test set where there is one, else all; some of each class of many."""
        found = read_like(path, space, part="test")
        found = found.choose(slice(None, None, -(-len(found) // _ASKED)))
        goal = space.about.get("goal")
        lacking = None
        if goal and found.labels is not None and set(goal) <= set(found.classes):
            lacking = np.isin(found.labels, found.numbers(goal))
        return HeldOut(np.asarray(scaled(found.pixels)), lacking)

    def check_reward(self, options: Any, space: ImageSpace) -> None:
        if options.kind != "energy":
            check_network("half_unet_2d", options, space)

    def expert_score(
        self, base: SpaceModel[ImageSpace], expert: SpaceModel[ImageSpace], *, pin: bool = True
    ) -> tuple[Score, list[str]]:
        what = "base and expert"
        self.check_same(what, base.space, expert.space)
        check_same_schedule(what, base.denoiser.schedule, expert.denoiser.schedule)
        return expert.denoiser, []

    def check_same(self, what: str, a: ImageSpace, b: ImageSpace) -> None:
        if a.shape != b.shape:
            raise InputError(
                f"{what} differ in size: {self.size(a)} and {self.size(b)}; train both alike"
            )

    def check_steers(
        self, what: str, base: SpaceModel[ImageSpace], guide: SpaceGuide[ImageSpace]
    ) -> None:
        self.check_same(what, base.space, guide.space)
        check_same_schedule(what, base.denoiser.schedule, guide.schedule)


TRAJECTORIES, IMAGES = _Trajectories(), _Images()
_KINDS: tuple[Kind[Any], ...] = (TRAJECTORIES, IMAGES)


def kind_of_data(path: str | pathlib.Path) -> Kind[Any]:
    """Of images where the path holds some (`data/images/read.py`), else of trajectories."""
    return IMAGES if holds_images(path) else TRAJECTORIES


def kind_of_model(path: str | pathlib.Path) -> Kind[Any]:
    """The kind of a denoiser's file or run; raises InputError as `load_model`, and for no kind."""
    found = space_class(path)
    for kind in _KINDS:
        if kind.space is found:
            return kind
    known = ", ".join(kind.name for kind in _KINDS)
    (own,) = (name for name, space in SPACES.items() if space is found)
    raise InputError(f"{path}: is a model of {own}; commands know those of {known}")


def kind_of_space(space: Space) -> Kind[Any]:
    """The kind of samples of a space; raises InputError for one that has none."""
    for kind in _KINDS:
        if isinstance(space, kind.space):
            return kind
    raise InputError(f"{type(space).__name__} is the space of no kind that commands know")


def check_own(kind: Kind[Any], what: str, options: Any) -> None:
    """Raise InputError for an option of the other kind that is given; what: "FILE is", in it."""
    for field in dataclasses.fields(options):
        if field.name in kind.foreign:
            _check_default(field.name, options, kind, what)


def _check_default(name: str, options: Any, kind: Kind[Any], what: str) -> None:
    (field,) = (one for one in dataclasses.fields(options) if one.name == name)
    made = field.default_factory
    default = field.default if made is dataclasses.MISSING else made()
    if getattr(options, name) != default:
        (other,) = (one.name for one in _KINDS if one is not kind)
        raise InputError(f"{name} is of {other}, and {what} of {kind.name}: leave {name} out")
