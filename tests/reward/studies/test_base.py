"""The one way to run a study: refused before anything is written, in parts, and once."""

import dataclasses
import pathlib

import pytest

from common_jax import resume
from common_jax.cli.options import MeshOptions
from common_jax.errors import InputError
from reward_jax.studies.base import Part, Study


@dataclasses.dataclass
class Config:
    out: pathlib.Path
    size: int = 2
    names: tuple[str, ...] = ("a", "b")
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


def study(done: list[str]) -> Study[Config]:
    def check(config: Config) -> None:
        if config.size < 1:
            raise InputError("size must be 1 or more")

    def parts(config: Config):
        for name in config.names:
            yield Part(name, lambda name=name: done.append(name))

    return Study(Config, check, parts, lambda config: {"made": done}, free=("out", "names"))


def test_parts_are_done_in_order_and_settings_kept(tmp_path):
    done: list[str] = []
    one, out = study(done), tmp_path / "out"
    assert one.run(Config(out)) == {"made": ["a", "b"]}
    assert one.run(Config(out, names=("b",)))["made"] == ["a", "b", "b"]
    with pytest.raises(InputError, match="the run there has size 2, not 3; give the same"):
        one.run(Config(out, size=3))
    assert done == ["a", "b", "b"]


def test_what_is_refused_writes_nothing(tmp_path):
    with pytest.raises(InputError, match="size must be 1 or more"):
        study([]).run(Config(tmp_path / "out", size=0))
    assert not list(tmp_path.iterdir())


def test_a_mesh_that_cannot_be_is_refused_too(tmp_path):
    with pytest.raises(InputError, match="mesh 3000 x 1 x 1 .* wants 3000 devices"):
        study([]).run(Config(tmp_path / "out", mesh=MeshOptions(data=3000)))
    assert not list(tmp_path.iterdir())


def test_a_part_that_another_process_is_at_is_left_to_it(tmp_path, capsys):
    done: list[str] = []
    one, out = study(done), Config(tmp_path / "out", names=("a", "b", "c"))
    with resume.alone(tmp_path / "out" / "b"):
        (tmp_path / "out" / "config.yaml").touch()
        said = "another process is at b, all else is done; the same command"
        with pytest.raises(InputError, match=said):
            one.run(out)
    assert done == ["a", "c"] and "b: another process is at it" in capsys.readouterr().out
    assert one.run(out) == {"made": ["a", "c", "a", "b", "c"]}
