"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): fetched once, as Debian packages it.

The files are the authors' own, in Debian's `dataset-fashion-mnist`; apt fetches the package, from
wherever it fetches packages on this machine, and checks its signature. Nothing is installed, and
nobody need be root. Licence: NOTICE.

    python -m reward_jax.data.images.fashion [--data FOLDER]
"""

import dataclasses
import hashlib
import io
import lzma
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator

import numpy as np

from common_jax.distributed import by_first
from common_jax.errors import InputError
from common_jax.io.cache import cache
from reward_jax.data.images.pixels import Images

__all__ = ["CLASSES", "PACKAGE", "SHAPE", "FetchConfig", "fetch", "named", "run"]

PACKAGE = "dataset-fashion-mnist"
SHAPE = 28, 28, 1
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
_INSTALLED = pathlib.Path("/usr/share/datasets/fashion-mnist")  # where the package puts them
_FILES = {  # of each its sha256
    "train-images-idx3-ubyte.gz": (
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
    ),
    "train-labels-idx1-ubyte.gz": (
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
    ),
}
_LABELS = {  # sha256 of all labels, a byte each, of images to learn from and of the test
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
_ELSEWHERE = "or take the four files from elsewhere, and name their folder as data"


@dataclasses.dataclass(frozen=True)
class FetchConfig:
    """Fetch Fashion-MNIST into the cache, as Debian packages it, or take the files of a folder.

    Args:
        data: folder of the four files, as they are published; by default they are fetched.
    """

    data: pathlib.Path | None = None


def run(config: FetchConfig) -> None:
    """Fetch them, and print where they are."""
    print(fetch(config.data))


def fetch(data: pathlib.Path | None = None) -> pathlib.Path:
    """The folder of the four files; the first time apt downloads them (30 MB).

    Where the package is installed it is that folder. data: a folder of them, which are copied in
    place of that. Raises InputError, one line, where they cannot be fetched or written, or are not
    those that are known.
    """
    return pathlib.Path(by_first(lambda: _fetch(data)))


def named(train: Images, test: Images) -> tuple[Images, Images]:
    """Two sets with the names of the classes, where the labels of one are Fashion-MNIST's."""
    if len(train.classes) != len(CLASSES) or not {_digest(train), _digest(test)} & _LABELS:
        return train, test
    train, test = (dataclasses.replace(one, classes=CLASSES) for one in (train, test))
    return train, test


def _digest(images: Images) -> str:
    """Of all labels, which are fewer than 256."""
    return hashlib.sha256(images.known_labels().astype(np.uint8).tobytes()).hexdigest()


def _fetch(data: pathlib.Path | None) -> str:
    target = cache() / "fashion-mnist"
    for folder in (target, _INSTALLED):
        if _whole(folder):
            return str(folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fashion-mnist-", dir=target.parent) as scratch:
            made = pathlib.Path(scratch, "files")
            made.mkdir()
            if data is None:
                _unpack(_download(pathlib.Path(scratch)), made)
            else:
                _copy(data, made)
            if not _whole(target):  # another process may have been faster
                shutil.rmtree(target, ignore_errors=True)
                made.rename(target)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror}); set TUCO_REWARD_CACHE to a folder "
            "that can"
        ) from None
    return str(target)


def _copy(data: pathlib.Path, target: pathlib.Path) -> None:
    """The known files of a folder; InputError where one is missing, or another."""
    for name, known in _FILES.items():
        path = data / name
        if not path.is_file():
            raise InputError(f"{path}: no such file; name a folder that has {', '.join(_FILES)}")
        if (digest := _sha256(path)) != known:
            raise InputError(
                f"{path}: has sha256 {digest}, not {known}: a file other than the published one; "
                "name its folder as data of the study, if the study shall be of it"
            )
        shutil.copyfile(path, target / name)


def _whole(folder: pathlib.Path) -> bool:
    """Whether all files are there, and those that are known."""
    paths = {folder / name: known for name, known in _FILES.items()}
    return all(path.is_file() and _sha256(path) == known for path, known in paths.items())


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(scratch: pathlib.Path) -> pathlib.Path:
    """The package's file. Where apt does not know the package, it reads its lists anew, here."""
    print(f"Fetching Debian's {PACKAGE} into {cache()} (once)", file=sys.stderr, flush=True)
    if shutil.which("apt-get") is None:
        raise InputError(
            f"{PACKAGE} is Debian's, and there is no apt-get here: run this on Debian or Ubuntu, "
            f"{_ELSEWHERE}"
        )
    said = _apt(scratch, "download", PACKAGE)
    if not (found := list(scratch.glob("*.deb"))):
        for name in ("lists/partial", "cache/archives/partial"):
            (scratch / name).mkdir(parents=True)
        own = [
            f"-oDir::State::Lists={scratch / 'lists'}",
            f"-oDir::Cache={scratch / 'cache'}",
        ]
        said = _apt(scratch, *own, "update") or _apt(scratch, *own, "download", PACKAGE) or said
        found = list(scratch.glob("*.deb"))
    if len(found) != 1:
        raise InputError(
            f"apt-get cannot download {PACKAGE} ({said or 'no package came'}); check the network "
            f"and apt's sources, {_ELSEWHERE}"
        )
    return found[0]


def _apt(folder: pathlib.Path, *argv: str) -> str:
    """Run apt-get in a folder; what it says is wrong, or "" where all is well."""
    # Apt's own user cannot write into a folder of ours.
    quiet = ["-qq", "-oAPT::Sandbox::User=root", "-oAcquire::Retries=2"]
    run = subprocess.run(
        ["apt-get", *quiet, *argv], cwd=folder, capture_output=True, text=True, check=False
    )
    errors = [line for line in run.stderr.splitlines() if line.startswith("E:")]
    return (errors or ["it failed"])[0] if run.returncode else ""


def _unpack(package: pathlib.Path, target: pathlib.Path) -> None:
    """The known files of a Debian package; InputError where one is missing, or another."""
    data = [content for name, content in _members(package) if name.startswith("data.tar")]
    if not data:
        raise InputError(f"{package.name}: is no Debian package with data; {_ELSEWHERE}")
    found = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data[0])) as archive:
            for member in archive:
                name = pathlib.PurePosixPath(member.name).name
                if name in _FILES and member.isfile() and (file := archive.extractfile(member)):
                    found[name] = file.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{package.name}: cannot be unpacked ({reason}); try again") from error
    for name, known in _FILES.items():
        digest = hashlib.sha256(found.get(name, b"")).hexdigest()
        if digest != known:
            what = f"has sha256 {digest}, not {known}" if name in found else "is missing"
            raise InputError(
                f"{package.name}: {name} {what}: a package of other data; {_ELSEWHERE}"
            )
        (target / name).write_bytes(found[name])


def _members(package: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of an `ar` archive, which a Debian package is."""
    content = package.read_bytes()
    at = 8
    while content.startswith(b"!<arch>\n") and at + 60 <= len(content):
        head = content[at : at + 60]
        size = int(head[48:58]) if head[48:58].strip().isdigit() else 0
        yield head[:16].decode("ascii", "replace").strip(" /"), content[at + 60 : at + 60 + size]
        at += 60 + size + size % 2


if __name__ == "__main__":
    from common_jax.cli.command_line import run_alone

    sys.exit(run_alone("python -m reward_jax.data.images.fashion", FetchConfig, run))
