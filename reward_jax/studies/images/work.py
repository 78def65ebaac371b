"""What the image study measures of its models; see `run`."""

import functools
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from common_jax.distributed import there
from common_jax.io.files import read_arrays, write_arrays, write_json
from reward_jax.data.images.pixels import ImageModel, Images, unscaled
from reward_jax.planning.image_options import HalfUNetOptions
from reward_jax.reward import measure
from reward_jax.reward.capped import cap_reward
from reward_jax.reward.gradients import Guide, ScoreDifference
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.relative import RelativeReward
from reward_jax.reward.targets import unit
from reward_jax.studies.images.arms import (
    Drawn,
    Noise,
    Yardstick,
    accept,
    choose,
    draw_samples,
    within,
)
from reward_jax.studies.images.models import Models, make_once
from reward_jax.studies.images.settings import Config
from reward_jax.studies.workshop import Clock

__all__ = ["CHOICE", "Work", "choice_part", "null_part"]

_SHOWN = 64  # samples of an arm that are kept, for pictures
_EXTREMES = 10  # best and worst images that are kept
_HIGH = 0.95  # quantile of rho that rejection sampling takes for its bound
_ARM = dict.fromkeys(("harmful_share", "distance", "others_factor", "seconds_a_sample"))
_JUDGED = dict.fromkeys(("auc", "interval", "t"))
CHOICE = {
    "classes": [None],
    "judge_mistaken": None,
    "reward": _JUDGED,
    "loss_difference": dict.fromkeys(("auc", "interval")),
    "score_norm": _JUDGED,
    "arms": dict.fromkeys(("unsteered", "steered", "raw_difference", "rejection"), _ARM),
    "seconds": {},
}


class Work:
    """The results of the study, made where they are not there."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.models = Models(config)

    # What all choices share.

    @functools.cached_property
    def unsteered(self) -> dict[str, Drawn]:
        """Samples of the base, of both noises: to choose by, and of the test, twice as many."""
        found = {}
        for name, noise in self._noises.items():
            path = self.config.out / "base" / f"unsteered_{name}.npz"
            twice = replace(noise, batches=noise.batches * (2 if name == "test" else 1))
            make_once(path, lambda noise=twice: vars(self._draw(noise, self.config.sampling)))
            stored = read_arrays(path)
            numbers = [float(stored[n]) for n in ("seconds", "runs")]
            found[name] = Drawn(stored["x"], stored["labels"], stored["features"], *numbers)
        return found

    @functools.cached_property
    def judged_validation(self) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N F"]]:
        """The validation images' classes, as the classifier sees them, and their features."""
        return self.models.judge.judge(self.models.validation)

    @functools.cached_property
    def judged_test(self) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N F"]]:
        """The test images' likewise."""
        return self.models.judge.judge(self.models.test)

    def run_base(self) -> None:
        """The base, the classifier, and unsteered samples."""
        path = self.config.out / "base" / "result.json"
        if there(path):
            return
        clock = Clock(path.with_name("seconds.json"))
        for of, name in (
            (self.models, "sets"),
            (self.models, "judge"),
            (self.models, "base"),
            (self, "unsteered"),
        ):
            getattr(of, name)
            clock.lap(name)
        right = self.judged_test[0] == self.models.sets[2].known_labels()
        found = {"judge_accuracy": float(right.mean()), "seconds": clock.seconds}
        write_json(path, found)
        self._say("base", f"the classifier is right of {right.mean():.3f}; {clock.seconds}")

    # The null pairs.

    def run_null(self, pair: int) -> None:
        """An expert that is made like others, but lacks images of all classes; its reward."""
        part = null_part(pair)
        path = self.config.out / part / "result.json"
        if there(path):
            return
        clock = Clock(path.with_name("seconds.json"))
        models, left_out = self.models, self.models.random_rows(pair)
        expert = models.expert(part, left_out, models.sets[0].classes)
        reward = models.reward(part, "reward", expert, left_out, self.config.matching)
        clock.lap("models")
        untrained = _Pair(self, expert, "test")
        write_arrays(
            path.with_name("judged.npz"),
            reward=measure.scores(reward, models.test, self.looks("test")),
            loss_difference=untrained.losses.mean(0),
            score_norm=untrained.norms,
        )
        clock.lap("judged")
        write_json(path, {"seconds": clock.seconds})
        self._say(part, str(clock.seconds))

    # One choice of harmful classes.

    def run_choice(self, name: str) -> None:
        """The expert, the reward, what they tell apart, and the base steered by them."""
        part = choice_part(name)
        path = self.config.out / part / "result.json"
        if there(path):
            return
        c, classes = self.config, self.config.choices[name]
        clock, models = Clock(path.with_name("seconds.json")), self.models
        images, left_out = models.sets, models.harmful_rows(classes)
        _ = models.judge  # waits for no other model: a process beside the base's begins with it
        rest = tuple(one for one in images[0].classes if one not in classes)
        expert = models.expert(part, left_out, rest)
        clock.lap("expert")
        reward = models.reward(part, "reward", expert, left_out, c.matching)
        clock.lap("reward")
        yardsticks = self._yardsticks(classes)
        bad = {
            "validation": self._harmful(images[1], classes),
            "test": self._harmful(images[2], classes),
        }
        found: dict[str, Any] = {"classes": list(classes)}
        called = np.isin(self.judged_test[0], images[2].numbers(classes))
        found["judge_accuracy"] = float((called == bad["test"]).mean())
        found["judge_mistaken"] = float(called[~bad["test"]].mean())
        found["reward"], own = self._judged(reward, bad)
        found |= self._untrained(expert, bad, own)
        clock.lap("judged")
        raw = ScoreDifference(models.base.denoiser, expert.denoiser)
        pictures: dict[str, Any] = {}
        unsteered = self.unsteered["test"].first(len(yardsticks["test"].unsteered.labels))
        arms = {"unsteered": yardsticks["test"].of(unsteered)}
        pictures["unsteered"] = unscaled(unsteered.x[:_SHOWN])
        for arm, guide, runs, scales in (
            ("steered", self._capped(reward, classes), 1, c.scales),
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
            scales = c.variant_scales or (arms["steered"]["scale"],)
            small = reward, found["reward"]
            found["variants"] = self._variants(name, expert, small, bad, yardsticks, scales)
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
        by_look = measure.scores(reward, self.models.validation, self.looks("validation"))
        best = measure.best_look(by_look, bad["validation"])
        begun = time.perf_counter()
        tested = measure.scores(reward, self.models.test, self.looks("test"))
        seconds = (time.perf_counter() - begun) / (len(self.models.test) * len(t))
        found = self._auc(tested[best], bad["test"]) | {
            "t": t[best],
            "by_look": self._by_look(tested, bad["test"]),
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
        t, few = self.config.looks, self.config.norm_images
        pairs = {purpose: _Pair(self, expert, purpose) for purpose in ("validation", "test")}
        by_look = pairs["test"].losses
        losses = by_look.mean(0)
        best = measure.best_look(pairs["validation"].norms, bad["validation"][:few])
        norms = pairs["test"].norms[best]
        own |= {"loss_difference": losses, "score_norm": norms}
        seconds = pairs["test"].seconds
        return {
            "loss_difference": self._auc(losses, bad["test"])
            | {
                "by_look": self._by_look(by_look, bad["test"]),
                "network_runs": 2 * len(t),
                "seconds_a_judgement": seconds * 2 * len(t),
            },
            "score_norm": self._auc(norms, bad["test"])
            | {"t": t[best], "network_runs": 2, "seconds_a_judgement": seconds * 2},
        }

    def _by_look(
        self, judged: Float[np.ndarray, "L N"], harmful: Bool[np.ndarray, " N"]
    ) -> dict[str, float]:
        """The AUC of each look, by its diffusion step."""
        looks = zip(self.config.looks, judged, strict=True)
        return {str(t): measure.auc(one, harmful) for t, one in looks}

    def _auc(
        self, judged: Float[np.ndarray, " N"], harmful: Bool[np.ndarray, " N"]
    ) -> dict[str, Any]:
        found = measure.interval(judged, harmful, self.models.seed("bootstrap"))
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

        def draw(which: str, scale: float) -> Drawn:
            options = replace(self.config.sampling, scale=scale)
            return self._draw(self._noises[which], options, guide=guide, runs=runs)

        def say(line: str) -> None:
            self._say(name, f"{arm}, by which is chosen: {line}")

        scale, rows = choose(functools.partial(draw, "trial"), yardsticks["trial"], scales, say)
        drawn, stick = draw("test", scale), yardsticks["test"]
        found = {"scale": scale} | stick.of(drawn) | {"validation": rows}
        found["within"] = within(found, stick.of(stick.unsteered))
        self._say(name, f"{arm}, scale {scale:g}: harmful {found['harmful_share']:.3f}")
        return found, unscaled(drawn.x[:_SHOWN])

    def _capped(self, reward: RelativeReward, classes: tuple[str, ...]) -> Guide:
        """What steers: it leaves alone what it gives as much as most images that may be drawn."""
        c, models = self.config, self.models
        if c.cap is None:
            return reward
        x_0 = models.validation[~self._harmful(models.sets[1], classes)][: c.cap.images]
        key = jax.random.key(models.seed("cap"))
        return cap_reward(reward, x_0, key, quantile=c.cap.quantile, width=c.cap.width)

    def _draw(self, noise: Noise, options: GuidanceOptions, **guidance: Any) -> Drawn:
        models = self.models
        return draw_samples(
            models.base, models.judge, noise, options, mesh=models.mesh, **guidance
        )

    def _rejection(
        self, reward: RelativeReward, t: int, stick: Yardstick, seconds: float
    ) -> tuple[dict[str, Any], Any]:
        """Of all unsteered samples those that are kept; a kept one costs those that are not."""
        looks = measure.Looks(
            self.models.base.denoiser.schedule,
            np.array([t]),
            jax.random.key(self.models.seed("rejection")),
        )
        every = self.unsteered["test"]
        rho = measure.scores(reward, np.clip(every.x, -1, 1), looks)[0]
        rho = rho / float(unit(reward.schedule, reward.target)[t])
        generator = np.random.default_rng(self.models.seed("rejected"))
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
        small: tuple[RelativeReward, dict[str, Any]],
        bad: Mapping[str, Bool[np.ndarray, " N"]],
        yardsticks: Mapping[str, Yardstick],
        scales: tuple[float, ...],
    ) -> dict[str, Any]:
        """The reward as a difference of energies, matched on guided paths, and uncapped.

        small: the small network, and how it judges.
        """
        c, part, classes = self.config, choice_part(name), self.config.choices[name]
        reward, judged = small
        left_out, made = self.models.harmful_rows(classes), {}
        if c.cap is not None:
            uncapped = c.variant_scales or c.scales
            arm, _ = self._arm(name, "uncapped", reward, 1, uncapped, yardsticks)
            made["uncapped"] = {"judged": judged, "arm": arm, "training_seconds": 0.0}
        for variant, how, runs, options, begin in (
            ("energy", c.energy, 2, HalfUNetOptions(kind="energy"), None),
            ("paths", c.paths, 1, c.half_unet, reward),
        ):
            if how is None:
                continue
            begun = time.perf_counter()
            found = self.models.reward(part, variant, expert, left_out, how, options, begin)
            seconds = time.perf_counter() - begun
            judged = self._judged(found, bad)[0] | {"network_runs": runs}
            guide = self._capped(found, classes)
            arm, _ = self._arm(name, variant, guide, runs, scales, yardsticks)
            made[variant] = {"judged": judged, "arm": arm, "training_seconds": seconds}
        return made

    # Images and noise.

    def _harmful(self, images: Images, classes: tuple[str, ...]) -> Bool[np.ndarray, " N"]:
        return np.isin(images.known_labels(), images.numbers(classes))

    def looks(self, purpose: str) -> measure.Looks:
        """The diffusion steps at which images of validation or of the test are looked at."""
        key = jax.random.key(self.models.seed(f"looks {purpose}"))
        return measure.Looks(
            self.models.base.denoiser.schedule, np.asarray(self.config.looks, np.int32), key
        )

    def estimated(self, purpose: str) -> Float[np.ndarray, "N H W C"]:
        """The images of which both models' estimates are made: the dearest of all judgements."""
        if purpose == "test":
            return self.models.test
        return self.models.validation[: self.config.norm_images]

    def estimates(self, model: ImageModel, purpose: str) -> Float[np.ndarray, "L N H W C"]:
        """A model's estimates of them; the base's are held."""
        x_0 = self.estimated(purpose)
        if model is not self.models.base:
            return measure.estimates(model.denoiser, x_0, self.looks(purpose))
        if purpose not in self._held:
            self._held[purpose] = measure.estimates(model.denoiser, x_0, self.looks(purpose))
        return self._held[purpose]

    @functools.cached_property
    def _held(self) -> dict[str, Float[np.ndarray, "L N H W C"]]:
        return {}

    @functools.cached_property
    def _noises(self) -> dict[str, Noise]:
        c = self.config
        seeds = {name: self.models.seed(f"noise {name}") for name in ("trial", "test")}
        key = {name: jax.random.key(seed) for name, seed in seeds.items()}
        return {
            "trial": Noise(key["trial"], 1, c.trials),
            "test": Noise(key["test"], -(-c.samples // c.trials), c.trials),
        }

    def _yardsticks(self, classes: tuple[str, ...]) -> dict[str, Yardstick]:
        """To choose by, of validation images, and of the test."""
        _, validation, test = self.models.sets
        found = {}
        for name, images, judged in (
            ("trial", validation, self.judged_validation),
            ("test", test, self.judged_test),
        ):
            noise, others = self._noises[name], judged[1][~self._harmful(images, classes)]
            drawn = self.unsteered[name].first(noise.batches * noise.rows)
            harmful = tuple(images.numbers(classes))
            found[name] = Yardstick(images.classes, harmful, others, drawn)
        return found

    def _extremes(self, judged: Float[np.ndarray, " N"]) -> dict[str, Any]:
        """The test images that are judged best and worst."""
        order = np.argsort(judged)
        pixels = self.models.sets[2].pixels
        return {"worst": pixels[order[:_EXTREMES]], "best": pixels[order[::-1][:_EXTREMES]]}

    def _say(self, part: str, line: str) -> None:
        print(f"{part}: {line}", flush=True)


class _Pair:
    """What the two models, without a reward, say of images."""

    def __init__(self, work: Work, expert: ImageModel, purpose: str) -> None:
        looks, x_0 = work.looks(purpose), work.estimated(purpose)
        others = work.estimates(work.models.base, purpose)
        begun = time.perf_counter()
        own = work.estimates(expert, purpose)
        self.seconds = (time.perf_counter() - begun) / own[..., 0, 0, 0].size  # a network run
        self.losses = measure.loss_differences(others, own, x_0, looks)
        self.norms = measure.score_norms(others, own, looks)


def choice_part(name: str) -> str:
    """The part of the study that a choice is."""
    return f"choices/{name}"


def null_part(pair: int) -> str:
    """The part of the study that a null pair is; pair: from 0."""
    return f"null-{pair + 1}" if pair else "null"
