"""A tiny pair on disk, and a file of requests."""

from typing import Any

import pytest

from tests.tuco.cli_pair import write_jsonl
from tests.tuco.studies.made_up import sentence
from tests.tuco.tiny import save_tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("tuned", 1)):
        save_tiny(folder / name, "llama", seed, max_position_embeddings=512)
    return {"base": str(folder / "base"), "tuned": str(folder / "tuned")}


@pytest.fixture
def requests(tmp_path) -> str:
    return write_jsonl(tmp_path / "requests.jsonl", [{"prompt": sentence(4)} for _ in range(6)])
