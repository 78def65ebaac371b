"""A batch's arrays go to the engine of their form."""

import numpy as np

from tuco_jax.core.last_token import LastTokens
from tuco_jax.core.shared_prefix import SharedPrefixes
from tuco_jax.prompts.packing import pack
from tuco_jax.prompts.prefixes import pack_shared
from tuco_jax.scoring.engine import engine_of


def test_by_the_form_of_the_batch():
    rows = [np.append(np.arange(300), i).astype(np.int32) for i in range(40)]
    (behind,) = {b.shape: b for b in pack_shared(rows, 1024)}.values()
    shared = engine_of(behind.arrays(rows), norm=2)
    assert isinstance(shared, SharedPrefixes) and shared.norm == 2
    assert shared.prefixes.shape == (1, 304)
    plain = engine_of(pack([row.size for row in rows], 400)[0].arrays(rows), norm=1)
    assert isinstance(plain, LastTokens)
    assert plain.segments is None, "a prompt a row"
