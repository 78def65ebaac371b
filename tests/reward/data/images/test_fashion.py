"""Fashion-MNIST of a Debian package made here, which a stand-in for apt-get hands out."""

import gzip
import hashlib
import io
import os
import shutil
import tarfile

import numpy as np
import pytest

from common_jax.cli.command_line import run_alone
from common_jax.errors import InputError
from reward_jax.data.images import fashion
from reward_jax.data.images.pixels import Images

CONTENT = {name: f"<{name}>".encode() for name in fashion._FILES}


def package(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    made = b"!<arch>\n"
    for name, content in parts.items():
        head = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        made += head + content + b"\n" * (len(content) % 2)
    return made


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A function that gives a stand-in for apt-get a package; it answers to the second asking.

    It knows none until its lists were read anew.
    """
    known = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    monkeypatch.setattr(fashion, "_FILES", known)
    monkeypatch.setattr(fashion, "_INSTALLED", tmp_path / "none")
    monkeypatch.setenv("TUCO_REWARD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def sell(content: bytes) -> None:
        (tmp_path / "it").write_bytes(content)
        program = tmp_path / "bin" / "apt-get"
        program.write_text(
            f'#!/bin/sh\ncase "$*" in *update) touch {tmp_path}/updated;; *)\n'
            f"test -e {tmp_path}/updated || {{ echo 'E: Unable to locate' >&2; exit 100; }}\n"
            f"cp {tmp_path}/it ./{fashion.PACKAGE}_1_all.deb;; esac\n"
        )
        program.chmod(0o755)

    return sell


def test_fetched_once(shop, tmp_path):
    shop(package(CONTENT | {"other.txt": b"odd"}))
    folder = fashion.fetch()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == CONTENT
    (tmp_path / "bin" / "apt-get").unlink()
    assert fashion.fetch() == folder
    assert [p.name for p in folder.parent.iterdir()] == ["fashion-mnist"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no package", "is no Debian package with data"),
        (package(CONTENT)[:-200], "cannot be unpacked"),
        (package({}), "train-images-idx3-ubyte.gz is missing"),
        (package(dict.fromkeys(CONTENT, b"odd")), "has sha256 [0-9a-f]{64}, not [0-9a-f]{64}"),
    ],
    ids=["none", "cut", "empty", "other"],
)
def test_what_cannot_be_trusted_leaves_nothing(shop, tmp_path, content, message):
    shop(content)
    with pytest.raises(InputError, match=message) as error:
        fashion.fetch()
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_apt_or_a_network(shop, tmp_path, monkeypatch):
    shop(b"")
    (tmp_path / "bin" / "apt-get").write_text("#!/bin/sh\necho 'E: no network' >&2; exit 100\n")
    with pytest.raises(InputError, match=r"cannot download .*\(E: no network\); check the netw"):
        fashion.fetch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="there is no apt-get here: .* name their folder as data"):
        fashion.fetch()


def test_a_package_that_is_installed_is_taken(shop, tmp_path, monkeypatch):
    (tmp_path / "usr").mkdir()
    for name, content in CONTENT.items():
        (tmp_path / "usr" / name).write_bytes(content)
    monkeypatch.setattr(fashion, "_INSTALLED", tmp_path / "usr")
    assert fashion.fetch() == tmp_path / "usr"


def test_a_cache_that_cannot_be_written(shop, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TUCO_REWARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written .*; set TUCO_REWARD_CACHE"):
        fashion.fetch()


@pytest.fixture
def own(shop, tmp_path):
    """A folder of the user's, with the four files."""
    folder = tmp_path / "own"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    return folder


def fetch(*argv) -> int:
    return run_alone("fashion", fashion.FetchConfig, fashion.run, [str(one) for one in argv])


def test_files_of_the_user_are_copied(own, tmp_path, capsys):
    assert fetch("--data", own) == 0
    copied = tmp_path / "cache" / "fashion-mnist"
    assert capsys.readouterr().out == f"{copied}\n"
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == CONTENT
    shutil.rmtree(own)
    assert fashion.fetch() == copied


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file; name a folder that has train-images-idx3"),
        (b"x", "a file other than"),
    ],
)
def test_files_of_the_user_that_are_others_are_named(own, tmp_path, capsys, content, said):
    path = own / "t10k-labels-idx1-ubyte.gz"
    path.unlink() if content is None else path.write_bytes(content)
    assert fetch("--data", own) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: " in line and said in line
    assert not list((tmp_path / "cache").iterdir())


def test_classes_have_names_where_the_labels_are_known(monkeypatch):
    """Of other labels, as of MNIST's, they are numbers still."""
    train, test, other = (np.arange(n, dtype=np.int32) % 10 for n in (50, 20, 30))
    known = {hashlib.sha256(bytes(one.tolist())).hexdigest() for one in (train, test)}
    monkeypatch.setattr(fashion, "_LABELS", known)
    numbers = tuple(map(str, range(10)))

    def images(labels, classes=numbers):
        return Images(np.zeros((len(labels), 2, 2, 1), np.uint8), labels, classes, "here")

    for labels, names in (
        ((train, test), fashion.CLASSES),
        ((train, other), fashion.CLASSES),
        ((other, other), numbers),
    ):
        found = fashion.named(*map(images, labels))
        assert [one.classes for one in found] == [names, names]
        assert [one.labels is given for one, given in zip(found, labels, strict=True)] == [
            True
        ] * 2
    more = (*numbers, "10")
    assert fashion.named(images(train, more), images(test, more))[0].classes == more


@pytest.mark.skipif(not fashion._whole(fashion.cache() / "fashion-mnist"), reason="not fetched")
def test_the_labels_that_are_known_are_those_of_the_files():
    for part in ("train", "t10k"):
        path = fashion.cache() / "fashion-mnist" / f"{part}-labels-idx1-ubyte.gz"
        with gzip.open(path) as file:
            assert hashlib.sha256(file.read()[8:]).hexdigest() in fashion._LABELS
