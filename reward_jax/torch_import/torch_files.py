"""Tensors out of files that PyTorch wrote, without PyTorch, and without running what they hold.

A `.pt` file is a zip archive: `data.pkl`, a pickle that says how tensors lie in storages, and the
storages, each a file of plain numbers. A pickle may name any function for its reader to call. This
one knows four things: an ordered dictionary, a tensor, a parameter and a storage; what names
anything else is refused, by name, before anything of it runs. Numbers are read when asked for.

It is Python's own reader in Python, for the one in C gives no place to look at what a pickle asks
for: a memo of 2^29 entries, or a dictionary whose key is a tuple of tuples that takes years to
hash. No step of it costs more than the bytes that ask for it.
"""

import io
import math
import pathlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from common_jax.errors import InputError

__all__ = ["Tensor", "read_pt", "read_safetensors"]

_STORAGES: Mapping[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number that begins one
_LARGEST = 1 << 22  # bytes of a pickle without its storages: ten thousand tensors
_DIMENSIONS = 32
_ARGUMENTS = 16  # of a call
_PLAIN = (str, bytes, int, float, bool, type(None))  # of keys; cheap to hash and to print


class Tensor(Protocol):
    """A tensor in a file: shape and dtype at hand, numbers when asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, place: tuple[slice, ...] = ()) -> Shaped[np.ndarray, "..."]:
        """The numbers of a part, in the stored dtype; of safetensors no others are read.

        place: a slice along each axis; () for all. Raises InputError for a truncated or corrupt
        file.
        """
        ...


class _SafeTensor(NamedTuple):
    path: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, place: tuple[slice, ...] = ()) -> np.ndarray:
        try:
            with safe_open(self.path, "numpy") as file:
                return file.get_slice(self.name)[place] if place else file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise _corrupt(self.path, error) from None


def read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """Name -> tensor. InputError where the file is truncated, corrupt or of another dtype."""
    known = {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "I64": np.int64,
        "I32": np.int32,
    }
    found: dict[str, Tensor] = {}
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                part = file.get_slice(name)
                kind = part.get_dtype()
                if kind not in known:
                    raise InputError(
                        f"{path}: tensor {name} is stored as {kind}, which is not read"
                    )
                shape = tuple(part.get_shape())
                found[name] = _SafeTensor(path, name, shape, np.dtype(known[kind]))
    except (SafetensorError, OSError) as error:
        raise _corrupt(path, error) from None
    return found


class _Archive:
    """The zip archive of a checkpoint; storages are kept once read, for tensors share them."""

    def __init__(self, path: pathlib.Path, zipped: zipfile.ZipFile) -> None:
        self.path = path
        names = zipped.namelist()
        pickles = [n for n in names if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(pickles) != 1 or len(set(names)) != len(names):
            raise InputError(f"{path}: a zip archive, but none that torch.save has written")
        self.folder = pickles[0].removesuffix("data.pkl")
        if f"{self.folder}constants.pkl" in names:
            raise InputError(f"{path}: a TorchScript archive; save its state_dict() instead")
        self.entries = {entry.filename: entry for entry in zipped.infolist()}
        order = b"little"
        if f"{self.folder}byteorder" in self.entries:
            order = self.bytes("byteorder", 16)
        if order not in (b"little", b"big"):
            raise InputError(f"{path}: byte order {order.decode(errors='replace')!r} is unknown")
        self.swapped = order == b"big"
        self._kept: dict[str, np.ndarray] = {}
        # Tensors may share a storage, but no sound file unfolds to several times its size.
        self._left = 4 * path.stat().st_size + 2**20

    def bytes(self, name: str, largest: int) -> bytes:
        """One file of the archive, stored as it is: a compressed one could unfold without end."""
        entry = self.entries.get(self.folder + name)
        if entry is None:
            raise InputError(f"{self.path}: truncated or corrupt (no {name}); fetch it again")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > largest:
            raise InputError(f"{self.path}: {name} is not as torch.save writes it")
        try:
            with zipfile.ZipFile(self.path) as zipped:
                return zipped.read(entry)
        except (
            zipfile.BadZipFile,
            EOFError,
            OSError,
            RuntimeError,
            ValueError,
            zlib.error,
        ) as error:
            raise _corrupt(self.path, error) from None

    def spend(self, count: int) -> None:
        """Count bytes that are taken; InputError where they are many times those of the file."""
        self._left -= count
        if self._left < 0:
            raise InputError(
                f"{self.path}: its tensors are far larger than the file; it is corrupt, or made "
                "to fill memory: fetch it again"
            )

    def numbers(self, storage: "_Storage") -> np.ndarray:
        """[count] of a storage."""
        if storage.key not in self._kept:
            size = storage.count * storage.dtype.itemsize
            self.spend(size)
            data = self.bytes(f"data/{storage.key}", size)
            if len(data) != size:
                raise InputError(
                    f"{self.path}: storage {storage.key} has {len(data)} bytes, not {size}; "
                    "the file is corrupt: fetch it again"
                )
            self._kept[storage.key] = np.frombuffer(data, np.uint8)
        raw = self._kept[storage.key]
        if raw.size != storage.count * storage.dtype.itemsize:
            raise InputError(f"{self.path}: storage {storage.key} is named with two sizes")
        kind = storage.dtype
        if not self.swapped or kind.itemsize == 1:
            return raw.view(kind)
        return raw.reshape(-1, kind.itemsize)[:, ::-1].copy().view(kind)[:, 0]


# What a pickle is given has no attribute that it could set: it can be passed on, or called.


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    count: int


class _Kind(NamedTuple):
    dtype: np.dtype


class _View(NamedTuple):
    """A tensor: where it begins in its storage, and its strides, in numbers."""

    archive: _Archive
    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return self.storage.dtype

    def read(self, place: tuple[slice, ...] = ()) -> np.ndarray:
        if 0 in self.shape:
            try:
                return np.zeros(self.shape, self.dtype)[place or ...]
            except (ValueError, MemoryError) as error:
                raise _corrupt(self.archive.path, error) from None
        flat = self.archive.numbers(self.storage)
        self.archive.spend(math.prod(self.shape) * flat.itemsize)
        # The stride of an axis of length 1 may be any number, and is never used.
        apart = (s if n > 1 else 0 for s, n in zip(self.strides, self.shape, strict=True))
        bytes_apart = tuple(s * flat.itemsize for s in apart)
        view = np.lib.stride_tricks.as_strided(flat[self.start :], self.shape, bytes_apart)
        return np.ascontiguousarray(view).reshape(self.shape)[place or ...]


class _Dictionary(dict):
    """An ordered dictionary; what torch keeps beside its items is dropped."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if _plain(key) in self:
            raise pickle.UnpicklingError(f"{key!r} is there twice")
        super().__setitem__(key, value)

    def __setstate__(self, _: Any) -> None:
        pass


class _Call:
    """A function that a pickle may call."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"{name} of a function set")

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _plain(key: Any) -> Any:
    """A key as it is; UnpicklingError for one that could take for ever to hash."""
    parts = key if type(key) is tuple and len(key) <= _ARGUMENTS else (key,)
    if not all(type(part) in _PLAIN for part in parts):
        raise pickle.UnpicklingError(f"a {type(key).__name__} as the key of a dictionary")
    return key


def _dictionary(pairs: Any = ()) -> _Dictionary:
    if type(pairs) not in (list, tuple) or len(pairs) > _ARGUMENTS:  # items are set one by one
        raise pickle.UnpicklingError("an ordered dictionary of many pairs at once")
    found = _Dictionary()
    for key, value in pairs:
        found[key] = value
    return found


class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """Plain data, tensors and parameters."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(
        pickle._Unpickler.dispatch  # pyright: ignore[reportAttributeAccessIssue]
    )

    if TYPE_CHECKING:  # of the class that is derived from
        stack: list[Any]
        pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any, archive: _Archive) -> None:
        super().__init__(file)
        self._archive = archive

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError("items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain(key)] = value

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def _load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def _load_set(self) -> None:
        self.stack.append({_plain(item) for item in self.pop_mark()})

    def _load_additems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if not isinstance(target, set):
            raise pickle.UnpicklingError("entries of what is no set")
        target.update(map(_plain, items))

    def _load_reduce(self) -> None:
        given = self.stack.pop()
        called = self.stack[-1]
        if type(given) is not tuple or len(given) > _ARGUMENTS or not isinstance(called, _Call):
            raise pickle.UnpicklingError("a call that is none of a tensor's")
        self.stack[-1] = called(*given)

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("an instruction that torch.save does not use")

    dispatch[pickle.SETITEM[0]] = _load_setitem
    dispatch[pickle.SETITEMS[0]] = _load_setitems
    dispatch[pickle.DICT[0]] = _load_dict
    dispatch[pickle.FROZENSET[0]] = _load_set
    dispatch[pickle.ADDITEMS[0]] = _load_additems
    dispatch[pickle.REDUCE[0]] = _load_reduce
    for _code in (
        *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.PERSID),
        *(pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.INST, pickle.OBJ),
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4),
    ):
        dispatch[_code[0]] = _refuse
    del _code

    def find_class(self, module_name: str, global_name: str) -> Any:
        """What a pickle may name; anything else is refused."""
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return _Call(_dictionary)
        if (module_name, global_name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Call(self._tensor)
        if (module_name, global_name) == ("torch._utils", "_rebuild_parameter"):
            return _Call(lambda data, *_: data)
        if module_name == "torch" and global_name in _STORAGES:
            return _Kind(np.dtype(_STORAGES[global_name]))
        raise InputError(
            f"{self._archive.path}: refused, for it names {module_name}.{global_name}, which is "
            "no tensor; save the state_dict() of the model alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, of which the pickle holds the name alone."""
        if type(pid) is not tuple or len(pid) != 5:
            raise pickle.UnpicklingError("a storage that is none")
        tag, kind, key, _, count = pid
        if (
            not isinstance(tag, str)
            or tag != "storage"
            or not isinstance(kind, _Kind)
            or not isinstance(key, str)
        ):
            raise pickle.UnpicklingError("a storage that is none")
        return _Storage(key, kind.dtype, _natural(count))

    def _tensor(self, storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _View:
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        for sizes in (shape, strides):
            if not isinstance(sizes, tuple | list) or len(sizes) > _DIMENSIONS:
                raise pickle.UnpicklingError("a tensor without a shape, or of too many axes")
        shape, strides = tuple(map(_natural, shape)), tuple(map(_natural, strides))
        if len(shape) != len(strides):
            raise pickle.UnpicklingError("shape and strides of a tensor differ in length")
        last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        count = math.prod(shape)
        if count and (_natural(start) + last >= storage.count or count > storage.count):
            raise pickle.UnpicklingError("a tensor larger than its storage")
        return _View(self._archive, storage, _natural(start), shape, strides)


def _natural(number: Any) -> int:
    if type(number) is not int or not 0 <= number < 2**62:
        shown = number if type(number) in (int, float) else type(number).__name__
        raise pickle.UnpicklingError(f"{shown!s:.40} where a count belongs")
    return number


def read_pt(path: pathlib.Path) -> Any:
    """What torch.save wrote: dictionaries, numbers and strings, with each tensor a `Tensor`.

    Raises InputError that names the file: truncated or corrupt, in the format from before PyTorch
    1.6, or holding anything but data and tensors.
    """
    try:
        with open(path, "rb") as file:
            begins = file.read(len(_LEGACY))
        if begins == _LEGACY:
            raise InputError(
                f"{path}: in the format from before PyTorch 1.6; where PyTorch is, convert it: "
                "torch.save(torch.load(path, weights_only=True), new_path)"
            )
        if not begins.startswith(b"PK"):
            raise InputError(f"{path}: no checkpoint of PyTorch (it is no zip archive)")
        with zipfile.ZipFile(path) as zipped:
            archive = _Archive(path, zipped)
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError) as error:
        raise _corrupt(path, error) from None
    try:
        return _Unpickler(io.BytesIO(archive.bytes("data.pkl", _LARGEST)), archive).load()
    except (
        pickle.UnpicklingError,
        struct.error,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        TypeError,
        ValueError,
    ) as error:
        raise _corrupt(path, error) from None


def _corrupt(path: pathlib.Path, error: BaseException) -> InputError:
    lines = str(error).splitlines() or [type(error).__name__]
    return InputError(f"{path}: truncated or corrupt ({lines[0]:.200}); fetch the file again")
