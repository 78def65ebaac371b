"""No option of a command or study is stated twice: its words stand in one class."""

import collections
import dataclasses
import inspect
import re

import pytest

from common_jax.cli.commands import Command
from reward_jax import cli
from reward_jax.commands import study

LEAVES = {name: c for name, c in cli.COMMANDS.items() if isinstance(c, Command)}
LEAVES |= {f"study {name}": command for name, command in study.COMMANDS.items()}

# One name for different things, each with words of its own.
MEANINGS = {
    "env": 2,  # whose data are recorded; whose data are read
    "base": 3,  # a file; a diffusers folder; the training of a study's bases
    "expert": 3,  # a file; one that may be left out; the training of a study's experts
    "expert_data": 2,  # a file; the name of a set
    "data": 3,  # a file; one that may be left out; a folder of images
    "reward": 4,  # a file, a run, a file that may be left out; a network
    "init": 2,  # a denoiser to begin with; a reward
    "goal": 2,  # what an expert wants; what outcomes are measured against
    "episodes": 2,  # of one file; of the demo's two
    "out": 8,  # a run, a file, a folder of findings; the demo's and four studies'
    "network": 2,  # a denoiser's; the reward's of latents
    "matching": 2,  # of trajectories; of stored pairs
}


def stated(options: type) -> list[str]:
    """Options that a class's own docstring tells of."""
    text = inspect.cleandoc(options.__dict__.get("__doc__") or "")
    return re.findall(r"^    (\w+):", text.partition("Args:")[2], re.M)


def homes() -> dict[str, set[type]]:
    """Each option, and the classes that state it."""
    found = collections.defaultdict(set)
    for command in LEAVES.values():
        for one in command.load()[0].__mro__:
            for name in stated(one):
                found[name].add(one)
    return found


def test_no_option_is_stated_twice():
    found = {name: len(classes) for name, classes in homes().items()}
    assert {name: n for name, n in found.items() if n != MEANINGS.get(name, 1)} == {}


@pytest.mark.parametrize("command", LEAVES)
def test_every_option_has_words(command):
    options, _ = LEAVES[command].load()
    explained = [name for one in options.__mro__ for name in stated(one)]
    assert sorted(explained) == sorted(field.name for field in dataclasses.fields(options))


def test_help_has_the_words_of_inherited_options(capsys):
    """Also where a command sets another default."""
    assert cli.main(["steer", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "of all random numbers" in printed and "from starts that the task draws" in printed
    assert "guidance scale, a number or [B]" in printed and "default: 2.0" in printed


def test_fields_of_what_may_be_null_are_given_together(capsys):
    assert cli.main(["study", "images", "--cap.images", "1"]) == 2
    said = "unknown option --cap.images; its fields are given together: --cap '{images: ...}'"
    assert said in capsys.readouterr().err
