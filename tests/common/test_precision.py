"""Products are in float32 unless a user says otherwise, and what is said is told."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.cli.options import PrecisionOption
from common_jax.precision import applied, jit, precise, stated
from common_jax.run import environment

ROOT = pathlib.Path(__file__).parents[2]
X = jnp.ones((2, 2))


def precisions(program):
    """Of each product of a program, as traced now."""
    found = []
    for equation in jax.make_jaxpr(program)(X).eqns:
        if equation.primitive.name == "jit":
            found += [e.params["precision"] for e in equation.params["jaxpr"].eqns]
        else:
            found.append(equation.params["precision"])
    return found


def test_a_program_is_as_precise_as_can_be():
    highest = (jax.lax.Precision.HIGHEST,) * 2
    product = lambda x: jax.lax.dot(x, x)  # noqa: E731
    assert precisions(product) == [None]
    assert precisions(precise(product)) == precisions(jit(product)) == [highest]


def test_what_a_user_has_set_wins():
    """Also after a program was compiled without."""
    made = jit(lambda x: jax.lax.dot(x, x))
    before = np.asarray(made(X))
    with jax.default_matmul_precision("bfloat16"):
        ((one, other),) = precisions(made)
        assert one == other == jax.lax.Precision.DEFAULT and stated() == "bfloat16"
        np.testing.assert_array_equal(made(X), before)
        assert made._cache_size() == 2
    for same in (None, "highest", "float32"):
        with jax.default_matmul_precision(same):
            assert stated() == environment()["matmul_precision"] == "float32"


@pytest.mark.parametrize("precision", ["tensorfloat32", "bfloat16"])
def test_an_option_holds_in_processes_that_are_started(precision):
    code = "import jax; print(jax.config.jax_default_matmul_precision)"
    with PrecisionOption(precision=precision).applied():
        assert stated() == precision
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == precision
    assert stated() == "float32" and "JAX_DEFAULT_MATMUL_PRECISION" not in os.environ


def test_what_stood_before_stands_again(monkeypatch):
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "float32")
    with PrecisionOption().applied():
        assert stated() == "float32" and "JAX_DEFAULT_MATMUL_PRECISION" in os.environ
    with pytest.raises(KeyError), applied("bfloat16"):
        raise KeyError
    assert os.environ["JAX_DEFAULT_MATMUL_PRECISION"] == "float32" and stated() == "float32"


def test_no_program_of_rewards_is_compiled_otherwise():
    paths = sorted((ROOT / "reward_jax").rglob("*.py"))
    assert len(paths) > 100
    assert not [str(path) for path in paths if "jax.jit(" in path.read_text()]
    assert not [
        str(p) for p in paths if "@jax.jit" in p.read_text() or "(jax.jit" in p.read_text()
    ]
