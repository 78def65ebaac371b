"""Launch files, as far as a machine without Slurm or TPUs can run them."""

import math
import os
import pathlib
import random
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from common_jax.cli import command_line
from common_jax.cli.commands import Command, Commands
from reward_jax import cli as rewards
from tests.processes import LIMIT, ROOT
from tuco_jax import cli

LAUNCH = ROOT / "launch"

# What srun does here: two tasks on this machine, with the variables that JAX reads.
SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for i in 0 1; do
  SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=1 SLURM_PROCID=$i \\
    SLURM_LOCALID=$i "$@" &
done
wait -n && wait -n
"""


def test_slurm_s_script_starts_processes_that_find_one_another(tmp_path):
    stub = tmp_path / "srun"
    stub.write_text(SRUN)
    stub.chmod(0o755)
    flags = re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(random.randrange(1 << 12)),  # the port goes by it
        "XLA_FLAGS": flags,
    }
    member = [sys.executable, "-m", "tests.common.member", "--act", "end"]
    done = subprocess.run(
        [str(LAUNCH / "slurm.sh"), *member],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
    assert "process 1 of 2: process 0 writes and prints the results" in done.stderr
    alone = subprocess.run([str(LAUNCH / "slurm.sh")], capture_output=True, text=True)
    assert alone.returncode == 2 and alone.stderr == "usage: sbatch launch/slurm.sh COMMAND ...\n"


def test_a_slice_s_hosts_chips_and_mesh_agree():
    found = yaml.safe_load((LAUNCH / "gke-v5e.yaml").read_text("utf-8"))
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(
        map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    )
    own = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == own
    assert spec["parallelism"] == spec["completions"] == chips / own
    program, command, *options = container["args"]
    assert program == "tuco-jax"
    read = command_line.parse(program, "", cli.COMMANDS[command].load()[0], options)  # pyright: ignore[reportAttributeAccessIssue]
    assert read.mesh.data * read.mesh.fsdp * read.mesh.tensor == chips
    assert {v["name"] for v in pod["volumes"]} == {v["name"] for v in container["volumeMounts"]}


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_the_page_names_every_launch_file(path):
    assert f"launch/{path.name}" in (ROOT / "docs/pods.md").read_text("utf-8")


def test_shell_lines_of_the_page_are_commands():
    text = pathlib.Path(ROOT / "docs/pods.md").read_text("utf-8").replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if re.match("(tuco|reward)-jax ", line)]
    assert [one[:2] for one in lines] == [
        *(2 * [["tuco-jax", "score"]]),
        *([["reward-jax", "data"]] + 2 * [["reward-jax", "train"]]),
    ]
    for program, command, *options in lines:
        found: Any = {"tuco-jax": cli, "reward-jax": rewards}[program].COMMANDS[command]
        command_line.parse(program, "", found.load()[0], options)


def alone(commands: Commands) -> list[str]:
    """Names of the commands that process 0 runs alone."""
    return [
        name
        for name, one in commands.items()
        if (one.alone if isinstance(one, Command) else all(c.alone for c in one.load().values()))
    ]


def test_the_page_names_every_command_for_one_process():
    text = " ".join((ROOT / "docs/pods.md").read_text("utf-8").split())
    said = text.partition("**Commands for one process.**")[2].partition(":")[0]
    languages, _, others = said.partition("reward-jax")
    found = [
        sorted(re.findall(r"[a-z]{2,}", x.replace("tuco-jax", ""))) for x in (languages, others)
    ]
    wanted = [{*alone(x.COMMANDS), "and"} for x in (cli, rewards)]
    assert found == [sorted(names) for names in wanted]
