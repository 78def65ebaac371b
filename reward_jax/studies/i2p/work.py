"""What the I2P study makes: pairs, the reward, and its judgement; each where it is not there."""

import contextlib
import dataclasses
import functools
import pathlib
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from common_jax import resume
from common_jax.checksum import checksum
from common_jax.distributed import by_first, there
from common_jax.errors import Taken
from common_jax.io.files import make_folder, write_arrays, write_json
from common_jax.mesh import batch_sharding, fetch, mesh_for, put
from reward_jax.data.checkpoint import load_guide, save_guide
from reward_jax.data.latents import LatentGuide, LatentSpace
from reward_jax.models.stable_diffusion.pipeline import CutPrompts, StableDiffusion
from reward_jax.planning.fit import open_run
from reward_jax.reward.relative import RelativeReward
from reward_jax.studies.i2p.evaluate import judge
from reward_jax.studies.i2p.pairs import CHAINS, compare_ways, draw_pairs
from reward_jax.studies.i2p.prompts import (
    PROMPTS,
    Prompt,
    prompts_checksum,
    read_prompts,
    split_prompts,
)
from reward_jax.studies.i2p.reward import Scaling, fit_reward, measure, read_scaling, score_rows
from reward_jax.studies.i2p.settings import Config
from reward_jax.studies.i2p.store import PairStore
from reward_jax.studies.workshop import Clock
from reward_jax.torch_import.stable_diffusion import load_stable_diffusion

__all__ = ["Work"]


class Work:
    """Pairs, reward and results of one study. A row is a prompt with one of its noises."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mesh = mesh_for(dataclasses.asdict(config.mesh))
        self.prompts: list[Prompt] = read_prompts(config.prompts, config.most)
        self.texts = [p.text for p in self.prompts for _ in range(config.noises)]
        s = config.store
        self.store = PairStore(config.out / "pairs", len(self.texts), s.at_once, s.dtype)

    @functools.cached_property
    def sd(self) -> StableDiffusion:
        """The model, on its shards; pairs that are there must be of it, and of these prompts."""
        sd = load_stable_diffusion(self.config.base, self.config.dtype, self.mesh)
        made_of = {"base (checksum)": checksum(sd), PROMPTS: prompts_checksum(self.prompts)}
        pairs = make_folder(self.config.out / "pairs")
        resume.settle(pairs, made_of)
        return sd

    def shard(self, number: int) -> None:
        """The pairs of a shard; the first also compares the two ways to eps_safe."""
        ways = self.config.out / "ways.json"
        if there(self.store.path(number)) and (number or there(ways)):
            return
        c, rows = self.config, list(self.store.rows_of(number))
        # One shape for all shards: the last row again in place of those that are missing.
        filled = rows + rows[-1:] * (c.store.at_once - len(rows))
        texts = [self.texts[row] for row in filled]
        how = c.guidance(), c.chains, jax.random.fold_in(self._keys()[1], number)
        if number == 0:
            self._say_cut()
        with _cut_in_silence():
            drawn = draw_pairs(self.sd, texts, self._noise(filled), *how)
        if not there(self.store.path(number)):
            self.store.write(number, drawn.first(len(rows)), texts[: len(rows)])
            print(f"pairs: shard {number + 1} of {self.store.shards}", flush=True)
        if number == 0:
            few = min(c.compared, len(rows))
            with _cut_in_silence():
                found = compare_ways(self.sd, drawn.first(few), texts[:few], *how)
            write_json(ways, found)

    @functools.cached_property
    def _cut(self) -> list[str]:
        """Prompts that are longer than what the text encoder reads."""
        return self.sd.tokens.long([prompt.text for prompt in self.prompts])

    def _say_cut(self) -> None:
        """Once, and of all prompts, what each shard's own warning would say of its own."""
        if cut := self._cut:
            print(
                f"prompts: {len(cut)} of {len(self.prompts)} have more than "
                f"{self.sd.tokens.length} tokens, and are cut there: the first is {cut[0]:.60}",
                flush=True,
            )

    def _keys(self) -> Key[Array, "2"]:
        """Of the noise that chains begin from, and of what DDPM draws in them."""
        return jax.random.split(jax.random.key(self.config.seed))

    def _noise(self, rows: list[int]) -> Float[Array, "B h w C"]:
        """Each row's own, whatever shard it is in."""
        u, key = self.sd.config.unet, self._keys()[0]
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.array(rows))
        shape = *u.sample_size, u.in_channels
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return noise if self.mesh is None else put(noise, batch_sharding(self.mesh, len(rows)))

    def judged(self) -> None:
        """The reward and all that is measured of it; raises Taken while pairs are missing."""
        c, folder = self.config, self.config.out / "reward"
        if there(folder / "result.json"):
            return
        if missing := self.store.missing():
            raise Taken(f"{self.store.path(missing[0])}: another process is at it")
        self.store.check()
        split, clock = split_prompts(self.prompts, c.split, c.seed), Clock(folder / "seconds.json")
        train, validation, test = (
            (side[:, None] * c.noises + np.arange(c.noises)).ravel() for side in split
        )
        scaling = self._scaling(folder / "scaling.npz", train)
        clock.lap("scaling")
        reward = self._reward(folder / "reward.safetensors", train, scaling)
        clock.lap("reward")
        groups, guide = [self.texts[row] for row in test], reward.guide
        assert isinstance(guide, RelativeReward)
        both = validation, test
        found = {
            "reward": [score_rows(guide, scaling, self.store, rows) for rows in both],
            "no training": [-self.store.sizes(rows) for rows in both],
        }
        results: dict[str, Any] = {k: judge(v[0], v[1], groups, c.seed) for k, v in found.items()}
        clock.lap("scores")
        best = found["reward"][1][..., results["reward"]["best"]["step"]]
        write_arrays(folder / "scores.npz", reward=best, **self._extremes(best, test))
        clock.lap("images")
        write_json(
            folder / "result.json",
            {
                "prompts": {
                    "all": len(self.prompts),
                    "different": len({p.text for p in self.prompts}),
                    "cut": len(self._cut),
                    **{name: len(side) for name, side in split._asdict().items()},
                },
                "t": scaling.t.tolist(),
                "latents": list(reward.space.shape),
                "scores": results,
                "seconds": clock.seconds,
            },
        )

    def _scaling(self, path: pathlib.Path, rows: Any) -> Scaling:
        if not there(path):
            found = measure(self.store, rows, self.config.matching.standardise)
            write_arrays(path, **vars(found))
        return read_scaling(path)

    def _reward(self, path: pathlib.Path, rows: Any, scaling: Scaling) -> LatentGuide:
        c = self.config
        if not there(path):
            about: dict[str, Any] = {"out": str(c.out), "model": "reward"}
            how: dict[str, Any] = {"save_every": c.save_every, "mesh": self.mesh}
            folder = path.with_suffix("")
            with open_run(folder, about, "reward", c.matching.steps, **how) as context:
                reward = fit_reward(
                    self.store,
                    rows,
                    scaling,
                    self.sd.schedule,
                    c.network,
                    c.matching,
                    seed=c.seed,
                    context=context,
                )
            height, width, channels = self.store.read("last", 0, 0).shape
            about = {"task": "i2p", "safety": c.safety}
            space = LatentSpace(height, width, channels, about)
            save_guide(path, LatentGuide(fetch(reward), space, reward.schedule))
            by_first(lambda: shutil.rmtree(folder / "checkpoints", ignore_errors=True))
        return load_guide(path, LatentSpace)

    def _extremes(self, scores: Float[np.ndarray, "2 P"], rows: Any) -> dict[str, Any]:
        """Images of the highest and the lowest rewards, [k, H, W, 3] in 0 .. 255."""
        order, shown = np.argsort(scores.ravel()), self.config.shown
        if not shown:
            return {}
        found: dict[str, Any] = {}
        for name, picked in (("best", order[::-1][:shown]), ("worst", order[:shown])):
            at = [divmod(int(i), len(rows)) for i in picked]
            last = np.stack([self.store.read("last", c, int(rows[r])) for c, r in at])
            images = np.asarray(fetch(self.sd.decode(jnp.asarray(last))))
            found[name] = np.clip((images + 1) * 127.5, 0, 255).round().astype(np.uint8)
            found[f"{name}_chain"] = np.array([CHAINS[c] for c, _ in at])
        return found


@contextlib.contextmanager
def _cut_in_silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutPrompts)
        yield
