"""Programs kept by one process are read by the next, and only where everything fits."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.io import compile_cache
from tuco_jax.core import programs

traces = []


def scaled(factor: float, x: jax.Array, tree: dict) -> dict:
    traces.append(x.shape)
    return {"sum": x @ tree["y"] * factor, "x": x}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache of its own, and a new process's memory each time `restart` is called."""
    before = {name: jax.config.values[name] for name in jax.config.values if "cache" in name}
    assert compile_cache.enable(tmp_path) == tmp_path
    restart(monkeypatch)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def restart(monkeypatch) -> None:
    monkeypatch.setattr(programs, "_programs", {})
    programs._source.cache_clear()
    traces.clear()


def run(size: int = 5, factor: float = 3.0) -> np.ndarray:
    x = jnp.linspace(0, 1, size, dtype=jnp.float32)
    args = x, {"y": jnp.cos(x)}
    result = programs.program(functools.partial(scaled, factor), *args)(*args)
    np.testing.assert_array_equal(result["x"], x)
    return np.asarray(result["sum"])


def kept(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.program"))


def test_a_second_start_neither_traces_nor_differs(folder, monkeypatch):
    first = run()
    assert traces == [(5,)] and len(kept(folder)) == 1
    run()
    assert traces == [(5,)]  # held in memory
    restart(monkeypatch)
    np.testing.assert_array_equal(run(), first)
    assert traces == []


def test_other_shapes_constants_and_settings_are_other_programs(folder):
    run()
    run(size=6)
    run(factor=4.0)
    with jax.default_matmul_precision("highest"):
        run()
    assert traces == [(5,), (6,), (5,), (5,)] and len(kept(folder)) == 4


def test_changed_source_is_compiled_anew(folder, monkeypatch):
    run()
    restart(monkeypatch)
    monkeypatch.setattr(programs, "_source", lambda module: "changed")
    monkeypatch.setattr(programs._source, "cache_clear", lambda: None, raising=False)
    run()
    assert traces == [(5,)] and len(kept(folder)) == 2


def test_source_is_the_whole_package(tmp_path, monkeypatch):
    package = tmp_path / "somewhere"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep" / "a.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("somewhere")
    before = programs._source.__wrapped__("somewhere.deep.b")
    assert programs._source.__wrapped__("somewhere.deep.b") == before
    (package / "deep" / "a.py").write_text("x = 2\n")
    assert programs._source.__wrapped__("somewhere.deep.b") != before


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "unreadable"])
def test_damage_is_mended(folder, monkeypatch, damage):
    first = run()
    (path,) = kept(folder)
    content = path.read_bytes()
    if damage == "unreadable":
        path.unlink()
        path.mkdir()
    else:
        flipped = content[:500] + bytes([content[500] ^ 1]) + content[501:]
        path.write_bytes({"empty": b"", "cut": content[:-9], "flipped": flipped}[damage])
    restart(monkeypatch)
    np.testing.assert_array_equal(run(), first)
    assert traces == [(5,)]
    if damage != "unreadable":
        restart(monkeypatch)
        np.testing.assert_array_equal(run(), first)
        assert traces == []
    assert not [p for p in folder.iterdir() if p.suffix not in (".program", "")]


def test_jaxs_own_cache_does_not_stand_between(folder, monkeypatch):
    """What XLA has read from that cache it cannot write again; such programs are not kept."""
    x = jnp.linspace(0, 1, 5, dtype=jnp.float32)
    jax.jit(functools.partial(scaled, 3.0)).lower(x, {"y": jnp.cos(x)}).compile()
    jax.clear_caches()
    first = run()
    restart(monkeypatch)
    np.testing.assert_array_equal(run(), first)


def test_jaxs_settings_hold(folder, monkeypatch):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1000.0)
    run()
    assert traces == [(5,)] and not kept(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    restart(monkeypatch)
    run()
    assert traces == [(5,)] and not kept(folder)


def test_one_device_only():
    x = [jax.device_put(jnp.ones(3), device) for device in jax.devices()[:2]]
    with pytest.raises(ValueError, match="one device"):
        programs.program(scaled, *x)
