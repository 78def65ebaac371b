"""A refusal comes before what takes seconds to import, in every command of both programs."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]

# Loads every command of a program, then runs those of argv; says what each has imported.
PROGRAM = """
import importlib, json, sys
from common_jax.cli.commands import Group
program, refused = sys.argv[1], json.loads(sys.argv[2])
HEAVY = "torch transformers orbax.checkpoint tensorstore tensorboardX sklearn minari".split()
HEAVY += ["gymnasium", "mujoco", "stable_baselines3", "pyarrow"]

def loaded():
    bridge = sys.modules.get("jax._src.xla_bridge")
    backend = ["a backend of jax"] if bridge and bridge._backends else []
    return [name for name in HEAVY if name in sys.modules] + backend

def load(commands, names):
    for name, command in commands.items():
        if isinstance(command, Group):
            load(command.load(), [*names, name])
        else:
            command.load()
            print(json.dumps([[*names, name], 0, loaded()]))

cli = importlib.import_module(f"{program}.cli")
load(cli.COMMANDS, [])
for argv in refused:
    print(json.dumps([argv, cli.main(argv), loaded()]))
"""


@pytest.fixture
def imported(tmp_path):
    def go(program: str, refused: list[str]) -> list:
        (tmp_path / "there").mkdir()
        (tmp_path / "there" / "file").touch()
        (tmp_path / "p.txt").write_text("a\n")
        turns = [{"role": r, "content": "a"} for r in ("user", "assistant")]
        (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
        argv = [sys.executable, "-c", PROGRAM, program, json.dumps([r.split() for r in refused])]
        done = subprocess.run(
            argv, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
        )
        assert done.stderr.count(": error: ") == done.stderr.count("\n") == len(refused)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return go


TUCO = [
    "score --base ./no --tuned ./no --prompts p.txt --out o.jsonl",
    "generate --base ./no --tuned ./no --prompts p.txt --out o.jsonl",
    "import --model ./no --out new",
    "plan --base ./no",
    "import --model there --out there",
    "finetune --base ./no --data chat.jsonl --out new",
    "finetune --base there --data chat.jsonl --out there",
    "finetune --base there --data no.jsonl --out new",
    "demo --out there",
    "demo --base ./no --tuned ./no --out new",
    "study gcg --base ./no --tuned ./no --out new",
]
REWARD = [
    "data --env none --out new.hdf5",
    "train --data no.hdf5 --out new",
    "train --data no.hdf5 --out there",
    "extract --base no --expert no --data no.hdf5 --expert_data no.hdf5 --out new",
    "heatmap --reward no --data no.hdf5 --out new",
    "steer --base no --reward no --out new",
    "sweep --base no --reward no --out new --scales [1]",
    "report --base no --expert no --reward no --data no.hdf5 --out new",
    "demo --out there",
    "plan train --observation 4 --mesh.data -1",
    "plan extract --observation 4 --mesh.data -1 --matching.x_t expert",
]


@pytest.mark.parametrize(("program", "refused"), [("tuco_jax", TUCO), ("reward_jax", REWARD)])
def test_a_refusal_comes_before_what_takes_seconds(imported, program, refused):
    found = imported(program, refused)
    assert len(found) > len(refused) + 8
    assert [code for _, code, _ in found[-len(refused) :]] == [2] * len(refused)
    assert not [(argv, names) for argv, _, names in found if names]
