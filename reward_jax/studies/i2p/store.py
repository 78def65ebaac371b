"""Pairs on disk, in shards of a few prompts each; written whole, read a row at a time.

    FOLDER/0007/pairs.safetensors     x_t, base, safe [2, n, S, h, w, C] and last [2, n, h, w, C],
                                      in 16 bits; t [S]; in its header dtype and prompts

A row is a prompt with one noise. What is not read stays on disk.

Legend: R rows, n rows of a shard, S evaluations of the model in a chain, h, w, C of latents.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common_jax.distributed import by_first
from common_jax.errors import InputError
from common_jax.io.files import atomic, make_folder
from reward_jax.studies.i2p.pairs import CHAINS, Pairs

__all__ = ["Half", "PairStore"]

Half = Literal["float16", "bfloat16"]
_FORMAT = "pairs 1"


@dataclasses.dataclass(frozen=True)
class PairStore:
    """Where the pairs of R rows are, `at_once` rows a shard. dtype: of numbers on disk."""

    folder: pathlib.Path
    rows: int
    at_once: int
    dtype: Half = "float16"

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.rows // self.at_once)

    def path(self, shard: int) -> pathlib.Path:
        """The file of a shard."""
        return self.folder / f"{shard:04d}" / "pairs.safetensors"

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.at_once, min((shard + 1) * self.at_once, self.rows))

    def missing(self) -> list[int]:
        """Shards that are not there."""
        return by_first(lambda: [i for i in range(self.shards) if not self.path(i).exists()])

    def write(self, shard: int, pairs: Pairs, prompts: Sequence[str]) -> None:
        """Write a shard; prompts: its rows' texts.

        Raises InputError, naming the prompt, for numbers that are not finite, or too large for the
        dtype; and where the file cannot be written, as on a full disk.
        """
        whole, stored = pairs._asdict(), {"t": np.asarray(pairs.t, np.int32)}
        for name in ("x_t", "base", "safe", "last"):
            with np.errstate(over="ignore"):
                stored[name] = np.ascontiguousarray(whole[name].astype(jnp.dtype(self.dtype)))
            self._check(name, whole[name], stored[name], prompts)
        header = {"format": _FORMAT, "dtype": self.dtype, "prompts": json.dumps(list(prompts))}
        path = self.path(shard)
        make_folder(path.parent)
        atomic(path, lambda temporary: save_file(stored, temporary, header))
        _open.cache_clear()  # a file that was there before is another

    def _check(self, name: str, whole: Any, stored: Any, prompts: Sequence[str]) -> None:
        fine = np.isfinite(stored.astype(np.float32)).all(tuple(range(2, stored.ndim)))
        for chain, row in zip(*np.nonzero(~fine), strict=True):
            text = " ".join(str(prompts[int(row)]).split())[:80]
            what = f"prompt {text!r}: {name} of its {CHAINS[chain]} chain"
            if np.isfinite(whole[chain, row]).all():
                raise InputError(
                    f"{what} is too large for {self.dtype}: set store.dtype to bfloat16"
                )
            raise InputError(
                f"{what} holds NaN or infinity: leave the prompt out, or set dtype to float32"
            )

    def read(
        self, name: str, chain: int, row: int, step: int | None = None
    ) -> Float[np.ndarray, "..."]:
        """x_t, base or safe of a row's chain [S, h, w, C], or at one step, or last; float32.

        Raises InputError for a shard that is missing or damaged.
        """
        shard, at = divmod(row, self.at_once)
        path = self.path(shard)
        place: list[Any] = [slice(chain, chain + 1), slice(at, at + 1)]
        place += [] if step is None else [slice(step, step + 1)]
        try:
            found = _open(path).get_slice(name)[tuple(place)]
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None
        return found.astype(np.float32).reshape(found.shape[2 if step is None else 3 :])

    def steps(self) -> Int[np.ndarray, " S"]:
        """Diffusion steps of a chain, as they are walked."""
        path = self.path(0)
        try:
            return _open(path).get_tensor("t")
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None

    def check(self) -> None:
        """Raise InputError for a shard that is missing, damaged or of another size."""
        shape: list[int] = []
        for shard in range(self.shards):
            path = self.path(shard)
            try:
                file = _open(path)
                found = {name: file.get_slice(name).get_shape() for name in Pairs._fields}
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from None
            shape = shape or found["x_t"]
            wanted = [2, len(self.rows_of(shard)), *shape[2:]]
            three = {"x_t": wanted, "base": wanted, "safe": wanted}
            if found != three | {"last": wanted[:2] + wanted[3:], "t": wanted[2:3]}:
                raise _damaged(path, "shapes are others than those of shard 0")

    def sizes(self, rows: Iterable[int]) -> Float[np.ndarray, "2 R S"]:
        """Root mean square of eps_safe - eps_base, of both chains of some rows at each step."""
        found = [
            [
                np.sqrt(
                    np.mean((self.read("safe", c, r) - self.read("base", c, r)) ** 2, (1, 2, 3))
                )
                for r in rows
            ]
            for c in range(2)
        ]
        return np.array(found)


@functools.lru_cache(maxsize=512)  # shards that are open at once: pages are read when asked for
def _open(path: pathlib.Path) -> Any:
    return safe_open(path, "numpy").__enter__()


def _damaged(path: pathlib.Path, error: Any) -> InputError:
    said = " ".join(str(error).split())[:100]
    return InputError(f"{path}: is missing or damaged ({said}); delete it, and it is made again")
