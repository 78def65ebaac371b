"""beta over n x d, the Groenwall quantities, and OutputCo."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common_jax.mesh import batch_sharding, make_mesh
from tests.tuco import random_models as rm
from tuco_jax.core.decompose import decompose
from tuco_jax.core.places import last_column
from tuco_jax.core.residual import share
from tuco_jax.core.trajectories import output_co, trajectories
from tuco_jax.models import decoder, sharding
from tuco_jax.models.positions import Positions

split = jax.jit(lambda pair, tokens, mask: decompose(pair, tokens, mask, layers=True))
compare = jax.jit(trajectories)


@jax.jit
def final_streams(pair, tokens, mask):
    """The two models' last streams, each from its own embedding, by ordinary forward passes."""

    def final(config, params, lora):
        at = Positions.of(config, mask)
        x = decoder.embed(config, params, tokens, at)
        return decoder.forward(config, params, x, at, lora)[0]

    base = final(pair.base_config, pair.base, {})
    return base, final(pair.tuned_config, pair.tuned_params, pair.lora)


@pytest.fixture(scope="module", params=["full", "adapter"])
def pair(request):
    return {"full": rm.full_pair, "adapter": rm.adapter_pair}[request.param]()


@pytest.mark.parametrize("side", ["left", "right"])
def test_beta_is_that_of_the_decomposition(pair, side):
    tokens, mask = rm.batch(side=side)
    got = compare(pair, tokens, mask)
    out = split(pair, tokens, mask)
    for row in range(len(mask)):
        real = np.asarray(mask[row])
        ptc = np.asarray(out.ptc[:, row])[:, real]
        ftc = np.asarray(out.ftc[:, row])[:, real]
        p = np.abs(ptc.cumsum(0)).sum((1, 2))
        f = np.abs(ftc.cumsum(0)).sum((1, 2))
        np.testing.assert_allclose(got.beta[:, row], f / (p + f), rtol=1e-4)
        np.testing.assert_allclose(got.max_ftc[row], f.max(), rtol=1e-4)
        np.testing.assert_allclose(got.max_ptc[row], np.abs(ptc).sum((1, 2)).max(), rtol=1e-4)


def test_the_bound_of_proposition_4_2_holds(pair):
    tokens, mask = rm.batch(rows=6)
    got = compare(pair, tokens, mask)
    assert (got.distance > 0).all() and (got.lipschitz > 0).all()
    assert (got.distance <= got.tight_bound).all()
    assert (got.tight_bound <= got.bound).all()


def test_distance_is_between_two_ordinary_forward_passes(pair):
    tokens, mask = rm.batch()
    same_start = dict(pair.base) | {"embed": pair.tuned_params["embed"]}
    base, tuned = final_streams(dataclasses.replace(pair, base=same_start), tokens, mask)
    expected = jnp.where(mask[..., None], jnp.abs(tuned - base), 0).sum((1, 2))
    np.testing.assert_allclose(compare(pair, tokens, mask).distance, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_sharded_over_a_mesh(pair, shape):
    tokens, mask = rm.batch(rows=8)
    mesh = make_mesh(*shape)
    placed = sharding.place(pair, mesh)
    rows = jax.device_put((tokens, mask), batch_sharding(mesh))
    run = jax.jit(
        lambda pair, *a: (trajectories(pair, *a, mesh=mesh), output_co(pair, *a, mesh=mesh))
    )
    plain = jax.jit(lambda pair, *a: (trajectories(pair, *a), output_co(pair, *a)))
    chex.assert_trees_all_close(run(placed, *rows), plain(pair, tokens, mask), rtol=1e-4)


def test_equal_models_never_part():
    pair = rm.full_pair()
    pair = dataclasses.replace(pair, tuned=pair.base)
    got = compare(pair, *rm.batch())
    for value in (got.beta, got.distance, got.lipschitz, got.bound):
        assert float(jnp.abs(value).max()) == 0


@pytest.mark.parametrize("norm", [1, 2])
def test_output_co_comes_from_two_forward_passes(pair, norm):
    tokens, mask = rm.batch()
    rows, last = jnp.arange(len(mask)), last_column(mask)
    base, tuned = (x[rows, last] for x in final_streams(pair, tokens, mask))
    expected = share(base, tuned - base, norm)
    got = jax.jit(output_co, static_argnames="norm")(pair, tokens, mask, norm=norm)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert float(expected.min()) > 0.01


def test_output_co_survives_a_larger_tuned_vocabulary():
    pair = rm.full_pair(tuned=rm.config())
    bigger = rm.config(vocab_size=70)
    pair = dataclasses.replace(pair, tuned=rm.params(bigger, 5), tuned_config=bigger)
    assert np.isfinite(jax.jit(output_co)(pair, *rm.batch(vocab=70))).all()
