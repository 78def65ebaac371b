"""The header of a file, and tensors in rows."""

import numpy as np
import pytest

from common_jax.errors import InputError
from tests.tuco.tiny import tiny_hf
from tests.tuco.weights.gguf.writer import write
from tuco_jax.weights.gguf.file import GGUFFile


@pytest.fixture
def path(tmp_path):
    hf, hf_config = tiny_hf("llama")
    write(tmp_path / "m.gguf", hf, hf_config, kinds={"attn_v": "Q8_0", "ffn": "F16"})
    return tmp_path / "m.gguf"


def test_rows_are_those_of_the_whole(path):
    file = GGUFFile(path)
    for name in ("token_embd.weight", "blk.0.attn_v.weight", "blk.1.ffn_up.weight"):
        whole = file.read(name)
        assert whole.shape == file.tensors[name].shape
        np.testing.assert_array_equal(file.read(name, slice(3, 9)), whole[3:9])
        assert file.read(name, slice(10**6, 10**6 + 1)).shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("size", [0, 3, 10, 100, 1000, -1])
def test_a_truncated_file(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="m.gguf: "):
        GGUFFile(path)


def test_a_tensor_without_numbers(path):
    data = path.read_bytes()
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4
    path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])
    with pytest.raises(InputError, match="token_embd.weight has shape .*, no numbers"):
        GGUFFile(path)
