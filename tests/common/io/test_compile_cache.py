"""Compiled programs outlive the process, in a folder that nobody else can write to."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from common_jax.io import compile_cache

CACHE = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
CACHE += ("jax_persistent_cache_min_entry_size_bytes",)


@pytest.fixture(autouse=True)
def _settings(monkeypatch):
    """This process's own cache settings come back, and JAX opens what is set anew."""
    before = {name: jax.config.values[name] for name in CACHE}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def chosen() -> str | None:
    return jax.config.values["jax_compilation_cache_dir"]


def test_programs_are_kept_and_read(tmp_path):
    folder = tmp_path / "deep" / "compiled"
    assert compile_cache.enable(folder) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    hits = []

    def listen(event: str, **_: object) -> None:
        hits.append(event)

    jax.monitoring.register_event_listener(listen)
    for _ in range(2):
        jax.clear_caches()
        result = jax.jit(lambda x: jnp.cos(x) * 7)(np.arange(3, dtype=np.float32))
        np.testing.assert_allclose(result, 7 * np.cos(np.arange(3)), rtol=1e-6)
    jax.monitoring.unregister_event_listener(listen)
    assert [p for p in folder.iterdir() if p.name.endswith("-cache")]
    assert "/jax/compilation_cache/cache_hits" in hits
    assert compile_cache.enable(folder) == folder  # what it holds is the user's own


def test_where_it_is_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache.enable() == tmp_path / "tuco-reward-jax" / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "other"))
    assert compile_cache.enable() == tmp_path / "other" == pathlib.Path(chosen() or "")


@pytest.mark.parametrize("mode", [0o777, 0o722, 0o702, 0o720])
@pytest.mark.parametrize("which", ["itself", "above"])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path, monkeypatch, mode, which):
    monkeypatch.setattr("grp.getgrgid", lambda gid: _group(gid, "staff"))
    folder = tmp_path / "above" / "itself"
    folder.mkdir(parents=True)
    (tmp_path / "above" if which == "above" else folder).chmod(mode)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    jax.config.update("jax_compilation_cache_dir", str(folder))  # as JAX itself has read it
    assert compile_cache.enable() is None and chosen() is None
    assert not any(folder.iterdir())


def test_a_link_is_followed_and_what_it_leads_to_is_checked(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "own").mkdir(0o700)
    for name in ("open", "own"):
        (tmp_path / f"to-{name}").symlink_to(tmp_path / name)
    assert compile_cache.enable(tmp_path / "to-open") is None
    assert compile_cache.enable(tmp_path / "to-own") == tmp_path / "own"
    assert chosen() == str(tmp_path / "own")


def test_sticky_folders_above_and_a_group_of_ones_own_are_no_others(tmp_path, monkeypatch):
    above = tmp_path / "above"
    above.mkdir()
    above.chmod(0o1777)
    assert compile_cache.enable(above / "itself") == above / "itself"
    user = compile_cache.pwd.getpwuid(os.geteuid()).pw_name
    (above / "itself").chmod(0o770)
    os.chown(above / "itself", -1, compile_cache.pwd.getpwuid(os.geteuid()).pw_gid)
    monkeypatch.setattr("grp.getgrgid", lambda gid: _group(gid, user))
    assert compile_cache.enable(above / "itself") == above / "itself"
    monkeypatch.setattr("grp.getgrgid", lambda gid: _group(gid, user, "somebody"))
    assert compile_cache.enable(above / "itself") is None


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert compile_cache.enable(tmp_path) is None and chosen() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(tmp_path):
    (tmp_path / "planted").write_bytes(b"")
    assert compile_cache.enable(tmp_path) == tmp_path
    os.chown(tmp_path / "planted", 65534, -1)
    assert compile_cache.enable(tmp_path) is None and chosen() is None


def test_no_folder_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert compile_cache.enable(tmp_path / "file") is None
    assert compile_cache.enable(tmp_path / "file" / "below") is None
    assert chosen() is None


def test_a_bucket_is_jaxs_own_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled")
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    assert compile_cache.enable() is None and chosen() == "gs://bucket/compiled"
    assert not any(tmp_path.iterdir())


def _group(gid: int, name: str, *members: str):
    return compile_cache.grp.struct_group((name, "x", gid, list(members)))


CUT = """
import pathlib, sys
import jax, jax.numpy as jnp
from common_jax.io import compile_cache
folder = compile_cache.enable(sys.argv[1])
print(float(jax.jit(lambda x: jnp.sin(x) + 2)(0.0)))
for path in pathlib.Path(folder).glob("*-cache"):
    path.write_bytes(path.read_bytes()[:20])
    print("cut")
"""


def test_an_entry_that_a_full_disk_cut_short_says_nothing(tmp_path):
    """The program is compiled; JAX warned at every start."""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CUT, str(tmp_path / "c")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split()[0] == "2.0" and "cut" in done.stdout
        assert "persistent compilation cache" not in done.stderr
