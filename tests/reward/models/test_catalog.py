"""Every network of the catalogue goes into a file and comes back; others are refused by name."""

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from common_jax.errors import InputError
from reward_jax.data.checkpoint import load_guide, load_model, save_guide, save_model
from reward_jax.data.trajectory.space import TrajectoryGuide, TrajectoryModel, TrajectorySpace
from reward_jax.diffusion.denoiser import score_from
from reward_jax.diffusion.schedule import cosine_schedule
from reward_jax.models import catalog
from reward_jax.models.energy import EnergyDifference
from reward_jax.models.reward_nets import HalfUnet, WindowMLP
from reward_jax.models.temporal.mlp import ResidualMLP
from reward_jax.models.temporal.unet import TemporalUnet
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.models.unet2d.unet import UNet2D
from reward_jax.reward.discriminator import DiscriminatorGuide
from reward_jax.reward.relative import RelativeReward
from tests.reward.cli_runs import space

SCHEDULE = cosine_schedule(3)
PARAMS = {"w": jnp.arange(3.0)}
EXAMPLES = {  # no field has its default, but those that are not stored
    "temporal_unet": TemporalUnet(7, 24, (1, 2), True),
    "residual_mlp": ResidualMLP(6, 3, 8, "mish"),
    "half_unet": HalfUnet(8, (2, 4, 4), "leaky_relu", None, False),
    "window_mlp": WindowMLP(2, (3, 5), 6, "relu", "strided", "mean", "activated"),
    "unet_2d": UNet2D(3, 24, (1, 3), 2, (7, 4), 2, 4, 2, 10),
    "half_unet_2d": HalfUNet2D(3, 24, (1, 3), 2, 4, 2),
    "energy_difference": EnergyDifference(
        TemporalUnet(7, 24), WindowMLP(2), ("x0", "v"), "linear", 9, 3
    ),
}


def test_the_examples_are_the_catalogue():
    assert {name: type(module) for name, module in EXAMPLES.items()} == {
        name: entry.module for name, entry in catalog.CATALOG.items()
    }


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_every_network_comes_back_from_a_file(tmp_path, name):
    """In whatever it is: a denoiser, a reward, a discriminator."""
    module, path = EXAMPLES[name], tmp_path / "m.safetensors"
    for field in dataclasses.fields(module):
        if field.name not in ("parent", "name", *catalog.CATALOG[name].unstored):
            assert getattr(module, field.name) != field.default, f"an example of {field.name}"
    save_model(path, TrajectoryModel(score_from(module, PARAMS, "v", SCHEDULE), space()))
    found = load_model(path, TrajectorySpace).denoiser
    assert found.model == module and hash(found.model) == hash(module)
    np.testing.assert_array_equal(found.params["w"], PARAMS["w"])
    guides = RelativeReward(PARAMS, SCHEDULE, module), DiscriminatorGuide(PARAMS, module)
    for guide in guides:
        save_guide(path, TrajectoryGuide(guide, space(), SCHEDULE))
        found: Any = load_guide(path, TrajectorySpace).guide
        assert (found.reward if isinstance(found, RelativeReward) else found.model) == module


def test_what_is_the_backends_is_not_stored():
    described = catalog.describe(TemporalUnet(4, method="lax"))
    assert catalog.make(described, "file") == TemporalUnet(4, method="auto")


@dataclasses.dataclass(frozen=True)
class Levels:
    widths: tuple[tuple[int, ...], ...]
    dropout: float | None = None


class Images(nn.Module):
    """What an image U-Net may look like: a configuration, tuples of tuples, a network inside."""

    levels: Levels
    head: WindowMLP
    names: tuple[str, ...] = ()


def test_a_network_of_networks(monkeypatch):
    """One line a class, and nothing else, stores it."""
    added = {"levels": catalog.Entry(Levels), "images": catalog.Entry(Images)}
    monkeypatch.setattr(catalog, "CATALOG", {**catalog.CATALOG, **added})
    module = Images(Levels(((1, 2), (), (3,)), 0.5), WindowMLP(None, (4,)), ("a", "b"))
    described = json.loads(json.dumps(catalog.describe(module)))
    assert catalog.make(described, "file") == module


def test_a_network_that_is_not_in_the_catalogue(tmp_path):
    class Wider(WindowMLP):
        """May compute anything."""

    for module in (nn.Dense(3), Wider()):
        with pytest.raises(InputError) as raised:
            save_model(
                tmp_path / "m.safetensors",
                TrajectoryModel(score_from(module, PARAMS, "v", SCHEDULE), space()),
            )
        said = str(raised.value)
        assert said == (
            f"a model of {type(module).__name__} cannot be written to a file, which can hold "
            f"{', '.join(catalog.CATALOG)}: add a line for it to reward_jax/models/catalog.py"
        )
    assert not list(tmp_path.iterdir())
    bad: Any = WindowMLP(act=jnp.tanh)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="WindowMLP.act is a .*, which cannot be written to a"):
        catalog.describe(bad)


@pytest.mark.parametrize(
    "described",
    [
        {"network": "transformer", "fields": {}},
        {"network": "window_mlp", "fields": {"heads": 3}},
        {"network": "window_mlp", "fields": {"widths": {"network": "mlp", "fields": {}}}},
        {"network": ["window_mlp"], "fields": {}},
    ],
)
def test_a_description_of_another_version(described):
    with pytest.raises(InputError, match="m.safetensors: its network is none of this version's"):
        catalog.make(described, "m.safetensors")
