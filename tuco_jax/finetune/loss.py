"""Cross-entropy of the answers, with logits at answer tokens only.

Legend: B batch, T tokens, D residual width, A answer tokens of a row, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tuco_jax.finetune.batches import Batch
from tuco_jax.models import decoder
from tuco_jax.models.config import ModelConfig
from tuco_jax.models.decoder import Params
from tuco_jax.models.positions import Positions

__all__ = ["answer_loss"]

LOGITS_AT_ONCE = 2**26  # elements of [B, A, V] held at a time: 256 MiB in float32


def answer_loss(
    config: ModelConfig,
    params: Params,
    lora: Params,
    batch: Batch,
    *,
    remat: bool = False,
    mesh: Mesh | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Float[Array, ""]:
    """Sum of -log p(target) over the batch's answer tokens, in nats; float32.

    lora: factors as the layers use them, the adapter's scale folded in. Positions restart and
    attention stops at each segment, so that an example's loss does not depend on what it is packed
    with. Logits beyond `logits_at_once` elements are made piece by piece, and again in the
    backward pass.
    """
    positions = Positions.of(config, jnp.asarray(batch.mask), jnp.asarray(batch.segments))
    x = decoder.embed(config, params, jnp.asarray(batch.tokens), positions, mesh=mesh)
    x, _ = decoder.forward(config, params, x, positions, lora, remat=remat, mesh=mesh)
    hidden = jnp.take_along_axis(x, jnp.asarray(batch.columns)[..., None], axis=1)

    def piece(
        hidden: Float[Array, "B a D"], targets: Int[Array, "B a"], weights: Float[Array, "B a"]
    ) -> Float[Array, ""]:
        logits = decoder.logits(config, params, hidden, lora)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen))

    rows, answers = batch.targets.shape
    pieces = _pieces(answers, rows * answers * config.vocab_size, logits_at_once)
    parts = (hidden, jnp.asarray(batch.targets), jnp.asarray(batch.weights))
    if pieces == 1:
        return piece(*parts)

    def split(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(rows, pieces, -1, *a.shape[2:]), 1, 0)

    def body(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(piece)(*part), None

    return jax.lax.scan(body, jnp.float32(0), tuple(map(split, parts)))[0]


def _pieces(answers: int, elements: int, limit: int) -> int:
    """The fewest equal pieces of A that keep each within the limit."""
    for pieces in range(1, answers):
        if answers % pieces == 0 and elements <= limit * pieces:
            return pieces
    return max(answers, 1)
