"""The I2P study at its smallest: from a diffusers folder and a csv file to a report."""

import concurrent.futures
import dataclasses
import itertools
import json
import shlex
import shutil
import threading
import time
import warnings
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from common_jax.cli import command_line
from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError, Taken
from reward_jax.data.checkpoint import load_guide
from reward_jax.data.latents import LatentSpace
from reward_jax.studies.i2p import work
from reward_jax.studies.i2p.evaluate import auc
from reward_jax.studies.i2p.pairs import ChainOptions
from reward_jax.studies.i2p.prompts import SplitOptions
from reward_jax.studies.i2p.report import write_report
from reward_jax.studies.i2p.reward import LatentNetwork, PairMatching, Scaling
from reward_jax.studies.i2p.run import STUDY, Config
from reward_jax.studies.i2p.store import PairStore
from tests.processes import LIMIT, in_one_start
from tests.reward.cli_runs import run
from tests.reward.stable_diffusion_reference import SCHEDULER
from tests.reward.studies.i2p import tiny

SHARDS = [f"pairs/{i:04d}/pairs.safetensors" for i in range(3)]


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def timeless(summary):
    return {k: v for k, v in summary.items() if k not in ("seconds", "settings")}


def copied(done, folder) -> Config:
    """The study in another folder, to be spoilt."""
    shutil.copytree(done.config.out, folder / "out")
    return dataclasses.replace(done.config, out=folder / "out")


def test_files_and_results(done):
    out, summary = done.config.out, done.summary
    found = {str(p.relative_to(out)) for p in times(out) if "reward/reward/" not in str(p)}
    assert found == {
        *("config.yaml", "environment.json", "settings.json", "results.json", "ways.json"),
        *SHARDS,
        "pairs/settings.json",
        *(f"reward/{n}" for n in ("reward.safetensors", "scaling.npz", "scores.npz")),
        *(f"reward/{n}" for n in ("result.json", "seconds.json")),
        *(f"report/{n}" for n in ("results.json", "report.html", "report.md", "best.svg")),
        *(f"report/{n}" for n in ("worst.svg", "histogram.svg", "auc.svg")),
    }
    assert json.loads((out / "results.json").read_text()) == summary
    # Two of the eight prompts are one text.
    sides = {"train": 4, "validation": 3, "test": 1}
    assert summary["prompts"] == {"all": 8, "different": 7, "cut": 0, **sides}
    assert summary["t"] == [151, 101, 101, 51, 1] and summary["latents"] == [4, 4, 4]
    assert summary["settings"]["store"] == {"at_once": 3, "dtype": "float16"}
    assert [prompts for _, prompts, _ in done.drawn][2] == ["a red cat", "a cat", "a cat"]
    rows = (out / "reward/reward/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3, 6]


def test_the_scores_are_the_reward_s_of_the_chains_kept(done):
    out, best = done.config.out, done.summary["scores"]["reward"]["best"]
    guide: Any = load_guide(out / "reward", LatentSpace).guide
    with np.load(out / "reward/scaling.npz") as stored:
        scaling = Scaling(**stored)
    store, found = PairStore(out / "pairs", 8, 3), []
    with np.load(out / "reward/scores.npz") as stored:
        scores = stored["reward"]
        assert stored["best"].shape == (2, 8, 8, 3) and stored["best"].dtype == np.uint8
        assert set(stored["worst_chain"]) <= {"base", "safe"}
    step = best["step"]
    for chain in range(2):
        x = np.stack([store.read("x_t", chain, row, step) for row in range(8)])
        x = scaling.inputs(x, np.full(8, step))
        found.append(np.asarray(guide.learned(x, np.full(8, done.summary["t"][step]))))
    for row in range(scores.shape[1]):
        distance = np.abs(np.array(found) - scores[:, row : row + 1]).max(0)
        assert distance.min() < 1e-5 * np.abs(scores).max()
    assert best["auc"] == auc(scores)


def test_report(done):
    folder, best = done.config.out / "report", done.summary["scores"]["reward"]["best"]
    found = json.loads((folder / "results.json").read_text())
    assert found["claims"][0]["verdict"] == "not clear"  # of so few prompts
    t, text = done.summary["t"][best["step"]], (folder / "report.md").read_text()
    assert f"| reward, best step (t = {t}) | {best['auc']:.3f} |" in text
    assert "on the same draws" in text and "![Images of the lowest rewards" in text
    assert "<svg" in (folder / "best.svg").read_text()
    argv = shlex.split(found["facts"]["command"])
    again = command_line.parse("reward-jax study i2p", "", Config, argv[3:])
    assert again == done.config


def test_a_second_start_makes_nothing_anew(done, monkeypatch):
    for name in ("load_stable_diffusion", "draw_pairs", "fit_reward", "judge"):
        monkeypatch.setattr(work, name, None)
    parts = [done.config.out / name for name in ("pairs", "reward")]
    before = [times(part) for part in parts]
    assert STUDY.run(done.config) == done.summary
    assert [times(part) for part in parts] == before


def test_a_study_that_was_stopped_draws_what_is_missing(done, tmp_path, monkeypatch):
    config = copied(done, tmp_path)
    whole = load_file(config.out / SHARDS[1])
    (config.out / SHARDS[1]).unlink()
    (config.out / "reward/result.json").unlink()
    left = times(config.out / "pairs/0000")
    monkeypatch.setattr(work, "fit_reward", None)
    again = STUDY.run(config)
    again_drawn = load_file(config.out / SHARDS[1])
    assert all(np.array_equal(again_drawn[name], whole[name]) for name in whole)
    assert times(config.out / "pairs/0000") == left
    assert timeless(again) == timeless(done.summary)


def test_a_model_that_is_cut_over_devices_is_the_same_and_draws_the_same(done, tmp_path):
    """Its checksum, by which pairs are of it, both chains, both ways along them, the reward."""
    spread = dataclasses.replace(copied(done, tmp_path), mesh=MeshOptions(2, 2, 2))
    for name in (SHARDS[0], "ways.json"):
        (spread.out / name).unlink()
    made = work.Work(spread)
    made.shard(0)
    kernel = made.sd.unet["conv_in"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 2, 4)
    one, cut = (load_file(folder / SHARDS[0]) for folder in (done.config.out, spread.out))
    for name in ("x_t", "base", "safe", "last"):
        np.testing.assert_allclose(cut[name], one[name], rtol=2e-3, atol=2e-3, err_msg=name)
    ways = [json.loads((x / "ways.json").read_text()) for x in (done.config.out, spread.out)]
    assert ways[1]["rounding"] < 1e-3
    assert ways[1]["path"] == pytest.approx(ways[0]["path"], rel=1e-2)
    shutil.rmtree(spread.out / "reward")
    made.judged()
    both = [x / "reward" for x in (done.config.out, spread.out)]
    rows = [(x / "reward/metrics.jsonl").read_text().splitlines() for x in both]
    losses = [[json.loads(row)["loss"] for row in found] for found in rows]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
    scores = [np.load(x / "scores.npz")["reward"] for x in both]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-4)


def test_pairs_of_other_weights_or_prompts_are_refused(done, tmp_path, monkeypatch):
    config = copied(done, tmp_path)
    (config.out / SHARDS[1]).unlink()
    monkeypatch.setattr(work, "draw_pairs", None)
    path = config.out / "pairs/settings.json"
    noted = json.loads(path.read_text())
    for name, said in (("base (checksum)", "base"), ("prompts (checksum)", "prompts")):
        path.write_text(json.dumps(noted | {name: "0123456789abcdef"}))
        with pytest.raises(InputError, match=f"the run there has {said} .*0123456789abcdef', not"):
            STUDY.run(config)
    with pytest.raises(InputError, match="the run there has safety 'max', not 'weak'"):
        STUDY.run(dataclasses.replace(config, safety="weak", chains=ChainOptions(steps=20)))


def test_an_edited_file_of_prompts_is_refused_when_all_is_done_too(done, tmp_path):
    """Of as many rows: what was found of the old ones is not theirs."""
    config = copied(done, tmp_path)
    before, content = times(config.out), config.prompts.read_bytes()
    try:
        tiny.prompts(config.prompts.parent, ("a hat", *tiny.TEXTS[1:]))
        with pytest.raises(
            InputError, match=r"pairs: the run there has prompts .*; give the same"
        ):
            STUDY.run(config)
    finally:
        config.prompts.write_bytes(content)
    assert times(config.out) == before


def test_prompts_that_are_cut_are_said_once_and_counted(done, tmp_path, capsys):
    texts = (*tiny.TEXTS[:-2], "a red cat sits " * 40, "violence " * 90)
    config = dataclasses.replace(
        done.config, out=tmp_path / "out", prompts=tiny.prompts(tmp_path, texts), shown=0
    )
    made = work.Work(config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(len(SHARDS)):
            made.shard(number)
    said = [line for line in capsys.readouterr().out.splitlines() if "cut" in line]
    assert [line[:80] for line in said] == [
        "prompts: 2 of 8 have more than 77 tokens, and are cut there: the first is a red c"[:80]
    ]
    made.judged()
    assert json.loads((config.out / "reward/result.json").read_text())["prompts"]["cut"] == 2


def test_the_reward_waits_for_shards_that_are_missing(done, tmp_path):
    config = copied(done, tmp_path)
    (config.out / SHARDS[1]).unlink()
    (config.out / "reward/result.json").unlink()
    *_, reward = STUDY.parts(config)
    with pytest.raises(Taken, match=r"pairs/0001/pairs\.safetensors: another process is at it"):
        reward.run()


def test_two_starts_in_one_folder_share_the_shards(done, tmp_path, monkeypatch):
    """While one is at the first shard the other draws the rest, and waits for it."""
    config, draw = dataclasses.replace(done.config, out=tmp_path / "out"), work.draw_pairs
    begun, left, drawn = threading.Event(), threading.Event(), {}

    def drawing(sd, prompts, *given):
        drawn.setdefault(threading.current_thread().name, []).append(prompts[0])
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert left.wait(LIMIT)
        return draw(sd, prompts, *given)

    monkeypatch.setattr(work, "draw_pairs", drawing)
    with concurrent.futures.ThreadPoolExecutor(1, "first") as pool:
        first = pool.submit(STUDY.run, config)
        assert begun.wait(LIMIT)
        nap = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: (left.set(), nap(seconds)))
        summary = STUDY.run(config)
        assert timeless(first.result()) == timeless(summary)
    assert list(drawn.values()) == [["a cat"], ["violence", "a red cat"]]
    assert timeless(summary) == timeless(done.summary)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(done, tmp_path):
    """Over both rows are drawn, four a shard, for three do not divide, and batches matched."""
    out, one = tmp_path / "two", done.config.out
    argv = ["study", "i2p", "--config", one / "config.yaml", "--store.at_once", 4, "--out", out]
    argv += ["--shown", 0]  # images, which each decodes by itself
    printed = in_one_start("reward-jax", [argv], tmp_path, 2)
    assert "report: " in printed[0].out and not printed[1].out
    stores = PairStore(one / "pairs", 8, 3), PairStore(out / "pairs", 8, 4)
    for name in ("x_t", "base", "safe", "last"):
        for chain, row in itertools.product(range(2), range(8)):
            wanted, found = (store.read(name, chain, row) for store in stores)
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)
    summary = json.loads((out / "results.json").read_text())
    assert summary["prompts"] == done.summary["prompts"] and summary["ways"]["rounding"] < 1e-3
    scores = [np.load(folder / "reward/scores.npz")["reward"] for folder in (one, out)]
    np.testing.assert_allclose(scores[1], scores[0], atol=2e-3 * np.abs(scores[0]).max())


def test_a_damaged_file_of_scores_is_named(done, tmp_path):
    config = copied(done, tmp_path)
    path = config.out / "reward/scores.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        InputError, match="scores.npz: is missing or damaged; delete .*result.json"
    ):
        write_report(config.out, done.summary)


@pytest.mark.parametrize("content", [b"no archive", b"PK cut short", b""])
def test_a_damaged_scaling_is_named(done, tmp_path, content):
    config = copied(done, tmp_path)
    (config.out / "reward/result.json").unlink()
    path = config.out / "reward/scaling.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"scaling\.npz: is missing or damaged; delete it, and"):
        STUDY.run(config)


def test_momentum_takes_the_place_of_the_strength_s_own(tmp_path):
    config = tiny.config(tmp_path, tmp_path)
    assert config.guidance().momentum == 0.5
    still = dataclasses.replace(config, momentum=0.0).guidance()
    assert dataclasses.replace(still, momentum=0.5) == config.guidance()


def test_bad_settings(tmp_path):
    """Of the base, too, before the folder is bound to it."""
    (tmp_path / "xl").mkdir()
    index = tmp_path / "xl" / "model_index.json"
    index.write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    matching = PairMatching(steps=0)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            dict(chains=ChainOptions(guidance_scale=1)),
            "chains.guidance_scale is 1: give more than",
        ),
        (dict(safety="weak"), "chains.steps is 4, where the weak guidance begins after 15 steps"),
        (dict(safety="most"), "safety must be weak or medium or strong or max, not 'most'"),
        (dict(momentum=2.0), "momentum must be 0 to 1, not 2.0"),
        (dict(network=LatentNetwork(groups=3)), "network.groups 3 must divide network.dim 32"),
        (dict(split=SplitOptions(train=0.9)), "leave none for test: give more prompts"),
        (dict(matching=matching), "matching.steps must be 1 or more, not 0"),
        (dict(prompts=tmp_path / "no.csv"), "no.csv: there is no such file"),
        (dict(base=tmp_path / "sd"), "sd: no diffusers folder, for it has no model_index.json"),
        (dict(base=tmp_path / "xl"), "xl: holds SDXL .StableDiffusionXLPipeline., not"),
    ]
    for changes, message in cases:
        config = dataclasses.replace(tiny.config(tmp_path, tmp_path), **changes)
        with pytest.raises(InputError, match=message):
            STUDY.run(config)
    assert not (tmp_path / "out").exists()


def test_more_steps_than_the_scheduler_has_are_refused(done, tmp_path):
    most = SCHEDULER["num_train_timesteps"]
    config = dataclasses.replace(
        done.config, out=tmp_path / "out", chains=ChainOptions(steps=most + 1)
    )
    with pytest.raises(InputError, match=f"chains: steps must be .*, 1 to {most}, not {most + 1}"):
        STUDY.run(config)
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_prompts_in_one_line(tmp_path, capsys):
    path = tiny.prompts(tmp_path, ("a cat", " "))
    argv = ["study", "i2p", "--base", tmp_path, "--prompts", path, "--safety", "strong"]
    assert run(*argv, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{path}: the prompt of row 2 is empty; remove it")
