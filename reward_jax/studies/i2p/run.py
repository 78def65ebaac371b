"""The image experiment: the reward of safe guidance, on I2P's prompts and Stable Diffusion.

For each prompt a chain of the base and a safe one from the same noise; at each of their latents
both guided epsilons (`pairs.py`); a half U-Net whose gradient is matched to their difference
(`reward.py`); and whether it tells the two kinds of chains apart on prompts held out
(`evaluate.py`).

    out/pairs/NNNN/pairs.safetensors                     a shard of pairs (`store.py`)
    out/ways.json                                        eps_safe along the path and as a function
    out/reward/{reward.safetensors,scaling.npz}          the reward, and the scaling of its inputs
    out/reward/{result.json,scores.npz,seconds.json}, out/results.json, out/report/

What is there is not made again. Several processes may take a shard each; one matches the reward.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any

from common_jax.io.files import read_json, write_json
from reward_jax.studies.base import Part, Study
from reward_jax.studies.i2p.report import write_report
from reward_jax.studies.i2p.settings import Config, check
from reward_jax.studies.i2p.work import Work

__all__ = ["STUDY", "Config"]


def _parts(config: Config) -> Iterator[Part]:
    work = Work(config)
    for number in range(work.store.shards):
        yield Part(f"pairs/{number:04d}", functools.partial(work.shard, number))
    yield Part("reward", work.judged)


def _summarise(config: Config) -> dict[str, Any]:
    figures = dict.fromkeys(("step", "auc", "accuracy", "accuracy_same_draws"))
    score = {"best": figures, "last": figures, "validation_auc": [None], "test_auc": [None]}
    wanted = {"prompts": {}, "t": [None], "seconds": {}}
    wanted["scores"] = {"reward": score, "no training": score}
    result = read_json(config.out / "reward" / "result.json", wanted)
    ways = read_json(config.out / "ways.json", dict.fromkeys(("rounding", "path")))
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    summary = {**result, "ways": ways, "settings": settings}
    write_json(config.out / "results.json", summary)
    page = write_report(config.out, summary)
    print(f"report: {page.resolve()}", flush=True)
    return summary


STUDY = Study(Config, check, _parts, _summarise, free=("out", "mesh", "save_every"))
