"""One policy of batch sizes: more tokens on accelerators, fewer where gradients are kept."""

import jax
import pytest

from tuco_jax.core.budget import default_budget, pass_budget


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_by_backend(monkeypatch, backend):
    on_cpu = default_budget(), pass_budget()
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert default_budget(gradient=True) * 2 == default_budget()
    assert pass_budget() > default_budget()
    if backend != "cpu":
        assert default_budget() > on_cpu[0] and pass_budget() > on_cpu[1]
