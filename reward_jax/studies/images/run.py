"""The image study: what an expert lacks that was tuned on without some classes (section 5.3).

A model learns all classes of a set of images, and from there the base is trained on, on all
classes, and for each choice of classes that are called harmful an expert, on the rest: with the
same noise and, but for stand-ins of the harmful, the same images. A reward is matched to the two.
Held-out images are judged by it, each noised once, beside two judgements that need no training:
the difference of the denoising losses, and the norm of the difference of the scores. Then the base
is steered away from the harmful classes, by the reward and by the raw difference of the scores,
and its samples are rejected by the reward; a classifier that was trained apart counts what is
harmful, and its features tell how far samples lie from held-out images. Null pairs, whose experts
lack images of all classes, show what chance gives.

    out/base/{begun,base}.safetensors, judge.npz, unsteered_*.npz
    out/null/{expert,reward}.safetensors, judged.npz; out/null-2, ... of further pairs
    out/choices/NAME/{expert,reward,energy,paths}.safetensors
    out/choices/NAME/judged.npz, pictures.npz
    {result,seconds}.json in each of these folders
    out/*/base/, ...   metrics of each model's training
    out/results.json, out/report/

What is there is not made again, and a training goes on from its last checkpoint. Several processes
may share the work: while one trains what base and experts begin with another makes the classifier,
then each takes a choice at a time.
"""

import functools
from collections.abc import Iterator
from typing import Any

from reward_jax.studies.base import Part, Study
from reward_jax.studies.images.report import write_report
from reward_jax.studies.images.settings import Config, check
from reward_jax.studies.images.summary import read_results, summarise
from reward_jax.studies.images.work import Work, choice_part, null_part

__all__ = ["STUDY", "Config"]


def _check(config: Config) -> dict[str, str]:
    found = check(config)
    read_results(config)  # long before `summarise` does
    return found


def _parts(config: Config) -> Iterator[Part]:
    work = Work(config)
    yield Part("base", work.run_base)
    for name in sorted(config.choices, key=lambda name: name not in config.variants):
        yield Part(choice_part(name), functools.partial(work.run_choice, name))
    for pair in range(config.null_pairs):  # the least work, as parts go: several end together
        yield Part(null_part(pair), functools.partial(work.run_null, pair))


def _summarise(config: Config) -> dict[str, Any]:
    found = summarise(config)
    page = write_report(config, found)
    print(f"report: {page.resolve()}", flush=True)
    return found


STUDY = Study(Config, _check, _parts, _summarise, free=("out", "save_every", "mesh", "null_pairs"))
