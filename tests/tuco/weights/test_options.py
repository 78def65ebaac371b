"""Every command states which models it reads, and how it holds them, in the same words."""

import dataclasses
import pathlib

import pytest
import yaml

from common_jax.cli.options import DeviceOption
from common_jax.cli.ranges import check_ranges
from common_jax.errors import InputError
from tuco_jax import cli
from tuco_jax.commands import study
from tuco_jax.evaluation.refusals import RefusalConfig
from tuco_jax.finetune.options import FinetuneConfig
from tuco_jax.studies.base import StudiedPairOptions
from tuco_jax.weights.options import AdapterOptions, BaseOptions, PairOptions, WeightOptions

NAMES = "score", "generate", "import", "finetune", "plan", "demo"
CLASSES = {
    **{n: cli.COMMANDS[n].load()[0] for n in NAMES},
    **{f"study {name}": command.load()[0] for name, command in study.COMMANDS.items()},
    "refusals": RefusalConfig,
}
KINDS = {"import": WeightOptions, "finetune": BaseOptions, "plan": BaseOptions}
OWNERS = (DeviceOption, WeightOptions, BaseOptions, AdapterOptions, PairOptions)


@pytest.mark.parametrize("name", CLASSES)
def test_models_are_stated_once(name):
    options = CLASSES[name]
    assert issubclass(options, KINDS.get(name, PairOptions))
    owned = {field for owner in OWNERS for field in vars(owner)["__annotations__"]}
    for class_ in set(options.__mro__) - set(OWNERS):
        again = owned & set(vars(class_).get("__annotations__", {}))
        if class_ is StudiedPairOptions:  # which has a pair of its own where none is named
            again -= {"base", "tuned"}
        if name in ("import", "plan"):  # whose tuned model need not be
            again -= {"tuned"}
        assert not again, class_


@pytest.mark.parametrize("size", [0, -2])
@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_sizes_of_a_mesh_have_a_range(axis, size):
    options = WeightOptions()
    mesh = dataclasses.replace(options.mesh, **{axis: size})
    with pytest.raises(InputError, match=f"mesh.{axis} must be 1 or more, or -1 for all"):
        check_ranges(dataclasses.replace(options, mesh=mesh))
    for fine in (1, 4, -1):
        mesh = dataclasses.replace(options.mesh, **{axis: fine})
        check_ranges(dataclasses.replace(options, mesh=mesh))


@pytest.mark.parametrize(
    "path", sorted(pathlib.Path("configs/tuco").glob("finetune*.yaml")), ids=str
)
def test_configs_of_training_name_options_that_are_there(path):
    names = {field.name for field in dataclasses.fields(FinetuneConfig)}
    assert yaml.safe_load(path.read_text()).keys() <= names


def test_training_in_float16_is_refused(tmp_path):
    from tuco_jax.finetune.finetune import run_finetune

    with pytest.raises(InputError, match="dtype: float16 has too small a range to train in"):
        run_finetune(FinetuneConfig(base="b", data="d", out=str(tmp_path / "r"), dtype="float16"))
