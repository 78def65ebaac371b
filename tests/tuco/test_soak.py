"""A tenth of the soak run (`benchmarks/soak.py`), with its kills."""

import pytest

from benchmarks.soak import soak


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """No row is lost, doubled or changed; memory stays where it is once buffers are full."""
    found = soak(tmp_path, prompts=5000, kills=2)
    assert found["tables_equal"] and len(found["killed_at"]) == 2
    assert found["megabytes_per_1000_prompts"] < 1
