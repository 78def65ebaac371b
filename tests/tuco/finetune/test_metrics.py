"""Means between lines of a log, and the refusal of what diverged."""

import types
from typing import Any

import jax.numpy as jnp
import pytest

from common_jax.errors import InputError
from tuco_jax.finetune.metrics import MetricsWindow


def checkpoints(last) -> Any:
    """Those of a run, of which the last is known."""
    return types.SimpleNamespace(latest=lambda: last)


def metrics(loss, norm=1.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(norm)}


def test_means_since_the_last_line():
    window = MetricsWindow("run", 1e-3, checkpoints(None))
    window.add(1, metrics(2.0), 30)
    window.add(2, metrics(4.0), 50)
    window.check()
    first = window.close()
    assert (first["loss"], first["tokens"]) == (3.0, 80) and first["tokens_per_second"] > 0
    window.add(3, metrics(7.0), 5)
    window.check()
    assert (second := window.close())["loss"] == 7.0 and second["tokens"] == 5


@pytest.mark.parametrize(("last", "said"), [(None, "no checkpoint yet"), (40, "checkpoints/40")])
def test_what_diverged_names_the_last_good_checkpoint(last, said):
    window = MetricsWindow("run", 1e-3, checkpoints(last))
    window.add(50, metrics(float("nan")), 1)
    with pytest.raises(InputError, match=f"step 50: loss nan.*{said}.*learning_rate .now 0.001"):
        window.check()
    with pytest.raises(InputError, match="step 51: its update made weights that are not finite"):
        window.check_weights(51, {"a": jnp.asarray([1.0, jnp.inf])})
    window.check_weights(51, {"a": jnp.ones(2)})
