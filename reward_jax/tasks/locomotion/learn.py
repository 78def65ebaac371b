"""Policies of the robots, learned by TQC (Kuznetsov et al. 2020, arXiv 2005.04269) of sbx-rl.

    found = learn(LearnOptions(env="halfcheetah", out="runs/policies/halfcheetah"))

run/
  config.yaml, environment.json, metrics.jsonl, tensorboard/   (`common_jax/run.py`): the returns
  learner.zip, replay.pkl    where a run goes on
  evaluated.safetensors      the policy at every evaluation, by its steps
  policies.safetensors       early, late, medium and expert among them, as they are shipped
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from common_jax import extras, resume
from common_jax.cli.options import DirectoryOption
from common_jax.cli.ranges import PositiveFloat, PositiveInt, check_ranges
from common_jax.errors import InputError
from common_jax.io.files import atomic
from common_jax.progress import bar
from common_jax.run import Run, check_directory
from common_jax.termination import Terminated, noticed
from reward_jax.tasks.base import TaskOption, error_of
from reward_jax.tasks.locomotion.collect import STEPS
from reward_jax.tasks.locomotion.policies import FILE, Policy, read_policies, write_policies
from reward_jax.tasks.locomotion.robots import ROBOTS, quiet, robot_of
from reward_jax.tasks.locomotion.simulator import Simulator, resets

__all__ = ["LearnOptions", "Learned", "choose", "learn", "returns"]

MEDIUM = 1 / 3  # of the expert's return, above a random policy's: roughly D4RL's


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnOptions(DirectoryOption, TaskOption):
    """Learn a policy by reinforcement learning (TQC), evaluated on the way.

    A run that goes on begins a new episode, so that it is not the same to the last bit. What it
    left is unpickled, which can run any code: resume no stranger's. After SIGTERM what is learned
    so far is saved.

    Args:
        steps: of the environment.
        hidden: widths of the hidden layers.
        learning_rate: of Adam, for policy, critics and temperature.
        batch_size: transitions of an update.
        buffer: transitions that are remembered.
        begin: steps with random actions, before learning begins.
        update_every: steps after which as many updates are made.
        evaluate_every: steps between evaluations.
        evaluate_episodes: episodes of an evaluation, of the policy's mode.
    """

    steps: PositiveInt = 1_000_000
    hidden: tuple[PositiveInt, ...] = (256, 256)
    learning_rate: PositiveFloat = 3e-4
    batch_size: PositiveInt = 256
    buffer: PositiveInt = 1_000_000
    begin: PositiveInt = 10_000
    update_every: PositiveInt = 50
    evaluate_every: PositiveInt = 25_000
    evaluate_episodes: PositiveInt = 10
    save_every: PositiveInt = 100_000


@dataclasses.dataclass(frozen=True, eq=False)
class Learned:
    """Policies by stage, and the file that they are in."""

    path: pathlib.Path
    policies: Mapping[str, Policy]

    def __str__(self) -> str:
        lines = [
            f"{stage}: return {p.about['return']:.0f} (standard error "
            f"{p.about['standard_error']:.0f}) after {p.about['steps']} steps"
            for stage, p in self.policies.items()
        ]
        return "\n".join([*lines, f"policies: {self.path}"])


def learn(options: LearnOptions) -> Learned:
    """Learn, evaluate, keep; raises InputError, before anything is written, for what cannot be.

    After SIGTERM the learner is saved, and `Terminated` raised.
    """
    check_ranges(options)
    name = robot_of(options.env)
    if name is None:
        raise InputError(
            f"environment {options.env!r} is unknown: choose from {', '.join(ROBOTS)}"
        )
    with extras.named():
        sbx: Any = importlib.import_module("sbx")
    out = pathlib.Path(options.out)
    check_directory(out, resume=options.resume)
    settings = dataclasses.asdict(options)
    free = ("out", "resume", "save_every", "steps")
    with resume.hold(out, settings, free=free), quiet():
        learner, done = _learner(sbx, name, options, out)
        saved = done
        evaluated = out / "evaluated.safetensors"
        found = read_policies(evaluated, name) if done else {}
        found = {stage: p for stage, p in found.items() if p.about["steps"] <= done}
        with (
            noticed() as ending,
            Run(out, settings | {"resume": False}, start=done) as run,
            bar("learning", options.steps, start=done) as shown,
        ):
            # Asked where an update is due, so that evaluations stay at their steps.
            def going(*_: Any) -> bool:
                return bool(learner.num_timesteps % options.update_every) or not ending()

            while done < options.steps:
                more = min(
                    options.evaluate_every - done % options.evaluate_every, options.steps - done
                )
                learner.learn(more, going, reset_num_timesteps=not done)
                done = int(learner.num_timesteps)
                if ending() and done < options.steps:
                    _save(learner, out)
                    raise Terminated(
                        f"step {done} is saved, from which the run goes on by --resume"
                    )
                policy = _policy(learner.policy.actor_state.params)
                scores = returns(name, policy, options.evaluate_episodes, options.seed)
                facts = {
                    "return": float(scores.mean()),
                    "standard_error": error_of(scores) if len(scores) > 1 else 0.0,
                }
                found[f"{done:08d}"] = dataclasses.replace(policy, about={"steps": done, **facts})
                write_policies(evaluated, found, name)
                run.log(done, facts)
                shown.update(done, f"return {facts['return']:.0f}")
                if done - saved >= options.save_every or done >= options.steps:
                    _save(learner, out)
                    saved = done
    path = out / FILE
    write_policies(path, chosen := choose(found), name)
    return Learned(path, chosen)


def choose(evaluated: Mapping[str, Policy]) -> dict[str, Policy]:
    """The stages of policies that were evaluated, in the order of their training.

    expert: the best, but for the first three. medium: of those before it, but for the first two,
    the one whose return is nearest to a third of the expert's above the first one's, which hardly
    knows more than a random policy. early, late: those at a third and two thirds of the way to
    medium. Raises InputError for fewer than four.
    """
    found = list(evaluated.values())
    if len(found) < 4:
        raise InputError(f"{len(found)} evaluations are too few for stages: give more steps")
    scores = np.array([policy.about["return"] for policy in found])
    best = 3 + int(scores[3:].argmax())
    wanted = scores[0] + MEDIUM * (scores[best] - scores[0])
    medium = 2 + int(np.abs(scores[2:best] - wanted).argmin())
    places = {
        "early": medium // 3,
        "late": max(medium // 3 + 1, 2 * medium // 3),
        "medium": medium,
        "expert": best,
    }
    return {stage: found[place] for stage, place in places.items()}


def returns(name: str, policy: Policy, episodes: int, seed: int) -> Float[np.ndarray, " episodes"]:
    """The returns of whole episodes of a policy's mode."""
    simulator = Simulator(name, resets(name, episodes, seed))
    total, observations = np.zeros(episodes), simulator.observations
    for _ in range(STEPS):
        step = simulator.step(policy.act(observations))
        total, observations = total + step.rewards, step.observations
        if not simulator.active.any():
            break
    return total


def _learner(sbx: Any, name: str, options: LearnOptions, out: pathlib.Path) -> tuple[Any, int]:
    """A learner, and the steps that it has behind it."""
    import gymnasium

    logger: Any = importlib.import_module("stable_baselines3.common.logger")  # sbx-rl brings it
    env = gymnasium.make(ROBOTS[name].environment)
    silent = logger.Logger(None, [])  # its own makes a folder a call, and writes nothing there
    saved = out / "learner.zip"
    if saved.exists():
        try:
            learner = sbx.TQC.load(saved, env=env)
            learner.load_replay_buffer(out / "replay.pkl")
        except Exception as error:  # of zip, pickle, torch and numpy
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{out}: learner.zip and replay.pkl cannot be read ({said}); remove both, and "
                "learning begins anew"
            ) from None
        learner.set_logger(silent)
        return learner, int(learner.num_timesteps)
    learner = sbx.TQC(
        "MlpPolicy",
        env,
        seed=options.seed,
        learning_rate=options.learning_rate,
        buffer_size=options.buffer,
        batch_size=options.batch_size,
        learning_starts=options.begin,
        train_freq=options.update_every,
        gradient_steps=options.update_every,
        policy_kwargs={"net_arch": list(options.hidden)},
    )
    learner.set_logger(silent)
    return learner, 0


def _save(learner: Any, out: pathlib.Path) -> None:
    """Both files, each whole or not at all; the learner's, which says how far it is, last."""
    for name, save in (("replay.pkl", learner.save_replay_buffer), ("learner.zip", learner.save)):
        atomic(out / name, save)


def _policy(params: Mapping[str, Any]) -> Policy:
    """Of sbx-rl's parameters: its layers are Dense_0, and so on."""
    layers = params["params"]
    return Policy(
        tuple(
            (np.asarray(layers[f"Dense_{i}"]["kernel"]), np.asarray(layers[f"Dense_{i}"]["bias"]))
            for i in range(len(layers))
        ),
        {},
    )
