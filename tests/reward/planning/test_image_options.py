"""Networks of images from options, and whether images go through them."""

import pytest

from common_jax.errors import InputError
from reward_jax.data.images.pixels import ImageSpace
from reward_jax.models.unet2d.half_unet import HalfUNet2D
from reward_jax.models.unet2d.unet import UNet2D
from reward_jax.planning.image_options import (
    ClassUNetOptions,
    HalfUNetOptions,
    UNetOptions,
    check_network,
)

SPACE = ImageSpace(8, 8, 3, {"classes": ["a", "b"]})


def test_networks_have_the_fields_that_are_given():
    fields = {"dim": 16, "multipliers": (1, 3), "blocks": 2, "patch": 2}
    unet = UNetOptions(attention=(4,), **fields).make(SPACE)
    assert unet == UNet2D(3, 16, (1, 3), 2, (4,), patch=2)
    assert HalfUNetOptions(**fields).make(SPACE) == HalfUNet2D(3, 16, (1, 3), 2, patch=2)
    assert UNetOptions().make(SPACE) == ClassUNetOptions().make(SPACE) == UNet2D(3)
    assert ClassUNetOptions(by_class=True).make(SPACE) == UNet2D(3, classes=2)


def test_networks_that_images_do_not_go_through():
    for options in (UNetOptions(dim=8), ClassUNetOptions(dim=8, by_class=True)):
        check_network("unet_2d", options, SPACE)
    with pytest.raises(InputError, match=r"^unet_2d: .*3"):
        check_network("unet_2d", UNetOptions(dim=8, patch=3), SPACE)
    with pytest.raises(InputError, match=r"^half_unet_2d: a layer of 12 channels"):
        check_network("half_unet_2d", HalfUNetOptions(dim=12), SPACE)
