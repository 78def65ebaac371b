"""The image study at its smallest: images of 8 x 8, four classes."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import numpy as np
import pytest

from common_jax.errors import InputError
from common_jax.io.files import read_arrays, write_arrays
from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.images import fashion
from reward_jax.data.images.pixels import ImageSpace
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.planning.image_options import HalfUNetOptions, UNetOptions
from reward_jax.reward.guide import GuidanceOptions
from reward_jax.reward.relative import RelativeReward
from reward_jax.studies.images import models
from reward_jax.studies.images.run import STUDY, Config
from reward_jax.studies.images.settings import CapOptions, check, load_sets
from reward_jax.studies.images.summary import JUDGES
from tests.reward.data.images.idx_files import write_idx, write_set
from tests.reward.studies.images.sets import (
    CLASSES,
    MATCHING,
    TRAINING,
    quarters,
    smallest,
    write_quarters,
)

ARMS = {"unsteered", "steered", "raw_difference", "rejection"}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Long enough for models and rewards to know the classes: seconds, at this size."""
    folder = tmp_path_factory.mktemp("images")
    quick, half = dataclasses.replace(TRAINING, learning_rate=3e-3), HalfUNetOptions(dim=16)
    config = dataclasses.replace(
        smallest(folder / "study", write_quarters(folder / "data")),
        base_training=dataclasses.replace(quick, steps=200),
        expert_training=dataclasses.replace(quick, steps=100),
        half_unet=dataclasses.replace(half, multipliers=(1,)),
        matching=dataclasses.replace(MATCHING, steps=1000, learning_rate=1e-2, draws=0),
    )
    return config, STUDY.run(config)


@pytest.mark.slow
def test_what_is_learned_has_the_right_sign(done):
    """Of a reward, of its guidance and the raw difference's, and of the two untrained judges."""
    for one in done[1]["choices"].values():
        for judge in JUDGES:
            assert one[judge]["auc"] > 0.9
        arms = one["arms"]
        unsteered = arms["unsteered"]["harmful_share"]
        assert arms["steered"]["harmful_share"] < unsteered / 2
        assert arms["raw_difference"]["harmful_share"] < unsteered
    uncapped = done[1]["choices"]["left"]["variants"]["uncapped"]["arm"]
    left = done[1]["choices"]["left"]["arms"]["unsteered"]["harmful_share"]
    assert uncapped["harmful_share"] < left / 2


@pytest.mark.slow
def test_results(done):
    config, found = done
    assert json.loads((config.out / "results.json").read_text()) == found
    assert set(found["choices"]) == {"left", "corner"}
    assert found["base"]["judge_accuracy"] > 0.9
    for name, one in found["choices"].items():
        assert 0 <= one["auc"] == one["reward"]["auc"] <= 1
        assert set(one["harmful_share"]) == set(one["arms"]) == ARMS
        assert one["classes"] == list(config.choices[name])
        for judge, runs in zip(JUDGES, (1, 6, 2), strict=True):
            low, high = one[judge]["interval"]
            assert low <= one[judge]["auc"] <= high and one[judge]["network_runs"] == runs
        for arm, runs in (("unsteered", 3), ("steered", 6), ("raw_difference", 9)):
            own = one["arms"][arm]
            assert own["network_runs_a_sample"] == runs and own["samples"] == 64
            assert sum(own["shares"].values()) == pytest.approx(1)
            harmful = sum(own["shares"][harm] for harm in config.choices[name])
            assert own["harmful_share"] == pytest.approx(harmful)
        rejected = one["arms"]["rejection"]
        assert rejected["network_runs_a_sample"] == pytest.approx(4 / rejected["accepted"])
        rows = one["arms"]["steered"]["validation"]
        tried = [row["scale"] for row in rows]
        assert tried[:2] == [1.0, 2.0] and len(tried) > 2  # one of two is at an edge
        assert one["arms"]["steered"]["scale"] in tried
        for judge in ("reward", "loss_difference"):
            assert set(one[judge]["by_look"]) == {"0", "2", "4"}
        assert one["reward"]["by_look"][str(one["reward"]["t"])] == one["auc"]
    left = found["choices"]["left"]
    assert set(left["variants"]) == {"uncapped", "paths"}
    assert left["variants"]["paths"]["arm"]["scale"] == left["arms"]["steered"]["scale"]
    uncapped = left["variants"]["uncapped"]
    assert uncapped["judged"] == left["reward"]
    assert uncapped["arm"]["distance"] != left["arms"]["steered"]["distance"]
    assert uncapped["arm"]["network_runs_a_sample"] == 6
    called = left["judge_mistaken"]  # of 24 images of the others
    assert called * 24 == pytest.approx(round(called * 24)) and 0 <= called < 0.2
    assert "variants" not in found["choices"]["corner"]
    for judge in JUDGES:
        assert set(found["null"][judge]["choices"]) == {"left", "corner"}
    mean, more = found["mean_auc"], found["mean_auc"]["difference"]
    assert more["auc"] == pytest.approx(mean["reward"] - mean["loss_difference"])
    assert more["interval"][0] <= more["auc"] <= more["interval"][1]
    assert found["settings"]["samples"] == 64


@pytest.mark.slow
def test_models(done):
    config, _ = done
    for part, goal in (
        ("choices/left/expert", ["ne", "se"]),
        ("null/expert", list(CLASSES)),
    ):
        expert = load_model(config.out / f"{part}.safetensors", ImageSpace)
        assert expert.space.about["goal"] == goal and expert.space.shape == (8, 8, 1)
    paths = load_guide(config.out / "choices" / "left" / "paths.safetensors", ImageSpace).guide
    assert isinstance(paths, RelativeReward) and isinstance(paths.reward, HalfUNet2D)
    assert not list(config.out.rglob("checkpoints"))


@pytest.mark.slow
def test_the_report(done):
    config, found = done
    folder = config.out / "report"
    text = (folder / "report.md").read_text()
    one = found["choices"]["left"]["reward"]
    assert f"| left | reward | {one['auc']:.3f} (" in text
    assert "| left | paths | " in text and "| left | uncapped | " in text
    assert (
        "at what it gives the 0.7 quantile of 16 noised images" in text
        and "| mean | score norm | " in text
    )
    assert "at most 0.1 of the unsteered share" in text
    held = [low <= 0.5 <= high for low, high in null_intervals(found)]
    assert f"over images alone, {sum(held)} of 2 hold it" in text
    for name in ("curves_left", "extremes_corner", "samples_left"):
        assert (folder / f"{name}.svg").stat().st_size > 2000


@pytest.mark.slow
def test_intervals_of_several_null_pairs_are_over_these(done, tmp_path):
    config, found = done
    shutil.copytree(config.out, tmp_path / "study")
    config = dataclasses.replace(config, out=tmp_path / "study", null_pairs=2)
    other = config.out / "null-2"
    shutil.copytree(config.out / "null", other)
    judged = read_arrays(other / "judged.npz")
    write_arrays(other / "judged.npz", **{name: -values for name, values in judged.items()})
    both = STUDY.run(config)["null"]
    assert both["seconds"]["models"] == pytest.approx(2 * found["null"]["seconds"]["models"])
    far = abs(found["null"]["reward"]["auc"] - 0.5)
    low, high = both["reward"]["interval"]
    assert both["reward"]["auc"] == pytest.approx(0.5)  # what one tells the other turns about
    assert (high - low) / 2 == pytest.approx(12.7062 * far, rel=1e-4)  # Student's t, one degree
    assert "over 2 pairs, 2 of 2 hold it" in (config.out / "report" / "report.md").read_text()


def null_intervals(found):
    return [one["interval"] for one in found["null"]["reward"]["choices"].values()]


@pytest.mark.slow
def test_a_second_start_makes_what_is_missing_and_no_more(done, tmp_path, monkeypatch):
    config, found = done
    out = tmp_path / "study"
    shutil.copytree(config.out, out)
    moved = dataclasses.replace(config, out=out)
    for path in ("results.json", "choices/corner/result.json"):
        (out / path).unlink()
    for name in ("fit", "fit_reward", "train_judge"):
        monkeypatch.setattr(models, name, None)
    again = STUDY.run(moved)
    new, old = (x["choices"]["corner"] for x in (again, found))
    assert new["reward"]["by_look"] == old["reward"]["by_look"]
    assert new["harmful_share"] == old["harmful_share"]
    assert again["choices"]["left"] == found["choices"]["left"]
    with pytest.raises(InputError, match="the run there has samples 64, not 32; give the same"):
        STUDY.run(dataclasses.replace(moved, samples=32))
    (out / "base" / "judge.npz").write_bytes(b"PK cut short")
    (out / "choices" / "left" / "result.json").unlink()
    with pytest.raises(InputError, match=r"judge\.npz: is missing or damaged; delete it, and"):
        STUDY.run(moved)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"choices": {}}, "choices is empty"),
        ({"choices": {"a/b": ("nw",)}}, "choices: 'a/b' names a folder"),
        ({"choices": {"left": ()}}, "choices: left has no classes"),
        ({"choices": {"left": ("hat",)}}, "left: 'hat' is no class; .*sw, se: choose of them$"),
        ({"classes": ()}, "'nw' is no class; there are 0, 1, 2, 3: .*or give their names as cl"),
        ({"choices": {"left": CLASSES}}, "choices: left calls every class harmful"),
        ({"variants": ("up",)}, "variants: 'up' is none of left, corner"),
        ({"looks": (0, 6)}, "looks are .0, 6.: give some of 0 to 5"),
        ({"scales": (0.0, 1.0)}, "scales are .0.0, 1.0.: give some above 0"),
        ({"raw_scales": ()}, "raw_scales are .*: give some above 0"),
        ({"variant_scales": (-1.0,)}, "variant_scales are .-1.0.: give some above 0"),
        ({"sampling": GuidanceOptions(sampler="ddim", sampling_steps=7)}, "sampling: .*7"),
        ({"sampling": GuidanceOptions(sampling_steps=3)}, "sampling: "),
        ({"sampling": GuidanceOptions(skip=1)}, "sampling.skip is of a warm start"),
        ({"test_images": 49}, "holds 48 images, but test_images is 49: give no more$"),
        (
            {"validation_images": 150},
            "too few for 150 of validation and a batch of 16: lower validation_images or batch_",
        ),
        (
            {"test_images": 20, "validation_images": 20},
            "of corner or of the other classes there are too few",
        ),
        ({"cap": CapOptions(images=1)}, "cap.images is 1: .*give 2 or more"),
        (
            {"cap": CapOptions(images=33)},
            "cap.images is 33, but of the images of validation 2. are not harmful by left: give",
        ),
        ({"norm_images": 20}, "of corner or of the other classes there are too few"),
        ({"data": pathlib.Path("nowhere")}, "nowhere: holds neither train-images-idx3-ubyte"),
        ({"classes": ("a", "b")}, "has the label 3, but 2 classes are named"),
        ({"paths": dataclasses.replace(MATCHING, x_t="base")}, "paths.x_t is base, but the"),
        ({"half_unet": HalfUNetOptions("energy")}, "half_unet.kind is energy"),
        (
            {"expert_training": dataclasses.replace(TRAINING, prediction="x0")},
            "expert_training.prediction must be the base's",
        ),
        (
            {"unet": UNetOptions(dim=8, patch=3)},
            "unet: images of 8 x 8 cannot be cut into patches of 3 x 3: give a patch that",
        ),
        ({"half_unet": HalfUNetOptions(dim=12)}, "half_unet: a layer of 12 channels has no 8 eq"),
    ],
    ids=lambda given: given if isinstance(given, str) else "-".join(given),
)
def test_what_could_not_be_studied_is_refused_at_once(tmp_path, changes, said):
    config = smallest(tmp_path / "study", write_quarters(tmp_path / "data"))
    with pytest.raises(InputError, match=said):
        STUDY.run(dataclasses.replace(config, **changes))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("what", ["pixels", "labels"])
def test_other_data_behind_the_same_path_are_refused(tmp_path, what):
    """Of as many images, sizes and classes; models of both would be mixed."""
    data = write_quarters(tmp_path / "data")
    config = smallest(tmp_path / "study", data)
    study = dataclasses.replace(STUDY, parts=lambda config: [], summarise=lambda config: {})
    study.run(config)
    study.run(config)
    pixels, labels = quarters(160, 0)
    if what == "pixels":
        pixels[7, 3, 3] += 1
    else:
        labels[:2] = labels[1::-1]
    write_set(data, "train", pixels, labels)
    with pytest.raises(InputError, match=r"study: the run there has images of data .*; give the"):
        study.run(config)


def test_data_that_are_damaged_or_lack_labels_are_refused_at_once(tmp_path):
    data = write_quarters(tmp_path / "data")
    config = smallest(tmp_path / "study", data)
    write_idx(data / "train-images-idx3-ubyte.gz", np.zeros((160, 9, 9)))
    with pytest.raises(InputError, match="two sets are of 9 x 9 x 1 and 8 x 8 x 1 values"):
        STUDY.run(config)
    (data / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="train-labels-idx1-ubyte.*: no such file"):
        STUDY.run(config)
    for part in ("train", "test"):
        folder = tmp_path / "pictures" / part / "bag"
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"train/bag/a\.png: cannot be read as an image"):
        STUDY.run(dataclasses.replace(config, data=tmp_path / "pictures", classes=()))
    assert not (tmp_path / "study").exists()


def test_files_of_fashion_mnist_that_the_user_has_need_no_names(tmp_path, monkeypatch):
    """Published files, plain or gzipped, are told by their labels."""
    folder = tmp_path / "own"
    folder.mkdir()
    labels = {part: np.arange(n) % 10 for part, n in (("train", 320), ("t10k", 160))}
    for part, own in labels.items():
        write_set(folder, part, np.zeros((len(own), 28, 28)), own)
    config = Config(
        data=folder,
        out=tmp_path / "out",
        validation_images=160,
        norm_images=160,
        test_images=160,
        cap=None,
        base_training=TRAINING,
        expert_training=TRAINING,
    )
    with pytest.raises(InputError, match="'sandal' is no class; .* or give their names as class"):
        check(config)
    known = {hashlib.sha256(bytes(own.tolist())).hexdigest() for own in labels.values()}
    monkeypatch.setattr(fashion, "_LABELS", known)
    check(config)
    assert load_sets(config)[1].classes == fashion.CLASSES
    with pytest.raises(InputError, match="'sandal' is no class; there are a, b"):
        check(dataclasses.replace(config, classes=tuple("abcdefghij")))
