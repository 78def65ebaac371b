"""What scoring a pair would take on devices that are not here; `tuco-jax plan` runs this.

Nothing is loaded: of both models their configs are enough. Legend: B rows, T tokens of a row.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, Literal

from common_jax.cli.options import TopologyOption
from common_jax.cli.ranges import NonNegativeInt, PositiveInt, check_ranges
from common_jax.errors import InputError
from tuco_jax.weights.options import BaseOptions, check_source

if TYPE_CHECKING:
    from common_jax.plan import Device, Plan

__all__ = ["PlanOptions", "plan_score"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(TopologyOption, BaseOptions):
    """Plan the scoring of a pair, of which config.json is enough.

    Both operands of products with weights are of their dtype; with int8 weights they are
    bfloat16, and so are the weights that int8 is not for.

    Args:
        tuned: the tuned model, likewise; by default a full fine-tune of the base.
        rank: of an adapter on every matrix of the layers, in place of a tuned model; 0 for none.
        batch: rows of a batch.
        tokens: of each row.
        device: what each of the mesh's devices is.
        out: a .json file for all figures.
    """

    tuned: str | None = None
    rank: NonNegativeInt = 0
    batch: PositiveInt = 8
    tokens: PositiveInt = 512
    device: Literal["tpu-v5e", "h100"] = "tpu-v5e"
    out: str | None = None


def plan_score(options: PlanOptions) -> "tuple[Plan, Device]":
    """Compile a batch's scoring for the mesh; nothing is read but configs, and nothing runs.

    Raises InputError for a config that is missing, for two models that are no pair, for rows that
    are longer than their context, and for a mesh that cannot be had.
    """
    check_ranges(options)
    options.check_topology(options.device)
    if options.rank and options.tuned is not None:
        raise InputError("rank is of an adapter in place of a tuned model: give one of the two")
    sizes = dataclasses.asdict(options.mesh)
    if -1 in sizes.values():
        raise InputError("mesh: -1 is for devices that are here; a plan wants each size")
    sources = [s for s in (options.base, options.tuned) if s is not None]
    for source in sources:
        check_source(source)

    import jax

    from common_jax.cost import LARGEST
    from common_jax.mesh import make_mesh
    from common_jax.plan import DEVICES, abstract, check_sizes, devices, plan, rows
    from tuco_jax.core.last_token import last_token
    from tuco_jax.models.decoder import param_shapes
    from tuco_jax.models.pair import Pair
    from tuco_jax.models.sharding import placement
    from tuco_jax.weights import int8, validate
    from tuco_jax.weights.load import model_config

    check_sizes(options)
    if (positions := options.batch * options.tokens) > LARGEST:
        raise InputError(
            f"batch {options.batch} of {options.tokens} tokens are {positions:.1e}, and a "
            f"compiler counts {LARGEST:.1e}: give fewer rows"
        )
    configs = [model_config(source) for source in sources]
    precision = "bfloat16" if options.dtype in ("bfloat16", "int8") else "float32"
    configs = [dataclasses.replace(config, precision=precision) for config in configs]
    base, tuned = configs[0], configs[-1]
    if len(sources) > 1:
        validate.configs(base, tuned, *sources)
    context = min(base.max_positions, tuned.max_positions)
    if options.tokens > context:
        raise InputError(f"tokens is {options.tokens}, but the models' context is {context}")

    def score(**given: Any) -> Any:
        pair = Pair(given["base"], given["tuned"], given["lora"], base, tuned)
        out = last_token(pair, *given["inputs"], mesh=mesh)
        return out.tuco, out.layers, out.telescoping

    with devices(math.prod(sizes.values()), options.topology) as found:
        mesh = make_mesh(**sizes, devices=found)
        rounds = options.dtype == "int8"
        kind = None if rounds else jax.numpy.dtype(options.dtype)
        shards = functools.partial(abstract, where=placement(mesh), dtype=kind)

        def held(shapes: Any) -> Any:
            return int8.abstract(shapes, "bfloat16") if rounds else shapes

        shape = options.batch, options.tokens
        arguments = {
            "base": shards(held(param_shapes(base))),
            "tuned": {} if options.rank else shards(held(param_shapes(tuned))),
            "lora": shards(_factors(param_shapes(base), options.rank)),
            "inputs": (rows(shape, jax.numpy.int32, mesh), rows(shape, bool, mesh)),
        }
        weights = "base", "tuned", "lora"
        return plan(score, arguments, mesh, options.dtype, weights=weights), DEVICES[
            options.device
        ]


def _factors(params: Any, rank: int) -> Any:
    """Shapes of low-rank factors for each matrix of the layers; {} for rank 0."""
    import jax
    from flax.traverse_util import flatten_dict, unflatten_dict

    found: dict[str, Any] = {}
    matrices: dict[str, Any] = flatten_dict(params, sep="/")  # pyright: ignore[reportAssignmentType]
    for path, x in matrices.items():
        if rank and path.startswith("layers/") and path.endswith("/kernel"):
            *stacked, rows, columns = x.shape
            module = path.removesuffix("/kernel")
            found[f"{module}/a"] = jax.ShapeDtypeStruct((*stacked, rows, rank), x.dtype)
            found[f"{module}/b"] = jax.ShapeDtypeStruct((*stacked, rank, columns), x.dtype)
    return unflatten_dict(found, sep="/")
