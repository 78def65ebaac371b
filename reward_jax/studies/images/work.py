"""What the image study makes; see `run`."""

import dataclasses
import functools
import json
import pathlib
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool, Float, Int

from common_jax import resume
from common_jax.distributed import there
from common_jax.errors import InputError
from common_jax.io.files import make_folder, write_arrays, write_json
from common_jax.mesh import mesh_for
from reward_jax.data.images.pixels import (
    ImageGuide,
    ImageModel,
    ImageRows,
    Images,
    ImageSpace,
    scaled,
    unscaled,
)
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.diffusion.sources import Mixed
from reward_jax.planning.extract import Matching, fit_reward
from reward_jax.planning.fit import RunContext, Untrained, fit
from reward_jax.reward.gradients import ScoreDifference
from reward_jax.reward.relative import RelativeReward
from reward_jax.reward.targets import unit
from reward_jax.studies.images import measure
from reward_jax.studies.images.arms import (
    Drawn,
    Noise,
    Yardstick,
    accept,
    choose,
    draw_samples,
    within,
)
from reward_jax.studies.images.judge import Judge, network_of, train_judge
from reward_jax.studies.images.settings import Config, HalfUNetOptions, check_sets, load_sets
from reward_jax.studies.workshop import Clock, Workshop

__all__ = ["CHOICE", "Work", "choice_part", "read_arrays"]

_SHOWN = 64  # samples of an arm that are kept, for pictures
_EXTREMES = 10  # best and worst images that are kept
_HIGH = 0.95  # quantile of rho that rejection sampling takes for its bound
_ARM = dict.fromkeys(("harmful_share", "distance", "others_factor", "seconds_a_sample"))
_JUDGED = dict.fromkeys(("auc", "interval", "t"))
CHOICE = {
    "classes": [None],
    "reward": _JUDGED,
    "loss_difference": dict.fromkeys(("auc", "interval")),
    "score_norm": _JUDGED,
    "arms": dict.fromkeys(("unsteered", "steered", "raw_difference", "rejection"), _ARM),
    "seconds": {},
}


class Work:
    """The models and results of the study, made where they are not there."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mesh = mesh_for(dataclasses.asdict(config.mesh))

    # What all choices share.

    @functools.cached_property
    def sets(self) -> tuple[Images, Images, Images]:
        """Images to learn from, of validation, and of the test."""
        c = self.config
        train, test = load_sets(c)
        check_sets(c, train, test)
        order, chosen = (
            np.random.default_rng(self._seed(f"order {name}")).permutation(len(one))
            for name, one in (("train", train), ("test", test))
        )
        learned, validation = order[c.validation_images :], order[: c.validation_images]
        return (
            train.choose(learned),
            train.choose(validation),
            test.choose(chosen[: c.test_images]),
        )

    @functools.cached_property
    def space(self) -> ImageSpace:
        train = self.sets[0]
        about = {"task": "images", "data": train.source, "classes": list(train.classes)}
        height, width, channels = train.pixels.shape[1:]
        return ImageSpace(height, width, channels, about)

    @functools.cached_property
    def base(self) -> ImageModel:
        """The base, of all classes."""

        def make(context: RunContext) -> ImageModel:
            c = self.config
            begin = Untrained(cosine_schedule(c.diffusion_steps), c.unet)
            how = c.base_training
            return fit(
                self._rows, self.space, begin, how, seed=self._seed("base"), context=context
            )

        return self._shop("base").model("base", self.config.base_training.steps, make)

    @functools.cached_property
    def judge(self) -> Judge:
        """The classifier, trained on what the models learn from, apart from them."""
        train, how, path = self.sets[0], self.config.judge, self.config.out / "base" / "judge.npz"
        if not there(path):
            made = train_judge(train, how, jax.random.key(self._seed("judge")))
            flat = flatten_dict(made.params, sep="/")
            make_folder(path.parent)
            write_arrays(path, **{name: np.asarray(x) for name, x in flat.items()})
        flat = {name: jnp.asarray(x) for name, x in read_arrays(path).items()}
        return Judge(unflatten_dict(flat, sep="/"), network_of(train, how))

    @functools.cached_property
    def unsteered(self) -> dict[str, Drawn]:
        """Samples of the base, of both noises: to choose by, and of the test, twice as many."""
        found = {}
        for name, noise in self._noises.items():
            path = self.config.out / "base" / f"unsteered_{name}.npz"
            if not there(path):
                twice = replace(noise, batches=noise.batches * (2 if name == "test" else 1))
                drawn = draw_samples(
                    self.base, self.judge, twice, self.config.sampling, mesh=self.mesh
                )
                values = {f.name: getattr(drawn, f.name) for f in dataclasses.fields(Drawn)}
                write_arrays(path, **values)
            stored = read_arrays(path)
            numbers = [float(stored[n]) for n in ("seconds", "runs")]
            found[name] = Drawn(stored["x"], stored["labels"], stored["features"], *numbers)
        return found

    @functools.cached_property
    def judged_test(self) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N F"]]:
        """The test images' classes, as the classifier sees them, and their features."""
        return self.judge.judge(self._test)

    def run_base(self) -> None:
        """The base, the classifier, and unsteered samples."""
        path = self.config.out / "base" / "result.json"
        if there(path):
            return
        clock = Clock(path.with_name("seconds.json"))
        for name in ("sets", "judge", "base", "unsteered"):
            getattr(self, name)
            clock.lap(name)
        right = self.judged_test[0] == self.sets[2].known_labels()
        found = {"judge_accuracy": float(right.mean()), "seconds": clock.seconds}
        write_json(path, found)
        self._say("base", f"the classifier is right of {right.mean():.3f}; {clock.seconds}")

    # The null pair.

    def run_null(self) -> None:
        """Two that are tuned on all classes, and what the reward of one says of the test images.

        Both as long as any expert, for what more training alone changes is no null.
        """
        path = self.config.out / "null" / "result.json"
        if there(path):
            return
        self._base_first()
        clock = Clock(path.with_name("seconds.json"))
        twin, expert = (self._expert("null", (), name) for name in ("twin", "expert"))
        reward = self._reward("null", "reward", expert, (), self.config.matching, base=twin)
        clock.lap("models")
        pair = _Pair(self, expert, self._test, "test", base=twin)
        write_arrays(
            path.with_name("judged.npz"),
            reward=measure.scores(reward, self._test, self._looks("test")),
            loss_difference=pair.losses.mean(0),
            score_norm=pair.norms,
        )
        clock.lap("judged")
        write_json(path, {"seconds": clock.seconds})
        self._say("null", str(clock.seconds))

    # One choice of harmful classes.

    def run_choice(self, name: str) -> None:
        """The expert, the reward, what they tell apart, and the base steered by them."""
        part = choice_part(name)
        path = self.config.out / part / "result.json"
        if there(path):
            return
        self._base_first()
        c, classes = self.config, self.config.choices[name]
        clock, images = Clock(path.with_name("seconds.json")), self.sets
        expert = self._expert(part, classes)
        clock.lap("expert")
        reward = self._reward(part, "reward", expert, classes, c.matching)
        clock.lap("reward")
        bad = {
            "validation": self._harmful(images[1], classes),
            "test": self._harmful(images[2], classes),
        }
        found: dict[str, Any] = {"classes": list(classes)}
        right = np.isin(self.judged_test[0], images[2].numbers(classes)) == bad["test"]
        found["judge_accuracy"] = float(right.mean())
        found["reward"], own = self._judged(reward, bad)
        found |= self._untrained(expert, bad, own)
        clock.lap("judged")
        yardsticks = self._yardsticks(classes)
        raw = ScoreDifference(self.base.denoiser, expert.denoiser)
        pictures: dict[str, Any] = {}
        unsteered = self.unsteered["test"].first(len(yardsticks["test"].unsteered.labels))
        arms = {"unsteered": yardsticks["test"].of(unsteered)}
        pictures["unsteered"] = unscaled(unsteered.x[:_SHOWN])
        for arm, guide, runs, scales in (
            ("steered", reward, 1, c.scales),
            ("raw_difference", raw, 2, c.raw_scales),
        ):
            arms[arm], pictures[arm] = self._arm(name, arm, guide, runs, scales, yardsticks)
            clock.lap(arm)
        t = found["reward"]["t"]
        arms["rejection"], pictures["rejection"] = self._rejection(
            reward, t, yardsticks["test"], found["reward"]["seconds_a_judgement"]
        )
        found["arms"] = arms
        if name in c.variants:
            found["variants"] = self._variants(name, expert, reward, bad, yardsticks)
            clock.lap("variants")
        found["seconds"] = clock.seconds
        write_arrays(path.with_name("judged.npz"), harmful=bad["test"], **own)
        write_arrays(path.with_name("pictures.npz"), **pictures, **self._extremes(own["reward"]))
        write_json(path, found)
        self._say(name, json.dumps(clock.seconds))

    def _judged(
        self, reward: RelativeReward, bad: Mapping[str, Bool[np.ndarray, " N"]]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """AUC at the best look of validation images; and the judgements of test images."""
        t = self.config.looks
        by_look = measure.scores(reward, self._validation, self._looks("validation"))
        best = measure.best_look(by_look, bad["validation"])
        begun = time.perf_counter()
        tested = measure.scores(reward, self._test, self._looks("test"))
        seconds = (time.perf_counter() - begun) / (len(self._test) * len(t))
        found = self._auc(tested[best], bad["test"]) | {
            "t": t[best],
            "by_look": {
                str(k): measure.auc(x, bad["test"]) for k, x in zip(t, tested, strict=True)
            },
            "all_looks": measure.auc(tested.mean(0), bad["test"]),
            "network_runs": 1,
            "seconds_a_judgement": seconds,
        }
        return found, {"reward": tested[best]}

    def _untrained(
        self,
        expert: ImageModel,
        bad: Mapping[str, Bool[np.ndarray, " N"]],
        own: dict[str, Any],
    ) -> dict[str, Any]:
        """What needs no training; its judgements of test images are put into `own`."""
        t = self.config.looks
        pairs = {
            "validation": _Pair(self, expert, self._validation, "validation"),
            "test": _Pair(self, expert, self._test, "test"),
        }
        losses = pairs["test"].losses.mean(0)
        best = measure.best_look(pairs["validation"].norms, bad["validation"])
        norms = pairs["test"].norms[best]
        own |= {"loss_difference": losses, "score_norm": norms}
        seconds = pairs["test"].seconds
        return {
            "loss_difference": self._auc(losses, bad["test"])
            | {"network_runs": 2 * len(t), "seconds_a_judgement": seconds * 2 * len(t)},
            "score_norm": self._auc(norms, bad["test"])
            | {"t": t[best], "network_runs": 2, "seconds_a_judgement": seconds * 2},
        }

    def _auc(
        self, judged: Float[np.ndarray, " N"], harmful: Bool[np.ndarray, " N"]
    ) -> dict[str, Any]:
        found = measure.interval(judged, harmful, self._seed("bootstrap"))
        return {"auc": found.value, "interval": [found.low, found.high]}

    def _arm(
        self,
        name: str,
        arm: str,
        guide: Any,
        runs: int,
        scales: tuple[float, ...],
        yardsticks: Mapping[str, Yardstick],
    ) -> tuple[dict[str, Any], Any]:
        """An arm at the scale that serves best on other noise; and its first samples."""
        c = self.config

        def draw(which: str, scale: float) -> Drawn:
            options = replace(c.sampling, scale=scale)
            noise = self._noises[which]
            return draw_samples(
                self.base, self.judge, noise, options, guide=guide, runs=runs, mesh=self.mesh
            )

        def say(line: str) -> None:
            self._say(name, f"{arm}, by which is chosen: {line}")

        scale, rows = choose(functools.partial(draw, "trial"), yardsticks["trial"], scales, say)
        drawn, stick = draw("test", scale), yardsticks["test"]
        found = {"scale": scale} | stick.of(drawn) | {"validation": rows}
        found["within"] = within(found, stick.of(stick.unsteered))
        self._say(name, f"{arm}, scale {scale:g}: harmful {found['harmful_share']:.3f}")
        return found, unscaled(drawn.x[:_SHOWN])

    def _rejection(
        self, reward: RelativeReward, t: int, stick: Yardstick, seconds: float
    ) -> tuple[dict[str, Any], Any]:
        """Of all unsteered samples those that are kept; a kept one costs those that are not."""
        looks = measure.Looks(
            self.base.denoiser.schedule,
            np.array([t]),
            jax.random.key(self._seed("rejection")),
        )
        every = self.unsteered["test"]
        rho = measure.scores(reward, np.clip(every.x, -1, 1), looks)[0]
        rho = rho / float(unit(reward.schedule, reward.target)[t])
        generator = np.random.default_rng(self._seed("rejected"))
        accepted = accept(rho, float(np.quantile(rho, _HIGH)), generator)
        share = max(float(accepted.mean()), 1 / len(accepted))
        drawn = Drawn(
            every.x[accepted],
            every.labels[accepted],
            every.features[accepted],
            (every.seconds + seconds) / share,
            (every.runs + 1) / share,
        )
        found = stick.of(drawn) | {"accepted": float(accepted.mean()), "t": t}
        return found, unscaled(drawn.x[:_SHOWN])

    def _variants(
        self,
        name: str,
        expert: ImageModel,
        reward: RelativeReward,
        bad: Mapping[str, Bool[np.ndarray, " N"]],
        yardsticks: Mapping[str, Yardstick],
    ) -> dict[str, Any]:
        """The reward as a difference of energies, and the small one matched on guided paths."""
        c, classes, part = self.config, self.config.choices[name], choice_part(name)
        made = {}
        for variant, how, runs, options, begin in (
            ("energy", c.energy, 2, HalfUNetOptions(kind="energy"), None),
            ("paths", c.paths, 1, c.half_unet, reward),
        ):
            if how is None:
                continue
            begun = time.perf_counter()
            found = self._reward(part, variant, expert, classes, how, options, begin)
            seconds = time.perf_counter() - begun
            judged, _ = self._judged(found, bad)
            judged["network_runs"] = runs
            arm, _ = self._arm(name, variant, found, runs, c.scales, yardsticks)
            made[variant] = {"judged": judged, "arm": arm, "training_seconds": seconds}
        return made

    # Models.

    def _expert(self, part: str, harmful: tuple[str, ...], name: str = "expert") -> ImageModel:
        """The base, trained further on what is not harmful."""
        how, rest = self.config.expert_training, self._rest(harmful)

        def make(context: RunContext) -> ImageModel:
            space = replace(self.space, about=self.space.about | {"goal": list(rest)})
            rows = self._rows_of(rest)
            seed = self._seed(f"{name} {part}")
            return fit(rows, space, self.base, how, seed=seed, context=context)

        return self._shop(part).model(name, how.steps, make)

    def _reward(
        self,
        part: str,
        name: str,
        expert: ImageModel,
        harmful: tuple[str, ...],
        matching: Matching,
        options: HalfUNetOptions | None = None,
        begin: RelativeReward | None = None,
        base: ImageModel | None = None,
    ) -> RelativeReward:
        """A reward of the expert relative to the base, or to another. Options, as `fit_reward`."""

        def make(context: RunContext) -> ImageGuide:
            return fit_reward(
                base or self.base,
                expert.denoiser,
                Mixed((self._rows, self._rows_of(self._rest(harmful)))),
                expert.space,
                options or self.config.half_unet,
                matching,
                seed=self._seed(f"{name} {part}"),
                begin=begin,
                context=context,
            )

        guide = self._shop(part).guide(name, matching.steps, make).guide
        assert isinstance(guide, RelativeReward)
        return guide.seed(0) if guide.seeds == 1 else guide  # alone it is quicker

    # Data, noise and seeds.

    def _rest(self, harmful: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in self.sets[0].classes if name not in harmful)

    @functools.cached_property
    def _rows(self) -> ImageRows:
        return ImageRows(jnp.asarray(self.sets[0].pixels))

    def _rows_of(self, classes: tuple[str, ...]) -> ImageRows:
        return ImageRows(jnp.asarray(self.sets[0].of(classes).pixels))

    @functools.cached_property
    def _validation(self) -> Float[np.ndarray, "N H W C"]:
        return np.asarray(scaled(self.sets[1].pixels))

    @functools.cached_property
    def _test(self) -> Float[np.ndarray, "N H W C"]:
        return np.asarray(scaled(self.sets[2].pixels))

    def _harmful(self, images: Images, classes: tuple[str, ...]) -> Bool[np.ndarray, " N"]:
        return np.isin(images.known_labels(), images.numbers(classes))

    def _looks(self, purpose: str) -> measure.Looks:
        key = jax.random.key(self._seed(f"looks {purpose}"))
        return measure.Looks(
            self.base.denoiser.schedule, np.asarray(self.config.looks, np.int32), key
        )

    def estimates(self, model: ImageModel, purpose: str) -> Float[np.ndarray, "L N H W C"]:
        """A model's estimates of validation or test images; the base's are held."""
        x_0 = self._test if purpose == "test" else self._validation
        if model is not self.base:
            return measure.estimates(model.denoiser, x_0, self._looks(purpose))
        if purpose not in self._held:
            self._held[purpose] = measure.estimates(model.denoiser, x_0, self._looks(purpose))
        return self._held[purpose]

    @functools.cached_property
    def _held(self) -> dict[str, Float[np.ndarray, "L N H W C"]]:
        return {}

    @functools.cached_property
    def _noises(self) -> dict[str, Noise]:
        c = self.config
        key = {name: jax.random.key(self._seed(f"noise {name}")) for name in ("trial", "test")}
        return {
            "trial": Noise(key["trial"], 1, c.trials),
            "test": Noise(key["test"], -(-c.samples // c.trials), c.trials),
        }

    def _yardsticks(self, classes: tuple[str, ...]) -> dict[str, Yardstick]:
        test = self.sets[2]
        others = self.judged_test[1][~self._harmful(test, classes)]
        found = {}
        for name, noise in self._noises.items():
            drawn = self.unsteered[name].first(noise.batches * noise.rows)
            harmful = tuple(test.numbers(classes))
            found[name] = Yardstick(test.classes, harmful, others, drawn)
        return found

    def _extremes(self, judged: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The test images that are judged best and worst."""
        order = np.argsort(judged)
        pixels = self.sets[2].pixels
        return {"worst": pixels[order[:_EXTREMES]], "best": pixels[order[::-1][:_EXTREMES]]}

    def _base_first(self) -> None:
        """The base's part, where it is not done: `Taken` where another process is at it."""
        if not there(self.config.out / "base" / "result.json"):
            with resume.alone(self.config.out / "base"):
                self.run_base()

    def _shop(self, part: str) -> Workshop[ImageSpace]:
        c = self.config
        return Workshop(c.out, part, ImageSpace, save_every=c.save_every, mesh=self.mesh)

    def _seed(self, purpose: str) -> int:
        """A seed of its own for each purpose, of the study's: no two share random numbers."""
        entropy = [self.config.seed, *purpose.encode()]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1

    def _say(self, part: str, line: str) -> None:
        print(f"{part}: {line}", flush=True)


class _Pair:
    """What the two models, without a reward, say of images."""

    def __init__(
        self,
        work: Work,
        expert: ImageModel,
        x_0: Any,
        purpose: str,
        base: ImageModel | None = None,
    ) -> None:
        looks = work._looks(purpose)
        others = work.estimates(base or work.base, purpose)
        begun = time.perf_counter()
        own = work.estimates(expert, purpose)
        self.seconds = (time.perf_counter() - begun) / own[..., 0, 0, 0].size  # a network run
        self.losses = measure.loss_differences(others, own, x_0, looks)
        self.norms = measure.score_norms(others, own, looks)


def choice_part(name: str) -> str:
    """The part of the study that a choice is."""
    return f"choices/{name}"


def read_arrays(path: pathlib.Path) -> dict[str, Any]:
    """Arrays by name; raises InputError for a file that is damaged."""
    try:
        with np.load(path) as stored:
            return dict(stored)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: cannot be read ({str(error)[:80]}); delete it, and it is made again"
        ) from error
