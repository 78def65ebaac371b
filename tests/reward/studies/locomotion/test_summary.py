"""What a result must hold to be summed up: a start refuses one that lacks something."""

import pytest

from common_jax.errors import InputError
from common_jax.io.files import make_folder, write_json
from reward_jax.studies.locomotion.settings import Ablation, Config, RobotSettings
from reward_jax.studies.locomotion.summary import EXPLAINED, MAIN, read_ablations, read_results
from reward_jax.studies.locomotion.work import ARM

DATA = {"source": "expert", "episodes": 9, "held_out": 1}
ARMS = {name: ARM | {"over": {}} for name in MAIN}
OF_BOTH = {"arms": ARMS, "diagnostics": dict.fromkeys(EXPLAINED, [0.5]), "seconds": {}}
OF_ROBOT = {
    "gap": {"mean": 1.0, "standard_error": 0.1, "expert_beats_base": True},
    "data": {"base": DATA, "expert": DATA, "unseen": DATA},
    "unseen": ARMS,
}


@pytest.mark.parametrize(
    ("read", "part", "whole"),
    [
        (read_results, "hopper", OF_BOTH | OF_ROBOT),
        (read_ablations, "ablations/another-seed", OF_BOTH),
    ],
    ids=["robot", "ablation"],
)
def test_a_result_that_lacks_something_is_refused(tmp_path, read, part, whole):
    config = Config(
        out=tmp_path,
        robots={"hopper": RobotSettings()},
        ablations={"another seed": Ablation(robot="hopper", seed=1)},
    )
    assert read(config) == {}
    path = make_folder(tmp_path / part) / "result.json"
    write_json(path, whole)
    assert list(read(config).values()) == [whole]
    for key in whole:
        write_json(path, {name: value for name, value in whole.items() if name != key})
        with pytest.raises(InputError, match=f"result.json: is damaged, it has no {key}; delete"):
            read(config)
