import json
import os
import re
import stat

import pytest
import yaml
from tensorboardX.proto import event_pb2

from common_jax import resume
from common_jax import run as run_module
from common_jax.errors import InputError
from common_jax.machine import processor
from common_jax.run import Run, check_directory, check_run, held_run, made_by, read_metrics


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars(directory):
    """(step, name, value) of every TensorBoard event, read from the raw records."""
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + size])  # pyright: ignore[reportAttributeAccessIssue]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            data = data[16 + size :]
    return found


def test_settings_metrics_and_board(tmp_path):
    directory = tmp_path / "deep" / "run"
    with Run(directory, {"seed": 3, "mesh": {"data": 2}}) as run:
        run.log(1, {"loss": 0.5, "tuco/über": 0.25})
        assert rows(directory) == [{"step": 1, "loss": 0.5, "tuco/über": 0.25}]  # at once
        run.log(2, {"loss": 0.25})
    assert yaml.safe_load((directory / "config.yaml").read_text()) == {
        "seed": 3,
        "mesh": {"data": 2},
    }
    assert scalars(directory) == [
        (1, "loss", 0.5),
        (1, "tuco/über", 0.25),
        (2, "loss", 0.25),
    ]
    (start,) = json.loads((directory / "environment.json").read_text())
    assert start["versions"]["jax"] and start["devices"]
    assert start["matmul_precision"] == "float32"


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path):
    with Run(tmp_path, {}) as run:
        for step in range(1, 6):
            run.log(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a write
    with Run(tmp_path, {}, start=3) as run:
        run.log(4, {"loss": 40})
    assert [row["loss"] for row in rows(tmp_path)] == [1, 2, 3, 40]
    with Run(tmp_path, {}, start=0) as run:
        run.log(0, {"loss": 7})
    assert rows(tmp_path) == [{"step": 0, "loss": 7}]
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 3


def test_a_line_of_metrics_that_is_none_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for damage in ("\0\0\n", "[3]\n", '{"loss": 1}\n'):
        path.write_text('{"step": 1}\n' + damage + '{"step": 2}\n')
        with pytest.raises(InputError, match=r"metrics.jsonl:2: not a line of metrics; remove it"):
            Run(tmp_path, {}, start=2)
        assert path.read_text().count("\n") == 3


def test_an_environment_cut_short_does_not_stop_a_run(tmp_path):
    with Run(tmp_path, {}):
        pass
    path = tmp_path / "environment.json"
    path.write_text(path.read_text()[:40])
    with Run(tmp_path, {}, start=1):
        pass
    assert len(json.loads(path.read_text())) == 1


def test_results_name_all_that_made_them(tmp_path, monkeypatch):
    for revision in ("abc+", "def", "def"):
        monkeypatch.setattr(run_module, "_revision", lambda revision=revision: revision)
        with Run(tmp_path, {}):
            pass
    path = tmp_path / "environment.json"
    path.write_text(json.dumps([{"revision": None}, *json.loads(path.read_text())]))
    monkeypatch.setattr(run_module, "_revision", lambda: "the one that writes the report")
    found = made_by(tmp_path, "flax")
    assert found["revision"] == "not noted, abc+, def"
    assert found["processor"] == f"not noted, {processor()}"
    assert found["precision of products"] == "not noted, float32"
    assert re.fullmatch(r"jax [\d.]+, flax [\d.]+", found["versions"])
    assert made_by(tmp_path / "none")["revision"] == "the one that writes the report"


def test_revision_names_changed_files(tmp_path, monkeypatch):
    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        run_module.subprocess.run(["git", *author, "-C", str(tmp_path), *arguments], check=True)

    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "run.py"))
    assert run_module._revision() is None
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        git(*command)
    clean = run_module._revision()
    assert clean and len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert run_module._revision() == clean + "+"


def test_directories_that_will_not_do(tmp_path, monkeypatch):
    check_directory(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    check_directory(tmp_path / "new", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        check_directory(tmp_path / "file")
    with pytest.raises(InputError, match="file is a file"):
        check_directory(tmp_path / "file" / "run")
    with pytest.raises(InputError, match="not empty and holds no run"):
        check_directory(tmp_path, resume=True)
    with Run(tmp_path / "run", {}):
        pass
    with pytest.raises(InputError, match="holds a run already"):
        check_directory(tmp_path / "run")
    check_directory(tmp_path / "run", resume=True)
    for taken in ("new", "run"):
        with resume.alone(tmp_path / taken), pytest.raises(InputError, match="another run is"):
            check_directory(tmp_path / taken, resume=True)
    (tmp_path / "new" / ".lock").touch()  # left by a kill
    check_directory(tmp_path / "new")
    assert not any((tmp_path / "new").iterdir())
    # Root may write anywhere, so ask as somebody else would be answered.
    monkeypatch.setattr(
        os, "access", lambda path, mode: bool(os.stat(path).st_mode & stat.S_IWUSR)
    )
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="closed cannot be written to"):
        check_directory(tmp_path / "closed" / "run")


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, name, capfd):
    """/dev/full takes nothing: on logging, and again on closing."""
    with pytest.raises(InputError) as raised:
        with Run(tmp_path, {}) as run:
            if name == "metrics.jsonl":
                run._metrics = open("/dev/full", "w")
            else:
                run._board._writer._py_recordio_writer._writer = open("/dev/full", "wb")
            for step in range(3):
                run.log(step, {"loss": 1.0})
    said = str(raised.value)
    assert said.startswith(f"{tmp_path / name}: cannot be written: No space left on device; make")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("text", ["[" * 9000, '{"step": 1e999}', "[" * 500 + "]" * 500])
def test_a_line_that_is_made_to_break_the_reader(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text + "\n")
    with pytest.raises(InputError, match="metrics.jsonl:1: not a line of metrics"):
        read_metrics(tmp_path)


def test_results_of_a_command_are_of_one_start_at_a_time(tmp_path):
    out, config = tmp_path / "out", {"seed": 1, "out": "there", "mesh": {"data": 1}}
    with pytest.raises(KeyboardInterrupt), held_run(out, "steer", config):
        with pytest.raises(InputError, match="another run is writing there"):
            check_run(out, "steer", config)
        raise KeyboardInterrupt  # before there was any result
    assert sorted(p.name for p in out.iterdir()) == ["config.yaml", "environment.json"]
    with held_run(out, "sweep", config):
        (out / "sweep.json").write_text("[]")
    for name, given, message in (
        ("sweep", {"seed": 2}, "seed 1, not 2"),
        ("steer", {"seed": 1}, "command 'sweep', not 'steer'"),
    ):
        with pytest.raises(InputError, match=f"the run there has {message}"):
            check_run(out, name, given)
    with held_run(out, "sweep", config | {"out": "here", "mesh": {"data": 8}}):
        pass
    assert json.loads((out / "settings.json").read_text()) == {"command": "sweep", "seed": 1}
