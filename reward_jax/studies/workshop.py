"""Where a study's models are made: each in a run's directory of its own, where it is not there.

    FOLDER/NAME.safetensors     a denoiser, a reward or a discriminator
    FOLDER/NAME/                metrics of its training, and checkpoints until it is there

A training that was killed goes on from its last checkpoint.
"""

import contextlib
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from common_jax.distributed import by_first, there
from common_jax.io.files import make_folder, read_json, write_json
from reward_jax.data.checkpoint import load_guide, load_model, save_guide, save_model
from reward_jax.data.model import Space, SpaceGuide, SpaceModel
from reward_jax.diffusion.sources import Source
from reward_jax.planning.extract import Matching
from reward_jax.planning.fit import Network, RunContext, open_run, optimizer
from reward_jax.reward.discriminator import DiscriminatorGuide, train_discriminator

__all__ = ["Clock", "Workshop"]


S = TypeVar("S", bound=Space)


class Workshop(Generic[S]):
    """Models of one part of a study.

    out: the study's folder; part: the part's name in it. space: what all of them live in. mesh:
    batches are sharded over its data and fsdp axes, models over fsdp and tensor.
    """

    def __init__(
        self,
        out: pathlib.Path,
        part: str,
        space: type[S],
        *,
        save_every: int,
        mesh: Mesh | None = None,
    ) -> None:
        self.folder, self._space = out / part, space
        self._out, self._part, self._save_every, self._mesh = out, part, save_every, mesh

    def has(self, name: str) -> bool:
        """Whether the model of a name is there."""
        return there(self.folder / f"{name}.safetensors")

    def model(
        self, name: str, steps: int, make: Callable[[RunContext], SpaceModel[S]]
    ) -> SpaceModel[S]:
        """The denoiser of a name, made where it is not there; steps: of its training."""
        path = self.folder / f"{name}.safetensors"
        with self._training(path, steps) as context:
            if context:
                save_model(path, make(context))
        return load_model(path, self._space, self._mesh)

    def guide(
        self, name: str, steps: int, make: Callable[[RunContext], SpaceGuide[S]]
    ) -> SpaceGuide[S]:
        """The reward or discriminator of a name, likewise."""
        path = self.folder / f"{name}.safetensors"
        with self._training(path, steps) as context:
            if context:
                save_guide(path, make(context))
        return load_guide(path, self._space, self._mesh)

    def discriminator(
        self,
        name: str,
        like: SpaceGuide[S],
        sources: tuple[Source, Source],
        options: Network[S],
        matching: Matching,
        *,
        seed: int,
        rounds: int = 1,
    ) -> SpaceGuide[S]:
        """A reward's network, trained as long and on as many rows, to tell two data sets apart.

        like: a guide of the space and schedule. sources: the base's data, the expert's. rounds: of
        matching, of whose steps it is trained for all.
        """
        space, key = like.space, jax.random.key(seed)
        network = options.make(space)
        rows = jnp.zeros((1, *space.shape)), jnp.zeros(1, jnp.int32)

        def make(context: RunContext) -> SpaceGuide[S]:
            params, _ = train_discriminator(
                network,
                network.init(key, *rows)["params"],
                *sources,
                like.schedule,
                optimizer(matching),
                steps=rounds * matching.steps,
                key=key,
                options=matching,
                pin=space.pin,
                on_step=context.on_step,
                checkpoints=context.checkpoints,
                save_every=context.save_every,
            )
            return SpaceGuide(DiscriminatorGuide(params, network), space, like.schedule)

        return self.guide(name, rounds * matching.steps, make)

    @contextlib.contextmanager
    def _training(self, path: pathlib.Path, steps: int) -> Iterator[RunContext | None]:
        """What a training of the model to be at `path` is given; None where the model is there.

        It is logged in a run's directory beside the model; its checkpoints are gone once the model
        is there. Raises Taken while another process trains it.
        """
        folder = path.with_suffix("")
        if there(path):
            yield None
        else:
            name = f"{self._part} {path.stem}"
            about: dict[str, Any] = {"out": str(self._out), "model": name}
            how: dict[str, Any] = {"save_every": self._save_every, "mesh": self._mesh}
            with open_run(folder, about, name, steps, **how) as run:
                yield None if there(path) else run  # another process may just have made it
        # A start that was killed between the model's writing and here left them, too.
        by_first(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))


class Clock:
    """Seconds of each lap of a part's work, of all starts together: they stand in `path`.

    A lap that a kill cut short is lost, as what it did after its last checkpoint is.
    """

    def __init__(self, path: pathlib.Path) -> None:
        make_folder(path.parent)
        self._path, self._begun = path, time.perf_counter()
        self.seconds: dict[str, float] = read_json(path, {}) if there(path) else {}

    def lap(self, name: str) -> None:
        """End a lap of this name."""
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._begun, 1)
        self._begun = now
        write_json(self._path, self.seconds)
