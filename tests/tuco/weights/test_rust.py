"""Errors and panics of the tokenizers library are one line of ours."""

import os

import pytest

from common_jax.errors import InputError
from tuco_jax.weights.rust import rust_errors


class PanicException(BaseException):  # as pyo3 names it
    pass


@pytest.mark.parametrize("kind", [Exception, PanicException, ValueError])
def test_whatever_it_raises_is_an_input_error(kind, capfd):
    with pytest.raises(InputError, match="the file: no such luck"), rust_errors("the file"):
        os.write(2, b"a report of the panic\n" if kind is PanicException else b"a warning\n")
        raise kind("no such\nluck")
    assert capfd.readouterr().err == ("" if kind is PanicException else "a warning\n")


def test_other_errors_and_interrupts_pass(capfd):
    with pytest.raises(KeyboardInterrupt), rust_errors("the file"):
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="^mine$"), rust_errors("the file"):
        raise InputError("mine")
    with rust_errors("the file"):
        os.write(2, b"a word\n")
    assert capfd.readouterr().err == "a word\n"
