"""Policies that were trained here, at several stages, and what they do.

A policy is a Gaussian that tanh squashes (Haarnoja et al. 2018, appendix C), as sbx-rl's TQC and
SAC train it: two hidden layers with ReLU, then a mean and a log standard deviation. A file of each
robot comes with the package, float16, with every stage and its return;
`configs/reward/policy_*.yaml` are the commands that made them.

Legend: B rows, O observation width, A action width.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Float

from common_jax.errors import InputError
from common_jax.io.files import atomic, parse_json
from reward_jax.tasks.locomotion.robots import ROBOTS, environment

__all__ = ["FILE", "Policy", "policies", "read_policies", "write_policies"]

FILE = "policies.safetensors"  # of a run of `reward-jax policy`
POLICIES = pathlib.Path(__file__).parent / "policies"
LOG_STD = (-20.0, 2.0)  # sbx-rl's bounds


@dataclasses.dataclass(frozen=True, eq=False)
class Policy:
    """A squashed Gaussian of an MLP.

    layers: (kernel [in, out], bias [out]) of each hidden layer, then of mean and log_std, float32.
    about: the stage's facts: steps of training, mean return of its mode, its standard error.
    """

    layers: tuple[tuple[Float[np.ndarray, "in out"], Float[np.ndarray, " out"]], ...]
    about: Mapping[str, Any]

    def act(
        self, observations: Float[np.ndarray, "B O"], rng: np.random.Generator | None = None
    ) -> Float[np.ndarray, "B A"]:
        """Actions in [-1, 1], float32: drawn with rng, or the mode (tanh of the mean)."""
        x = np.asarray(observations, np.float32)
        *hidden, (mean, mean_bias), (spread, spread_bias) = self.layers
        for kernel, bias in hidden:
            x = np.maximum(x @ kernel + bias, 0)
        action = x @ mean + mean_bias
        if rng is not None:
            deviation = np.exp(np.clip(x @ spread + spread_bias, *LOG_STD))
            action = action + deviation * rng.standard_normal(action.shape, np.float32)
        return np.tanh(action)


@functools.cache
def policies(name: str) -> dict[str, Policy]:
    """The policies of a robot that are shipped, by stage, the least trained first.

    Raises InputError where there are none.
    """
    path = POLICIES / f"{name}.safetensors"
    if not path.is_file():
        raise InputError(
            f"no policies of {name} are shipped ({path}): learn them (reward-jax policy --env "
            f"{name} --out RUN) and record with data --policies RUN, or take data of D4RL"
        )
    return read_policies(path, name)


def read_policies(path: str | pathlib.Path, name: str) -> dict[str, Policy]:
    """The policies in a file that `write_policies` wrote, in its order; or in a run's folder.

    Raises InputError for a file that is none, or of another robot's shapes.
    """
    path = pathlib.Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file; give one that `reward-jax policy` wrote")
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            stages, robot = parse_json(metadata["policies"]), metadata.get("robot", name)
            arrays = {key: file.get_tensor(key).astype(np.float32) for key in file.keys()}
        found = {
            stage: Policy(
                tuple(
                    (arrays[f"{stage}/{i}/kernel"], arrays[f"{stage}/{i}/bias"])
                    for i in range(about["layers"])
                ),
                about,
            )
            for stage, about in stages.items()
        }
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: holds no policies ({said}); write it anew") from None
    if robot != name:  # shapes do not always tell
        raise InputError(
            f"{path}: its policies are of {robot}, not {name}: give that robot's file"
        )
    made: Any = environment(name)
    widths = made.observation_space.shape[0], made.action_space.shape[0]
    for stage, policy in found.items():
        shapes = [kernel.shape for kernel, _ in policy.layers]
        width = widths[0]
        sound = len(shapes) > 2 and all(len(shape) == 2 for shape in shapes)
        for shape, (_, bias) in zip(shapes, policy.layers, strict=True):
            sound &= shape == (width, *bias.shape)
            width = width if not sound or shape is shapes[-2] else shape[-1]
        if not sound or {shapes[-1][-1], shapes[-2][-1]} != {widths[1]}:
            raise InputError(
                f"{path}: its policy {stage!r} has layers {shapes}, which are not of "
                f"{ROBOTS[name].environment} (observations {widths[0]}, actions {widths[1]}): "
                "give that robot's file"
            )
        if not all(np.isfinite(x).all() for layer in policy.layers for x in layer):
            raise InputError(f"{path}: its policy {stage!r} is not finite; write it anew")
    return found


def write_policies(
    path: str | pathlib.Path, stages: Mapping[str, Policy], name: str | None = None
) -> None:
    """Write policies to a safetensors file, float16; it appears whole or not at all.

    name: of the robot, which the file then says.
    """
    from safetensors.numpy import save

    arrays, about = {}, {}
    for stage, policy in stages.items():
        about[stage] = dict(policy.about) | {"layers": len(policy.layers)}
        for i, (kernel, bias) in enumerate(policy.layers):
            arrays[f"{stage}/{i}/kernel"] = np.asarray(kernel, np.float16)
            arrays[f"{stage}/{i}/bias"] = np.asarray(bias, np.float16)
    metadata = {"policies": json.dumps(about)} | ({"robot": name} if name else {})
    content = save(arrays, metadata)
    atomic(pathlib.Path(path), lambda temporary: temporary.write_bytes(content))
