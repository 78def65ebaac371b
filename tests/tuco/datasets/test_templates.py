"""Templates of a file, and strings that go beside a request."""

import pytest

from common_jax.errors import InputError
from tests.tuco.cli_pair import write_jsonl
from tuco_jax.datasets.templates import read_templates
from tuco_jax.studies import broken


def test_strings_of_a_gcg_run_go_beside_the_request(tmp_path):
    rows = [{"id": "attack 1", "prompt": "! ! x"}, {"id": "in", "prompt": "a {{ prompt }} b"}]
    path = write_jsonl(tmp_path / "attacks.jsonl", rows)
    said = {p: [a.around("q") for a in read_templates(path, p)] for p in ("suffix", "prefix")}
    assert said == {"suffix": ["q ! ! x", "a q b"], "prefix": ["! ! x q", "a q b"]}
    path = write_jsonl(tmp_path / "bare.jsonl", [*rows, {"id": "bare", "prompt": "x"}])
    with pytest.raises(InputError, match="bare.jsonl:3: bare names requests without an attack"):
        read_templates(path)
    config = broken.Config(out=tmp_path / "out", placement="suffix", count=2)
    with pytest.raises(InputError, match="placement is of strings in a file; templates say where"):
        broken.STUDY.run(config)
