"""Work goes on alone, and under the settings that it began with."""

import contextlib
import json
import multiprocessing
import pathlib

import pytest

from common_jax import resume
from common_jax.errors import InputError

SETTINGS = {
    "data": pathlib.Path("rows.jsonl"),
    "seed": 0,
    "training": {"steps": 20, "betas": (0.9, 0.99)},
    "mesh": {"data": 1},
}


def changed(**settings):
    return SETTINGS | settings


def test_settings_are_kept_and_work_goes_on_under_them(tmp_path):
    folder = tmp_path / "runs" / "one"
    with resume.hold(folder, SETTINGS, free={"mesh"}):
        stored = json.loads((folder / "settings.json").read_text())
    assert stored == {
        "data": "rows.jsonl",
        "seed": 0,
        "training": {"steps": 20, "betas": [0.9, 0.99]},
    }
    before = (folder / "settings.json").stat().st_mtime_ns
    with resume.hold(folder, changed(mesh={"data": 8}), free={"mesh"}):
        pass
    assert [p.name for p in folder.iterdir()] == ["settings.json"]
    assert (folder / "settings.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (changed(seed=1), "seed 0, not 1"),
        (changed(data="other.jsonl"), "data 'rows.jsonl', not 'other.jsonl'"),
        (changed(training={"steps": 30, "betas": (0.9, 0.99)}), "training.steps 20, not 30"),
        (changed(training={"steps": 20, "betas": (0.9,)}), r"training.betas \[0.9, 0.99\], not"),
        (changed(training={"steps": 20}), "training.betas .* which is not given now"),
        (changed(mesh={}), "mesh.data 1, which is not given now"),
    ],
)
def test_other_settings_are_refused_by_name_with_nothing_written(tmp_path, other, difference):
    with resume.hold(tmp_path, SETTINGS):
        pass
    before = (tmp_path / "settings.json").read_bytes()
    line = f"the run there has {difference}.*; give the same settings, or name a new directory"
    for check in (resume.check, resume.hold):
        with pytest.raises(InputError, match=line) as error:
            with check(tmp_path, other) or contextlib.nullcontext():
                pytest.fail("held")
        assert str(error.value).startswith(f"{tmp_path}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]
    assert (tmp_path / "settings.json").read_bytes() == before


def test_an_option_that_is_newer_than_the_run_is_no_difference(tmp_path):
    with resume.hold(tmp_path, SETTINGS):
        pass
    newer = changed(remat=True, training={"steps": 20, "betas": (0.9, 0.99), "clip": 1.0})
    assert resume.difference(SETTINGS, newer) is None
    with resume.hold(tmp_path, newer):
        pass


def test_an_option_that_a_run_went_on_with_is_its_own(tmp_path):
    """Else a result would stand under another setting: the value that came first is kept."""
    for given in (SETTINGS, changed(ablations={"a": {"seed": 1}})):
        with resume.hold(tmp_path, given, free={"mesh"}):
            pass
    with resume.hold(tmp_path, SETTINGS):  # of a start that does not know it
        pass
    for other, difference in (
        ({"a": {"seed": 2}}, "ablations.a.seed 1, not 2"),
        ({"b": {"seed": 1}}, "ablations.a.seed 1, which is not given now"),
    ):
        with pytest.raises(InputError, match=f"the run there has {difference}"):
            resume.settle(tmp_path, changed(ablations=other))
    both = changed(ablations={"a": {"seed": 1}, "b": {"seed": 3}})
    resume.settle(tmp_path, both)
    stored = json.loads((tmp_path / "settings.json").read_text())
    assert stored == json.loads(json.dumps(both, default=str))


def test_names_whose_brackets_changed_are_not_added(tmp_path):
    begun = {"rows of tokens (their digest)": "aa"}
    resume.settle(tmp_path, begun)
    resume.settle(tmp_path, {"rows of tokens (their checksum)": "aa"})
    assert json.loads((tmp_path / "settings.json").read_text()) == begun


def test_a_name_is_the_same_however_its_brackets_explain_it():
    begun = {"steps": 3, "rows of tokens (their digest)": "aa"}
    same, other = ({"steps": 3, "rows of tokens (their checksum)": v} for v in ("aa", "bb"))
    assert resume.difference(begun, same) is None
    line = "rows of tokens (their checksum) 'aa', not 'bb'"
    assert resume.difference(begun, other) == line


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[]", b"\xff", "[" * 9000])
def test_damaged_settings_are_named(tmp_path, text):
    path = tmp_path / "settings.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match="settings.json: cannot be read, or is damaged; put the"):
        with resume.hold(tmp_path, SETTINGS):
            pytest.fail("held")


def _hold(folder: pathlib.Path, ready, leave) -> None:
    with resume.hold(folder, SETTINGS):
        ready.set()
        leave.wait(60)


def test_a_second_run_is_refused_until_the_first_has_ended_or_was_killed(tmp_path):
    context = multiprocessing.get_context("spawn")
    for end in ("leaves", "killed"):
        ready, leave = context.Event(), context.Event()
        first = context.Process(target=_hold, args=(tmp_path, ready, leave))
        first.start()
        try:
            assert ready.wait(60)
            with pytest.raises(InputError, match="another run is writing there; name another"):
                with resume.hold(tmp_path, SETTINGS):
                    pytest.fail("held twice")
            leave.set() if end == "leaves" else first.kill()
            first.join(60)
        finally:
            first.kill()  # and no event set: that would wait for the process that waited for it
            first.join()
        with resume.hold(tmp_path, SETTINGS):
            assert (tmp_path / ".lock").exists()
        assert not (tmp_path / ".lock").exists()


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, seen = tmp_path / "lock", []
    real = resume.fcntl.flock

    def flock(file, how):
        if not seen:  # its holder leaves between our opening and our locking
            path.unlink()
        seen.append(file)
        real(file, how)

    monkeypatch.setattr(resume.fcntl, "flock", flock)
    with resume.lock(path, "taken"):
        assert len(seen) == 2 and path.exists()
        with pytest.raises(InputError, match="taken"), resume.lock(path, "taken"):
            pytest.fail("held twice")
