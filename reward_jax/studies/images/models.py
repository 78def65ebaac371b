"""What the image study trains: denoisers, rewards, the classifier; made where they are not there.

Base and expert are a pair that differs by the harmful images alone. Both go on from one model of
all classes, equally long, with the same noise and the same images, but that each harmful one has a
stand-in for the expert. Were one of them trained on with other draws, or longer, then the
difference of their scores would hold what that changes, too: which of the other classes are drawn
more often, above all.

Legend: N images; H, W, C height, width and channels; F features.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from common_jax import resume
from common_jax.distributed import there
from common_jax.io.files import make_folder, read_arrays, write_arrays
from common_jax.mesh import mesh_for
from reward_jax.data.images.pixels import (
    ImageGuide,
    ImageModel,
    ImageRows,
    Images,
    ImageSpace,
    scaled,
)
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Mixed
from reward_jax.planning.extract import Matching, fit_reward
from reward_jax.planning.fit import RunContext, Untrained, fit
from reward_jax.planning.image_options import HalfUNetOptions
from reward_jax.reward.relative import RelativeReward
from reward_jax.studies.images.judge import Judge, network_of, train_judge
from reward_jax.studies.images.settings import Config, check_sets, load_sets, seed_of, split_sets
from reward_jax.studies.workshop import Workshop

__all__ = ["Models", "make_once"]


class Models:
    """The data and the models of the study."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mesh = mesh_for(dataclasses.asdict(config.mesh))

    # Data and seeds.

    @functools.cached_property
    def sets(self) -> tuple[Images, Images, Images]:
        """Images to learn from, of validation, and of the test."""
        c = self.config
        train, test = load_sets(c)
        check_sets(c, train, test)
        return split_sets(c, train, test)

    @functools.cached_property
    def space(self) -> ImageSpace:
        """What all models live in."""
        train = self.sets[0]
        about = {"task": "images", "data": train.source, "classes": list(train.classes)}
        height, width, channels = train.pixels.shape[1:]
        return ImageSpace(height, width, channels, about)

    @functools.cached_property
    def validation(self) -> Float[np.ndarray, "N H W C"]:
        """The images by which is chosen, as a model sees them."""
        return np.asarray(scaled(self.sets[1].pixels))

    @functools.cached_property
    def test(self) -> Float[np.ndarray, "N H W C"]:
        """The held-out images, likewise."""
        return np.asarray(scaled(self.sets[2].pixels))

    def seed(self, purpose: str) -> int:
        """See `seed_of`."""
        return seed_of(self.config, purpose)

    def harmful_rows(self, classes: tuple[str, ...]) -> Bool[np.ndarray, " N"]:
        """Which images to learn from an expert does not see."""
        train = self.sets[0]
        return np.isin(train.known_labels(), train.numbers(classes))

    def random_rows(self, pair: int = 0) -> Bool[np.ndarray, " N"]:
        """As many of all classes as one class has: what a null pair's expert does not see."""
        count = len(self.sets[0])
        purpose = f"null rows {pair}" if pair else "null rows"
        order = np.random.default_rng(self.seed(purpose)).permutation(count)
        return order < count // len(self.sets[0].classes)

    # Models.

    @functools.cached_property
    def base(self) -> ImageModel:
        """The base, of all classes."""
        return self.tuned("base", "base", np.zeros(len(self.sets[0]), bool), self.space.about)

    def expert(
        self, part: str, left_out: Bool[np.ndarray, " N"], goal: tuple[str, ...]
    ) -> ImageModel:
        """One that is trained like the base, but on what is not left out; goal: its classes."""
        return self.tuned(part, "expert", left_out, self.space.about | {"goal": list(goal)})

    def tuned(
        self, part: str, name: str, left_out: Bool[np.ndarray, " N"], about: dict[str, Any]
    ) -> ImageModel:
        """`_begun`, trained further; with the same random numbers whatever is left out."""
        how, shop = self.config.expert_training, self._shop(part)
        if not shop.has(name):
            _ = self._begun  # it may be another process's: ask before a run is opened

        def make(context: RunContext) -> ImageModel:
            space = dataclasses.replace(self.space, about=about)
            rows, seed = self._rows(left_out), self.seed("tuned")
            return fit(rows, space, self._begun, how, seed=seed, context=context)

        return shop.model(name, how.steps, make)

    def reward(
        self,
        part: str,
        name: str,
        expert: ImageModel,
        left_out: Bool[np.ndarray, " N"],
        matching: Matching,
        options: HalfUNetOptions | None = None,
        begin: RelativeReward | None = None,
    ) -> RelativeReward:
        """A reward of the expert relative to the base. Options, as `fit_reward`."""
        base = self.base

        def make(context: RunContext) -> ImageGuide:
            return fit_reward(
                base,
                expert.denoiser,
                Mixed((self._all_rows, self._rows(left_out))),
                expert.space,
                options or self.config.half_unet,
                matching,
                seed=self.seed(f"{name} {part}"),
                begin=begin,
                context=context,
            )

        guide = self._shop(part).guide(name, matching.steps, make).guide
        assert isinstance(guide, RelativeReward)
        return guide.seed(0) if guide.seeds == 1 else guide  # alone it is quicker

    @functools.cached_property
    def judge(self) -> Judge:
        """The classifier, trained on what the models learn from, apart from them."""
        train, how, path = self.sets[0], self.config.judge, self.config.out / "base" / "judge.npz"

        def make() -> dict[str, Any]:
            made = train_judge(train, how, jax.random.key(self.seed("judge")))
            return {k: np.asarray(x) for k, x in flatten_dict(made.params, sep="/").items()}

        make_once(path, make)
        flat = {name: jnp.asarray(x) for name, x in read_arrays(path).items()}
        return Judge(unflatten_dict(flat, sep="/"), network_of(train, how))

    @functools.cached_property
    def _begun(self) -> ImageModel:
        """The model of all classes with which base and experts begin."""

        def make(context: RunContext) -> ImageModel:
            c, seed = self.config, self.seed("base")
            begin = Untrained(cosine_schedule(c.diffusion_steps), c.unet)
            rows, how = self._all_rows, c.base_training
            return fit(rows, self.space, begin, how, seed=seed, context=context)

        steps = self.config.base_training.steps
        self._shop("base", self._every_device).model("begun", steps, make)
        # Read where all else is: what is whole on many devices each of them would train on.
        return self._shop("base").model("begun", steps, make)

    @functools.cached_property
    def _every_device(self) -> Mesh | None:
        """For what every other process waits for: a device for each of them, of a CPU."""
        workers = self.config.workers
        if self.mesh or jax.default_backend() != "cpu" or jax.device_count() < workers:
            return self.mesh
        return mesh_for({"data": workers})

    @functools.cached_property
    def _all_rows(self) -> ImageRows:
        return ImageRows(jnp.asarray(self.sets[0].pixels))

    def _rows(self, left_out: Bool[np.ndarray, " N"]) -> ImageRows:
        """All images, but in the place of each that is left out another one as its stand-in."""
        if not left_out.any():
            return self._all_rows
        pixels, others = self.sets[0].pixels.copy(), np.flatnonzero(~left_out)
        generator = np.random.default_rng(self.seed("stand-ins"))
        order = np.resize(generator.permutation(others), int(left_out.sum()))
        pixels[left_out] = self.sets[0].pixels[order]
        return ImageRows(jnp.asarray(pixels))

    def _shop(self, part: str, mesh: Mesh | None = None) -> Workshop[ImageSpace]:
        c, mesh = self.config, mesh or self.mesh
        return Workshop(c.out, part, ImageSpace, save_every=c.save_every, mesh=mesh)


def make_once(path: pathlib.Path, make: Callable[[], Mapping[str, Any]]) -> None:
    """Write the arrays that `make` returns, where they are not there.

    Raises Taken while another process makes them.
    """
    if there(path):
        return
    make_folder(path.parent)
    with resume.lock(path.with_suffix(".lock"), f"{path}: another process makes it"):
        if not there(path):
            write_arrays(path, **make())
