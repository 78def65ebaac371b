"""Policies that are learned: sbx-rl's learner, kept as ours, and the stages that are chosen."""

import errno
import json
import os
import signal
import sys
import tempfile

import jax
import numpy as np
import pytest

from common_jax.errors import InputError
from reward_jax.tasks.locomotion import learn
from reward_jax.tasks.locomotion.policies import Policy, read_policies
from tests.reward.cli_runs import run
from tests.reward.tasks.locomotion.conftest import another, random_policy


def evaluated(*returns):
    return {str(i): Policy((), {"return": r, "steps": i}) for i, r in enumerate(returns)}


def test_stages():
    found = learn.choose(evaluated(0, 10, 5, 20, 30, 45, 40, 90, 120, 110))
    assert {k: p.about["steps"] for k, p in found.items()} == {
        "early": 2, "late": 4, "medium": 6, "expert": 8,
    }  # fmt: skip
    # A leap to the best: what is nearest to a third of it is before it.
    found = learn.choose(evaluated(300, 500, 700, 400, 1200, 3300))
    assert [p.about["steps"] for p in found.values()] == [1, 2, 4, 5]
    for scores in ((0, 90, 80, 100), (0, 200, 80, 100)):
        found = learn.choose(evaluated(*scores))
        assert [p.about["steps"] for p in found.values()] == [0, 1, 2, 3]
    with pytest.raises(InputError, match="3 evaluations are too few"):
        learn.choose(evaluated(1, 2, 3))


def test_returns_are_those_of_the_environment():
    policy = random_policy("hopper", 3)
    found = learn.returns("hopper", policy, 3, seed=4)
    env = another("hopper")
    for total, seed in zip(found, np.random.SeedSequence(4).generate_state(3), strict=True):
        seen, _ = env.reset(seed=int(seed))
        expected, over = 0.0, False
        while not over:
            seen, reward, terminated, truncated, _ = env.step(policy.act(seen[None])[0])
            expected, over = expected + reward, terminated or truncated
        assert total == pytest.approx(expected, rel=1e-6)


@pytest.fixture
def lenient():
    """sbx-rl's own code promotes ranks and types."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on(tmp_path, capsys, lenient, monkeypatch):
    out, elsewhere = tmp_path / "run", tmp_path / "tmp"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    argv = ["policy", "--env", "Hopper-v5", "--out", out, "--hidden", "[8, 8]", "--begin", 50]
    argv += ["--evaluate_every", 100, "--evaluate_episodes", 2, "--save_every", 100]
    argv[-1] = 150  # no multiple of the evaluations': at the next one
    saved, save = [], learn._save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            learn, "_save", lambda one, out: saved.append(one.num_timesteps) or save(one, out)
        )
        assert run(*argv, "--steps", 300) == 2  # too few evaluations for stages: all is kept
    assert saved == [200, 300]
    assert "3 evaluations are too few for stages: give more steps" in capsys.readouterr().err
    assert run(*argv, "--steps", 500) == 2
    assert "holds a run already; go on with it by --resume" in capsys.readouterr().err
    assert run(*argv, "--steps", 500, "--resume", "true", "--batch_size", 9) == 2
    assert "batch_size 256, not 9" in capsys.readouterr().err
    assert run(*argv, "--steps", 500, "--resume", "true") == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [100, 200, 300, 400, 500]
    found = read_policies(out / "policies.safetensors", "hopper")
    assert list(found) == ["early", "late", "medium", "expert"]
    best = max(rows, key=lambda row: row["return"])
    assert f"expert: return {best['return']:.0f}" in printed
    assert found["expert"].about["steps"] == best["step"]
    # What is kept is the policy that was evaluated, but for float16.
    again = learn.returns("hopper", found["expert"], 2, seed=0).mean()
    assert again == pytest.approx(best["return"], rel=0.2)
    assert not list(elsewhere.glob("SB3*"))  # where the learner's own logger would be
    assert not list(out.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_told_to_end_is_saved(tmp_path, capsys, lenient):
    out = tmp_path / "run"
    argv = ["policy", "--env", "Hopper-v5", "--out", out, "--hidden", "[8, 8]", "--begin", 50]
    argv += ["--evaluate_every", 100, "--evaluate_episodes", 2, "--steps", 500]
    log = learn.Run.log

    def log_and_end(*args):
        log(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn.Run, "log", log_and_end)
        assert run(*argv) == 143
    said = "told to end (SIGTERM): step 150 is saved, from which the run goes on by --resume"
    assert said in capsys.readouterr().err
    assert run(*argv, "--resume", "true") == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [100, 200, 300, 400, 500]


def test_a_disk_that_is_full_leaves_nothing_in_part(tmp_path):
    """Neither file: what was saved before stays, and the rest is removed."""

    class Learner:
        def save(self, path):
            path.write_bytes(b"learner")

        def save_replay_buffer(self, path):
            path.write_bytes(b"a part")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "replay.pkl").write_bytes(b"before")
    with pytest.raises(InputError, match=r"replay.pkl: cannot be written.*No space left"):
        learn._save(Learner(), tmp_path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("replay.pkl", b"before")]


def test_what_cannot_be_learned(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert run("policy", "--env", "ant", "--out", out) == 2
    assert "'ant' is unknown: choose from halfcheetah, hopper" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sbx", None)
    assert run("policy", "--env", "hopper", "--out", out) == 2
    assert "sbx is not installed: install tuco-reward-jax[rl]" in capsys.readouterr().err
    assert not out.exists()


def test_a_learner_that_cannot_be_read(tmp_path):
    class Broken:
        class TQC:
            @staticmethod
            def load(path, env):
                raise EOFError

    (tmp_path / "learner.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="learner.zip and replay.pkl cannot be read .EOFError."):
        learn._learner(Broken, "hopper", learn.LearnOptions(env="hopper", out=tmp_path), tmp_path)
