"""What torch.save wrote is read as torch.load(weights_only=True) reads it; nothing is ever run."""

import io
import os
import pathlib
import pickle
import random
import zipfile
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file
from torch._utils import _rebuild_tensor_v2

from common_jax.errors import InputError
from reward_jax.torch_import.torch_files import read_pt, read_safetensors
from tests.hostile import bounded, fuzzed


def saved(path: pathlib.Path, content: Any, **options: Any) -> pathlib.Path:
    torch.save(content, path, **options)
    return path


def rewritten(path: pathlib.Path, change: dict[str, bytes | None], **options: Any) -> pathlib.Path:
    """The archive with files replaced, added or (None) left out; names within its folder."""
    with zipfile.ZipFile(path) as old:
        files = {name: old.read(name) for name in old.namelist()}
    folder = next(iter(files)).split("/")[0]
    files |= {f"{folder}/{name}": data for name, data in change.items()}  # type: ignore[misc]
    with zipfile.ZipFile(path, "w", **options) as new:
        for name, data in files.items():
            if data is not None:
                new.writestr(name, data)
    return path


def pickled(tmp_path: pathlib.Path, content: bytes) -> pathlib.Path:
    """A checkpoint with that as its pickle."""
    return rewritten(saved(tmp_path / "a.pt", {"a": torch.ones(2)}), {"data.pkl": content})


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """As float64 and contiguous, bfloat16 too."""
    return tensor.detach().double().numpy()


def content() -> dict[str, Any]:
    torch.manual_seed(0)
    big = torch.randn(6, 7, 4)
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    return {
        "step": 12,
        "note": "text",
        "list": [1, 2.5, None, (True,)],
        "model": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).state_dict(),
        "kinds": {str(k): torch.randn(3, 5).to(k) for k in kinds},
        "whole": {str(k): torch.randint(0, 2, (4,)).to(k) for k in whole},
        "views": {
            "all": big,
            "transposed": big.transpose(0, 2),
            "stepped": big[1::2, 3:, ::3],
            "one": big[2, 3, 1],
            "turned": big.half().mT[1],
        },
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }


def test_reads_what_torch_reads(tmp_path):
    wanted = content()
    path = saved(tmp_path / "a.pt", wanted)
    check = torch.load(path, weights_only=True)

    def compare(ours: Any, theirs: Any) -> int:
        if isinstance(theirs, dict):
            assert list(ours) == list(theirs)
            return sum(compare(ours[k], theirs[k]) for k in theirs)
        if isinstance(theirs, torch.Tensor):
            value = ours.read()
            assert value.shape == ours.shape == tuple(theirs.shape)
            assert value.dtype == ours.dtype and ours.dtype.name == str(theirs.dtype)[6:]
            np.testing.assert_array_equal(value.astype(np.float64), numbers(theirs))
            return 1
        assert ours == theirs
        return 0

    assert compare(read_pt(path), check) == 22


def test_shared_storages_are_read_once(tmp_path, monkeypatch):
    big = torch.randn(8, 4)
    path = saved(tmp_path / "a.pt", {"all": big, "row": big[3], "same": big})
    found = read_pt(path)
    reads = []
    plain = zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, name: reads.append(name) or plain(self, name)
    )
    np.testing.assert_array_equal(found["row"].read(), big[3].numpy())
    np.testing.assert_array_equal(found["all"].read(), found["same"].read())
    assert len(reads) == 1


def test_big_endian(tmp_path):
    path = saved(tmp_path / "a.pt", {"a": torch.arange(4.0), "b": torch.arange(3).half() + 0.5})
    with zipfile.ZipFile(path) as old:
        a, b = (old.read(f"a/data/{i}") for i in range(2))
    turned = np.frombuffer(a, "<f4").astype(">f4"), np.frombuffer(b, "<f2").astype(">f2")
    changes = {"byteorder": b"big", **{f"data/{i}": x.tobytes() for i, x in enumerate(turned)}}
    found = read_pt(rewritten(path, dict(changes)))
    assert found["a"].read().tolist() == [0, 1, 2, 3]
    assert found["b"].read().tolist() == [0.5, 1.5, 2.5]


class Evil:
    """Unpickled by torch.load(weights_only=False), it makes a file."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: {"model": Evil(path)}, "posix.mkdir"),
        (lambda path: {"model": {"a": torch.ones(2)}, "more": [Evil(path)]}, "posix.mkdir"),
        (lambda path: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda path: {"a": np.ones(2)}, "numpy._core.multiarray._reconstruct"),
        (lambda path: {"a": torch.Size([2])}, "torch.Size"),
        (lambda path: {"a": torch.device("cpu")}, "torch.device"),
        (lambda path: {"a": torch.float32}, "torch.float32"),
        (lambda path: {"a": torch.ones(2, 2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        (lambda path: {"a": getattr}, "__builtin__.getattr"),
    ],
)
def test_anything_but_tensors_is_refused(tmp_path, make, named):
    victim = tmp_path / "made"
    path = saved(tmp_path / "a.pt", make(victim))
    with pytest.raises(InputError, match=f"refused, for it names {named}, which is no tensor"):
        read_pt(path)
    assert not victim.exists()


def test_other_names_of_allowed_functions_are_refused(tmp_path):
    for name in ("torch._utils\nrebuild", "collections\nnamedtuple", "torch\nLongTensor"):
        with pytest.raises(InputError, match="refused"):
            read_pt(pickled(tmp_path, b"c" + name.encode() + b"\n."))


def test_functions_cannot_be_altered(tmp_path):
    """BUILD sets attributes: on what find_class returned, it must not."""
    for state in (b"}X\x08\x00\x00\x00__code__K\x01s", b"N}X\x08\x00\x00\x00__call__K\x01s\x86"):
        for name in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"):
            with pytest.raises(InputError, match="truncated or corrupt"):
                read_pt(pickled(tmp_path, b"\x80\x02" + name + state + b"b."))
    # On a dictionary it is taken and dropped: torch keeps its metadata so.
    state = b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb."
    found = read_pt(pickled(tmp_path, state))
    assert found == {} and list(found.items()) == []


@pytest.mark.parametrize(
    ("tensor", "flaw"),
    [
        ("(S0, 0, (3,), (1,))", "larger than its storage"),
        ("(S0, 1, (2,), (1,))", "larger than its storage"),
        ("(S0, 0, (1000000000, 1000000000), (0, 0))", "larger than its storage"),
        ("(S0, -1, (1,), (1,))", "-1 where a count belongs"),
        ("(S0, 0, (2,), (-1,))", "-1 where a count belongs"),
        ("(S0, 0, (2,), (1.5,))", "1.5 where a count belongs"),
        ("(S0, 0, (2, 1), (1,))", "differ in length"),
        ("(7, 0, (2,), (1,))", "without a storage"),
        ("(S0,)", "missing 3 required positional arguments"),
    ],
)
def test_tensors_stay_inside_their_storage(tmp_path, tensor, flaw):
    class Storage:
        pass

    class Rebuilt:
        def __reduce__(self):
            return _rebuild_tensor_v2, eval(tensor, {"S0": Storage()})

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", 2)

    data = io.BytesIO()
    Pickler(data, protocol=2).dump({"a": Rebuilt()})
    with pytest.raises(InputError, match=f"truncated or corrupt .*{flaw}"):
        read_pt(pickled(tmp_path, data.getvalue()))


def test_a_key_given_twice(tmp_path):
    twice = (
        b"\x80\x02ccollections\nOrderedDict\n)R(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u."
    )
    with pytest.raises(InputError, match="'a' is there twice"):
        read_pt(pickled(tmp_path, twice))


def test_truncated(tmp_path):
    whole = saved(tmp_path / "whole.pt", {"model": {"a": torch.ones(300)}}).read_bytes()
    for length in (2, 30, 700, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.pt"
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.pt: truncated or corrupt .*fetch the file"):
            read_pt(path)


def test_a_flipped_byte_is_an_error_or_changes_nothing(tmp_path):
    """Never another exception, never other numbers: the archive has checksums."""
    values = torch.randn(40)
    whole = saved(tmp_path / "whole.pt", {"model": {"a": values}, "step": 3}).read_bytes()
    dice = random.Random(0)
    path = tmp_path / "flipped.pt"
    refused = 0
    for _ in range(300):
        at = dice.randrange(len(whole))
        path.write_bytes(
            whole[:at] + bytes([whole[at] ^ (1 << dice.randrange(8))]) + whole[at + 1 :]
        )
        try:
            found = read_pt(path)
            np.testing.assert_array_equal(found["model"]["a"].read(), values.numpy())
            assert found["step"] == 3
        except InputError:
            refused += 1
    assert refused > 100


def test_the_format_before_1_6(tmp_path):
    path = saved(tmp_path / "a.pt", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before PyTorch 1\.6.*torch\.save\(torch\.load"):
        read_pt(path)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"hello, this is text")
    with pytest.raises(InputError, match=r"a\.pt: no checkpoint of PyTorch \(it is no zip"):
        read_pt(path)
    with zipfile.ZipFile(path, "w") as other:
        other.writestr("readme.txt", "a zip")
    with pytest.raises(InputError, match="none that torch.save has written"):
        read_pt(path)
    script = torch.jit.script(torch.nn.Linear(1, 1))
    script.save(str(path))
    with pytest.raises(InputError, match="TorchScript archive; save its state_dict"):
        read_pt(path)


def test_storages_that_are_not_as_written(tmp_path):
    def fresh() -> pathlib.Path:
        return saved(tmp_path / "a.pt", {"a": torch.ones(100)})

    with pytest.raises(InputError, match=r"truncated or corrupt \(no data/0\)"):
        read_pt(rewritten(fresh(), {"data/0": None}))["a"].read()
    with pytest.raises(InputError, match="storage 0 has 8 bytes, not 400"):
        read_pt(rewritten(fresh(), {"data/0": b"\0" * 8}))["a"].read()
    with pytest.raises(InputError, match="data/0 is not as torch.save writes it"):
        read_pt(rewritten(fresh(), {"data/0": b"\0" * 408}))["a"].read()
    with pytest.raises(InputError, match="is not as torch.save writes it"):  # it could be a bomb
        read_pt(rewritten(fresh(), {}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match="byte order 'middle' is unknown"):
        read_pt(rewritten(fresh(), {"byteorder": b"middle"}))


def test_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    torch.manual_seed(1)
    wanted = {str(k)[6:]: torch.randn(3, 2).to(k) for k in (torch.float32, torch.bfloat16)}
    save_file(wanted, path)
    found = read_safetensors(path)
    assert {k: v.dtype.name for k, v in found.items()} == {k: k for k in wanted}
    for name, tensor in wanted.items():
        assert found[name].shape == (3, 2)
        np.testing.assert_array_equal(found[name].read().astype(np.float64), numbers(tensor))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"a\.safetensors: truncated or corrupt"):
        read_safetensors(path)
    save_file({"a": torch.ones(2, dtype=torch.uint8)}, path)
    with pytest.raises(InputError, match="tensor a is stored as U8, which is not read"):
        read_safetensors(path)


# Files that are made to take long, or much memory


def nested_key(depth=40):
    """t = (t, t), again and again, as the key of a dictionary: 2^40 steps to hash."""
    body = b"\x80\x02)q\x00"
    for level in range(depth):
        body += (
            b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1]) + b"0"
        )
    return body + b"}h" + bytes([depth]) + b"K\x01s."


def many_arguments():
    """A call with a million arguments, again and again."""
    call = b"ccollections\nOrderedDict\nq\x01"
    arguments = b"(" + b"K\x01" * 200_000 + b"tq\x00"
    return b"\x80\x02" + arguments + call + b"0" + b"h\x01h\x00R0" * 200_000 + b"."


def tensor_of(sizes):
    """A tensor whose shape is what these instructions leave."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    storage += b"X\x03\x00\x00\x00cpuK\x02tQ"
    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\x00"
        + sizes * 2
        + b"\x89)tR."
    )


HOSTILE = {
    "nested tuples as a key": nested_key(),
    "nested tuples in a set": nested_key()[:-4].replace(b"}h", b"\x8f(h") + b"\x90.",
    "nested tuples in a frozen set": nested_key()[:-4].replace(b"}h", b"(h") + b"\x91.",
    "nested tuples as pairs": nested_key()[:-4].replace(b"}h", b"ccollections\nOrderedDict\n((h")
    + b"K\x01ttR.",
    "a memo of 2^29": b"\x80\x02}r" + (2**29).to_bytes(4, "little") + b".",
    "a memo of 2^32 - 1": b"\x80\x02}r\xff\xff\xff\xff" + b"j" + bytes(4) + b".",
    "a byte array of 2^40": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "many arguments": many_arguments(),
    "a shape of a million axes": tensor_of(b"(" + b"K\x01" * 1_000_000 + b"t"),
    "a shape beyond 64 bits": tensor_of(b"\x8a\x0a" + b"\xff" * 9 + b"\x00\x85"),
    "a shape that is a text": tensor_of(b"X\x03\x00\x00\x00abc"),
    "nested tuples as a shape": nested_key()[:-4].replace(b"}h", b"h")
    + b"0"
    + tensor_of(b"h\x28\x85")[2:],
    "an instance": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_in_seconds(tmp_path, name):
    path = pickled(tmp_path, HOSTILE[name])
    with bounded():
        found = read_pt(path)
        assert name == "a memo of 2^29" and found == {}


STRANGE = {
    "nothing": ("(0,)", "(1,)"),
    "nothing of much": ("(0, 2**40, 2**40)", "(1, 1, 1)"),
    "one with a great stride": ("(1,)", "(2**61,)"),
    "two rows that overlap": ("(2, 2)", "(0, 1)"),
    "a number": ("()", "()"),
    "backwards axes": ("(2, 1)", "(1, 2**50)"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_shapes_and_strides_are_read_or_refused(tmp_path, name):
    shape, strides = (eval(text) for text in STRANGE[name])

    class Storage:
        pass

    class Rebuilt:
        def __reduce__(self):
            return _rebuild_tensor_v2, (Storage(), 0, shape, strides)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", 2)

    data = io.BytesIO()
    Pickler(data, protocol=2).dump({"a": Rebuilt()})
    path = pickled(tmp_path, data.getvalue())
    with bounded():
        assert read_pt(path)["a"].read().shape == shape


def test_storages_are_not_unfolded_many_times(tmp_path):
    big = torch.randn(2**19)
    path = saved(tmp_path / "a.pt", {str(i): big[i:] for i in range(16)})
    found = read_pt(path)
    with bounded(), pytest.raises(InputError, match="its tensors are far larger than the file"):
        [tensor.read() for tensor in found.values()]


CODES = [bytes([code]) for code in range(256)]
PIECES = [
    b"h\x00",
    b"q\x00",
    b"K\x07",
    b"}",
    b"]",
    b")",
    b"(",
    b"X\x01\x00\x00\x00a",
    b"\x94",
    b"\x93",
]
PIECES += [
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"R",
    b"s",
    b"u",
    b"Q",
]


@settings(fuzzed, max_examples=200)
@given(st.lists(st.sampled_from(PIECES * 4 + CODES), max_size=40))
def test_any_pickle_is_read_or_refused(tmp_path, pieces):
    path = pickled(tmp_path, b"\x80\x02" + b"".join(pieces) + b".")
    with bounded():
        read_pt(path)
