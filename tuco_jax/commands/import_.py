"""`tuco-jax import`: a model, or a pair, as a store that loads fast."""

import dataclasses

from common_jax.agreement import agree
from common_jax.cli.command_line import one_line
from common_jax.distributed import by_first, count
from tuco_jax.weights.options import AdapterOptions, WeightOptions, check_sources
from tuco_jax.weights.orbax.target import check_target

__all__ = ["Config", "run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions, WeightOptions):
    """Write a model, or a pair, into a store; the store restores onto any devices.

    Of several processes each reads, holds and writes its share: without a mesh, over fsdp.

    Args:
        model: a Hugging Face directory, a hub id or a .gguf file.
        out: folder of the store; it must not exist yet.
        tuned: also keep what tuning made of it (or a PEFT adapter over it): the store is a pair.
    """

    model: str
    out: str
    tuned: str | None = None


def run(config: Config) -> None:
    """Read, write the store, and say where it is."""
    by_first(lambda: check_target(config.out))
    check_sources(config.model, config.tuned)

    from common_jax.mesh import mesh_for
    from tuco_jax.core.checksum import weights_checksum
    from tuco_jax.models.pair import single
    from tuco_jax.models.sharding import placement
    from tuco_jax.weights import load
    from tuco_jax.weights.orbax import store

    sizes = dataclasses.asdict(config.mesh)
    if count() > 1 and set(sizes.values()) == {1}:  # a whole copy each would be of no use
        sizes = {"fsdp": -1}
    mesh = mesh_for(sizes)
    if config.tuned is None:
        where = placement(mesh) if mesh else None
        model = load.load_model(config.model, dtype=config.dtype, placement=where)
        agree({"weights": weights_checksum(single(model.config, model.params))})
        store.save(config.out, model)
    else:
        pair, tokenizer = load.load_pair(
            config.model,
            config.tuned,
            dtype=config.dtype,
            precision="float32",  # no part of a store; else dtype would depend on the machine
            mesh=mesh,
            adapter=config.adapter,
        )
        for note in pair.notes:
            print(f"note: {one_line(note)}")
        agree({"weights": weights_checksum(pair)})
        store.save_pair(config.out, pair, tokenizer)
    print(f"stored in {config.out}")
