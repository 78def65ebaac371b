"""Every command states which models it reads, and how it holds them, in the same words."""

import dataclasses

import pytest

from tuco_jax import cli
from tuco_jax.commands import study
from tuco_jax.evaluation.refusals import RefusalConfig
from tuco_jax.weights.options import PairOptions, WeightOptions

CLASSES = {
    **{n: cli.COMMANDS[n].load()[0] for n in ("score", "generate", "import", "demo")},
    **{f"study {name}": command.load()[0] for name, command in study.COMMANDS.items()},
    "refusals": RefusalConfig,
}


@pytest.mark.parametrize("name", CLASSES)
def test_models_are_stated_once(name):
    options = CLASSES[name]
    assert issubclass(options, WeightOptions if name == "import" else PairOptions)
    own = {f.name for f in dataclasses.fields(WeightOptions)}
    for class_ in options.__mro__:
        if class_ is not WeightOptions:
            assert not own & set(vars(class_).get("__annotations__", {})), class_
