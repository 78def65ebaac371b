"""What scoring a pair would take on devices that are not here; `tuco-jax plan` runs this.

Nothing is loaded: of both models their configs are enough. Legend: B rows, T tokens of a row.
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, Literal

from common_jax.cli.ranges import NonNegativeInt, PositiveInt, check_ranges
from common_jax.errors import InputError
from tuco_jax.weights.options import (
    BaseOptions,
    PrecisionOption,
    check_precision,
    check_source,
)

if TYPE_CHECKING:
    from common_jax.plan import Device, Plan

__all__ = ["PlanOptions", "plan_score"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(PrecisionOption, BaseOptions):
    """Plan the scoring of a pair, of which config.json is enough.

    What auto stands for, and which weights stay in bfloat16, is what scoring would choose on the
    planned device for weights that are stored as config.json states.

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
    are longer than their context, for a precision that such weights do not have, and for a mesh
    that cannot be had.
    """
    check_ranges(options)
    check_precision(options.dtype, options.precision)
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
    from tuco_jax.models.numerics import readings
    from tuco_jax.models.pair import Pair
    from tuco_jax.models.sharding import placement
    from tuco_jax.weights import validate
    from tuco_jax.weights.assemble import held_dtype
    from tuco_jax.weights.load import model_config, stated_types
    from tuco_jax.weights.precision import Wanted

    check_sizes(options)
    if (positions := options.batch * options.tokens) > LARGEST:
        raise InputError(
            f"batch {options.batch} of {options.tokens} tokens are {positions:.1e}, and a "
            f"compiler counts {LARGEST:.1e}: give fewer rows"
        )
    configs = [model_config(source) for source in sources]
    wanted = Wanted(options.dtype, options.precision, pays=True)  # on all that are planned for
    stored = {source: stated_types(source, wanted.held) for source in sources}
    precision = wanted.settled(stored)
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

    with devices(math.prod(sizes.values())) as found:
        mesh = make_mesh(**sizes, devices=found)
        shards = functools.partial(abstract, where=placement(mesh))
        models = [_held(param_shapes(base), wanted.held, stored[sources[0]])]
        if not options.rank:
            models.append(_held(param_shapes(tuned), wanted.held, stored[sources[-1]]))
        factors = _held(_factors(param_shapes(base), options.rank), held_dtype(wanted.held, ()))
        shape = options.batch, options.tokens
        arguments = {
            "base": shards(models[0]),
            "tuned": shards(models[1]) if models[1:] else {},
            "lora": shards(factors),
            "inputs": (rows(shape, jax.numpy.int32, mesh), rows(shape, bool, mesh)),
        }
        each = [str(model["layers"]["attention"]["o"]["kernel"].dtype) for model in models]
        names = dict(zip(("base", "tuned"), each, strict=False))
        return plan(
            score,
            arguments,
            mesh,
            " and ".join(dict.fromkeys(each)),
            weights=("base", "tuned", "lora"),
            precision=precision,
            readings={name: readings(kind, precision, positions) for name, kind in names.items()},
        ), DEVICES[options.device]


def _held(params: Any, dtype: str, stored: frozenset[str] = frozenset()) -> Any:
    """A tree of shapes in what it is held in; dtype: as it is read. stored: types on disk."""
    import jax

    from tuco_jax.weights import int8
    from tuco_jax.weights.assemble import PUBLISHED, held_dtype

    if dtype == int8.INT8:  # of a store that is so already, the rest is bfloat16 in most
        return int8.abstract(params, held_dtype(PUBLISHED, stored - {int8.INT8} or {"bfloat16"}))
    kind = jax.numpy.dtype(held_dtype(dtype, stored))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind), params)


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
