"""The locomotion study: what a strong robot wants that a weak one does not (section 5.2).

For each robot a base model of weak policies' episodes; an expert, the base trained further on a
strong policy's; the reward of the two, with several seeds; a discriminator. Then returns of every
arm on one set of seeds, each arm's guidance chosen on others: unsteered, at lower temperatures,
steered by the discriminator, by the raw difference of the scores, by the reward, and the expert's
own plans. The same guides then steer a base of data that none of them has seen. Ablations change
one thing each, and measure the reward between its bounds.

    out/ROBOT/{base,expert,unseen,reward_N,distilled_N,discriminator}.safetensors
    out/ROBOT/base/, ...   metrics of each model's training
    out/ROBOT/arms/, unseen_arms/   returns of each arm, and frames of three of its episodes
    out/ROBOT/result.json, seconds.json, data.json
    out/ablations/NAME/    what a change makes anew, likewise
    out/results.json, out/report/

What is there is not made again, and several processes may take a robot or an ablation each.
"""

import functools
from collections.abc import Iterator
from typing import Any

from common_jax import resume
from common_jax.distributed import there
from reward_jax.studies.base import Part, Study
from reward_jax.studies.locomotion.data import check_data, is_recorded
from reward_jax.studies.locomotion.models import Models, ablation_part
from reward_jax.studies.locomotion.report import write_report
from reward_jax.studies.locomotion.settings import Config, check, sources
from reward_jax.studies.locomotion.summary import read_ablations, read_results, summarise
from reward_jax.studies.locomotion.work import Work
from reward_jax.tasks.locomotion.policies import policies

__all__ = ["STUDY", "Config"]


def _check(config: Config) -> None:
    check(config)
    for name in config.robots:
        if any(is_recorded(source) for source in sources(config, name).values()):
            policies(name)
    check_data(config, _undone(config))
    for read in (read_results, read_ablations):  # hours before `summarise` does
        read(config)


def _undone(config: Config) -> list[str]:
    """Robots of which there is work to do, their ablations among it."""
    parts = {name: [name] for name in config.robots}
    for name, ablation in config.ablations.items():
        parts[ablation.robot].append(ablation_part(name))
    return [
        name
        for name, own in parts.items()
        if not all(there(config.out / part / "result.json") for part in own)
    ]


def _parts(config: Config) -> Iterator[Part]:
    for name in config.robots:
        yield Part(name, functools.partial(_robot, config, name))
    for name in config.ablations:
        yield Part(ablation_part(name), functools.partial(_ablation, config, name))


def _robot(config: Config, name: str) -> None:
    Work(Models(config, name)).run()


def _ablation(config: Config, name: str) -> None:
    robot = config.ablations[name].robot
    if not there(config.out / robot / "result.json"):  # another process is at it, or was
        with resume.alone(config.out / robot):
            _robot(config, robot)
    Work(Models(config, robot).ablation(name)).run_ablation()


def _summarise(config: Config) -> dict[str, Any]:
    found = summarise(config)
    page = write_report(config, found)
    print(f"report: {page.resolve()}", flush=True)
    return found


STUDY = Study(Config, _check, _parts, _summarise, free=("out", "save_every", "mesh"))
