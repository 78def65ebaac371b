"""One study of a tiny random Stable Diffusion, for all tests of it."""

from typing import Any, NamedTuple

import pytest

from reward_jax.studies.i2p import work
from reward_jax.studies.i2p.pairs import Pairs
from reward_jax.studies.i2p.run import STUDY
from reward_jax.studies.i2p.settings import Config
from tests.reward.studies.i2p import tiny


class Done(NamedTuple):
    """A study: its settings, its summary, and what each shard was drawn of and as."""

    config: Config
    summary: dict[str, Any]
    drawn: list[tuple[Any, list[str], Pairs]]


@pytest.fixture(scope="session")
def done(tmp_path_factory) -> Done:
    folder, drawn = tmp_path_factory.mktemp("i2p"), []
    draw = work.draw_pairs

    def recorded(sd, prompts, *given):
        found = draw(sd, prompts, *given)
        drawn.append((sd, prompts, found))
        return found

    config = tiny.config(folder, tiny.save(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "draw_pairs", recorded)
        return Done(config, STUDY.run(config), drawn)
