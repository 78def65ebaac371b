"""What chains of Stable Diffusion with safe guidance would take on devices that are not here.

Networks of 1.x as its published folders state them; no file is read. The U-Net is run, on texts
that are encoded; the autoencoder and the text encoder are held beside it, as the study holds them.
`reward-jax plan chains` runs this.

Legend: B rows, each a prompt with a noise, h and w height and width of latents.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from common_jax.cli.options import DeviceOption, TopologyOption
from common_jax.cli.ranges import PositiveInt, check_ranges
from common_jax.errors import InputError
from reward_jax.planning.cost import DevicePlanOptions, sizes_of
from reward_jax.torch_import.stable_diffusion import Dtype

if TYPE_CHECKING:
    from common_jax.plan import Device, Plan

__all__ = ["STATED", "ChainPlanOptions", "plan_chains"]

# config.json of 1.5's unet, vae and text_encoder; all else is the default of their libraries.
STATED: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_AUTOENCODER = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
}
_TEXT_ENCODER = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_PIXELS = 8  # of a latent's side
_TOKENS = 77
_TEXTS = 3  # that a row is asked with at once: none, the prompt, the concept


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainPlanOptions(TopologyOption, DeviceOption, DevicePlanOptions):
    """Plan safe chains whose latents and epsilons are kept, as `reward-jax study i2p` draws them.

    Args:
        size: side of the images, in pixels.
        steps: of PNDM.
        rows: chains that are drawn at once.
        dtype: of weights and networks.
    """

    size: PositiveInt = 512
    steps: PositiveInt = 50
    rows: PositiveInt = 16
    dtype: Dtype = "bfloat16"


def plan_chains(options: ChainPlanOptions) -> "tuple[Plan, Device]":
    """Compile the chains. Raises InputError for options that do not fit one another."""
    check_ranges(options)
    options.check_topology(options.device)
    from common_jax.cost import LARGEST

    sizes = sizes_of(options)
    shards = sizes["data"] * sizes["fsdp"]
    wanted = ("rows", options.rows, shards), ("size", options.size, _PIXELS)
    for name, given, divisor in wanted:
        if given % divisor:
            of = "mesh.data x mesh.fsdp, " * (name == "rows")
            raise InputError(f"{name} must be a multiple of {of}{divisor}; not {given}")
    positions = _TEXTS * options.rows * (options.size // _PIXELS) ** 2
    if positions > LARGEST:
        raise InputError(
            f"rows {options.rows} of size {options.size} are {positions:.1e} positions of the "
            f"U-Net, and a compiler counts {LARGEST:.1e}: give fewer rows, or a smaller size"
        )
    import jax
    import jax.numpy as jnp

    from common_jax import partition
    from common_jax.mesh import make_mesh
    from common_jax.plan import DEVICES, abstract, devices, plan, rows
    from reward_jax.models.stable_diffusion import schedulers
    from reward_jax.models.stable_diffusion.config import SchedulerConfig, UNetConfig
    from reward_jax.models.stable_diffusion.safety import Numbers, SafeGuidance
    from reward_jax.models.stable_diffusion.sampling import Guided, chain
    from reward_jax.models.stable_diffusion.unet import UNet
    from reward_jax.sharding import RULES

    stated = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    stated |= {"steps_offset": 1, "set_alpha_to_one": False, "skip_prk_steps": True}
    scheduler = SchedulerConfig.of({"_class_name": "PNDMScheduler"} | stated, "plan")
    config = UNetConfig.of(STATED, "plan")
    model, side = UNet(config), options.size // _PIXELS
    shape = side, side, config.in_channels
    of = jax.ShapeDtypeStruct
    text = _TOKENS, config.text_width

    with devices(shards * sizes["tensor"], options.topology) as found:
        mesh = make_mesh(**sizes, devices=found)
        schedule = schedulers.schedule_of(scheduler)
        made = schedulers.plan(scheduler, "pndm", options.steps)

        def run(**given: Any) -> Any:
            nothing, prompt, concept = given["texts"]
            numbers, scale = Numbers.of(SafeGuidance()), jnp.float32(7.5)
            guided = Guided(prompt, nothing, concept, scale, numbers)
            fixed: dict[str, Any] = dict(model=model, trajectory=True)
            return chain(given["unet"], schedule, made, given["latents"], guided, None, **fixed)

        example = of((1, *shape), jnp.float32), of((1,), jnp.int32), of((1, *text), jnp.float32)
        weights = jnp.dtype(options.dtype)

        def held(model: Any, *example: Any) -> Any:
            params = jax.eval_shape(model.init, jax.random.key(0), *example)["params"]
            return abstract(params, partition.placement(RULES, mesh), weights)

        encoder, decoder, reader = _beside()
        arguments = {
            "unet": held(model, *example),
            "autoencoder": (
                held(encoder, of((1, _PIXELS, _PIXELS, 3), jnp.float32)),
                held(decoder, of((1, 1, 1, config.in_channels), jnp.float32)),
            ),
            "text encoder": held(reader, of((1, _TOKENS), jnp.int32)),
            "latents": rows((options.rows, *shape), jnp.float32, mesh),
            "texts": tuple(rows((options.rows, *text), weights, mesh) for _ in range(_TEXTS)),
        }
        return plan(run, arguments, mesh, options.dtype, weights=("unet",)), DEVICES[
            options.device
        ]


def _beside() -> tuple[Any, Any, Any]:
    """The networks that a chain does not run: encoder, decoder, text encoder."""
    from reward_jax.models.stable_diffusion.config import TextConfig, VAEConfig
    from reward_jax.models.stable_diffusion.text import TextEncoder
    from reward_jax.models.stable_diffusion.vae import Decoder, Encoder

    config = VAEConfig.of(_AUTOENCODER, "plan")
    return Encoder(config), Decoder(config), TextEncoder(TextConfig.of(_TEXT_ENCODER, "plan"))
