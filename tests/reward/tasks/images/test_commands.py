"""Every command on images of 8 x 8, from IDX files to a report; what is refused is one line."""

import json

import numpy as np
import pytest
from PIL import Image

from reward_jax.data.checkpoint import load_guide, load_model
from reward_jax.data.images.pixels import ImageSpace
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.reward.relative import RelativeReward
from tests.reward.cli_runs import printed_by, run, save_all
from tests.reward.studies.images.sets import write_quarters

STEPS = ["--training.steps", 10, "--training.batch_size", 8, "--training.steps_per_call", 10]
STEPS += ["--training.ema.begin", 0, "--training.ema.every", 1]
SMALL = ["--unet_2d.dim", 8, "--unet_2d.multipliers", "[1]", "--diffusion_steps", 6, *STEPS]
MATCHING = ["--half_unet_2d.dim", 8, "--half_unet_2d.multipliers", "[1]", "--matching.steps", 10]
MATCHING += ["--matching.steps_per_call", 10, "--matching.batch_size", 8, "--matching.draws", 32]
MATCHING += ["--matching.seeds", 1, "--held_out", 0.2]
CLASSES = ["--images.classes", "[nw, ne, sw, se]"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, printed = tmp_path_factory.mktemp("images"), {}

    def go(name, *argv):
        printed[name] = printed_by(*argv)

    base, expert, reward = (folder / name for name in ("base", "expert", "reward"))
    data = ["--data", write_quarters(folder / "data")]
    lacking = ["--images.leave_out", "[se]"]  # as many are left: one program for base and expert
    go("train", "train", *data, *SMALL, *CLASSES, *lacking, "--out", base)
    go(
        "expert", "train", *data, *STEPS, "--init", base, "--images.leave_out", "[nw]",
        "--out", expert,
    )  # fmt: skip
    models = ["--base", base, "--expert", expert]
    both = [*data, "--expert_data", data[1]]
    go("extract", "extract", *models, *both, *MATCHING, "--out", reward)
    steered = ["--base", base, "--plans", 5]
    go("steer", "steer", *steered, "--reward", reward, "--out", folder / "steer")
    none = ["--guidance.scale", 0]
    go("raw", "steer", *steered, "--expert", expert, *none, "--out", folder / "raw")
    go(
        "report", "report", *models, "--reward", reward, *data, "--plans", 5,
        "--out", folder / "report",
    )  # fmt: skip
    return folder, printed


@pytest.mark.slow
def test_models_know_what_they_are_of(made):
    folder, printed = made
    base, expert = (load_model(folder / name, ImageSpace) for name in ("base", "expert"))
    assert base.space.shape == expert.space.shape == (8, 8, 1)
    assert base.space.about["task"] == "images" and base.space.about["goal"] == ["se"]
    assert base.space.about["classes"] == ["nw", "ne", "sw", "se"]
    assert expert.space.about["goal"] == ["nw"]
    assert base.denoiser.model == expert.denoiser.model and base.denoiser.model.dim == 8
    assert printed["train"] == f"denoiser: {folder / 'base' / 'denoiser.safetensors'}"
    guide = load_guide(folder / "reward", ImageSpace)
    assert isinstance(guide.guide, RelativeReward)
    assert guide.guide.reward == HalfUNet2D(1, 8, (1,))
    assert guide.space == expert.space and guide.schedule.steps == 6
    found = json.loads((folder / "reward" / "diagnostics.json").read_text())
    assert len(found["explained"]) == len(found["antisymmetric"]) == 6 and found["notes"] == []


@pytest.mark.slow
def test_samples_are_steered(made):
    folder, printed = made
    with np.load(folder / "steer" / "plans.npz") as arrays:
        steered, unsteered = arrays["plans"], arrays["unsteered"]
    assert steered.shape == unsteered.shape == (5, 8, 8, 1) and steered.dtype == np.uint8
    assert (steered != unsteered).any()
    with np.load(folder / "raw" / "plans.npz") as arrays:  # scale 0 is unguided, to the last bit
        np.testing.assert_array_equal(arrays["plans"], arrays["unsteered"])
        np.testing.assert_array_equal(arrays["unsteered"], unsteered)
    facts = json.loads((folder / "steer" / "steer.json").read_text())
    assert facts["goal"] == ["nw"] and facts["unsteered"]["saturated"] == pytest.approx(
        ((unsteered == 0) | (unsteered == 255)).mean()
    )
    with Image.open(folder / "steer" / "steer.png") as picture:
        assert picture.size[0] > 500
    assert "steered: 0." in printed["steer"] and "values at black or white" in printed["steer"]


@pytest.mark.slow
def test_a_report_of_images(made):
    folder, printed = made
    text = (folder / "report" / "report.html").read_text("utf-8")
    for part in (
        "Steered samples",
        "The reward of held-out images",
        "noised images",
        "8 x 8 x 1",
    ):
        assert part in text, part
    assert "trajector" not in text and "plans" not in text
    # base, expert, unsteered, steered, judged, loss, diagnostics
    assert text.count("data:image/svg+xml;base64,") == 7
    assert (
        "images of classes that the expert was tuned on without have the lower"
        in printed["report"]
    )


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Images in a folder, one of which cannot be read in another; episodes and their models."""
    folder = save_all(tmp_path_factory.mktemp("given"))
    write_quarters(folder / "idx", 16, 4)
    for name in ("good", "bad"):
        for one in ("a", "b"):
            (folder / name / one).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / name / one / "0.png")
    (folder / "bad" / "b" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "bad"], "b/0.png: cannot be read as an image"),
        (["--data", "missing"], "missing: no such file"),
        (["--data", "idx", "--images.size", 16], "IDX files are of one size, and grey: leave"),
        (["--data", "good", "--images.classes", "[a, b]"], "its folders are the classes: leave"),
        (["--data", "good", "--images.leave_out", "[c]"], "has no class 'c'; its classes are a,"),
        (["--data", "good", "--images.leave_out", "[a, b]"], "every image is of a class that is"),
        (["--data", "good", "--unet_2d.patch", 3], "unet_2d: "),
        (["--data", "good", "--horizon", 16], "horizon is of trajectories, and "),
        (
            ["--data", "data.hdf5", "--horizon", 8, "--unet_2d.dim", 16],
            "unet_2d is of images, and ",
        ),
        (["--data", "good", "--init", "base.safetensors"], "good: holds images, where episodes"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(given, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(given)
    assert run("train", *argv, "--out", "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("reward-jax: error: ") and said.count("\n") == 1 and message in said
    assert not (given / "out").exists()
