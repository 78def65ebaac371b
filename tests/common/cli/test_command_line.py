"""What every command line of ours shares, on a program made up here."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Literal

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from common_jax.cli.command_line import parse, run, run_alone
from common_jax.cli.commands import Command, Group
from common_jax.cli.options import MeshOptions, PrecisionOption
from common_jax.cli.ranges import PositiveInt
from common_jax.errors import InputError
from common_jax.precision import stated
from common_jax.termination import Terminated
from reward_jax import cli as reward_jax
from tests.hostile import bounded, fuzzed
from tuco_jax import cli as tuco_jax


@dataclasses.dataclass
class Options:
    """Draw.

    Args:
        model: whose.
        dpi: dots.
        grid_lines: with lines.
        style: how.
        mesh: devices.
    """

    model: str
    dpi: int = 100
    grid_lines: bool = False
    style: Literal["plain", "bold"] = "plain"
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)


class Program:
    """Two commands, which keep what they are given, and which of them were loaded."""

    def __init__(self):
        self.seen: list[Options] = []
        self.loaded: list[str] = []
        self.failure: BaseException | None = None
        self.every: list[type[PrecisionOption]] = []
        self.precisions: list[str] = []

    def draw(self, options: Options) -> None:
        self.seen.append(options)
        self.precisions.append(stated())
        if self.failure:
            raise self.failure

    def load(self, name: str):
        self.loaded.append(name)
        return Options, self.draw

    def __call__(self, *argv: object) -> int:
        commands = {
            name: Command(f"how to {name}", lambda name=name: self.load(name))
            for name in ("print", "draw")
        }
        given = [str(a) for a in argv]
        return run("artist", "Makes pictures.", commands, given, every=self.every)


@pytest.fixture
def program(monkeypatch) -> Program:
    monkeypatch.setattr("common_jax.io.compile_cache.enable", lambda: None)
    return Program()


@pytest.fixture
def error(capsys):
    def line() -> str:
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        return printed.err.removesuffix("\n")

    return line


def every(commands: Mapping[str, Command | Group]) -> Iterator[tuple[str, Command]]:
    for name, entry in commands.items():
        if isinstance(entry, Group):
            yield from every(entry.load())
        else:
            yield name, entry


@pytest.mark.parametrize("name, command", [*every(tuco_jax.COMMANDS), *every(reward_jax.COMMANDS)])
def test_help_says_what_every_option_is(name, command, capsys):
    options = command.load()[0]
    with pytest.raises(SystemExit):
        parse(name, command.help, options, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "CONFIG" not in shown.replace("--config CONFIG", "")
    assert "<class" not in shown.partition("options:")[2].replace("type: <class", "")
    for field in dataclasses.fields(options):
        if not dataclasses.is_dataclass(field.type):
            assert not re.search(rf" --{field.name} \S+ \((type|required)", shown), field.name


def test_help_lists_the_commands_in_order_and_loads_none(program, capsys):
    assert program("--help") == program("--version") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: artist COMMAND [options]" and "Makes pictures." in lines
    assert lines.index("  print     how to print") + 1 == lines.index("  draw      how to draw")
    assert lines[-1].startswith("artist ")
    assert not program.loaded


def test_only_the_chosen_command_is_loaded(program):
    assert program("draw", "--model", "m", "--mesh.data=2", "--grid-lines") == 0
    assert program.loaded == ["draw"]
    assert program.seen == [Options("m", grid_lines=True, mesh=MeshOptions(data=2))]


def test_flags_over_later_configs_over_earlier_ones(program, tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: a\ndpi: 1\nstyle: bold\nmesh: {data: 2, fsdp: 3}\n")
    second.write_text("dpi: 2\nmesh: {fsdp: 4}\n")
    argv = ["--grid-lines", "--model=b", "--config", str(first), f"--config={second}"]
    options = parse("artist draw", "", Options, argv)
    assert options == Options("b", 2, True, "bold", MeshOptions(data=2, fsdp=4))


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ("darw", ["unknown command darw; did you mean draw? (commands: print, draw)"]),
        ("", ["a command is missing (commands: print, draw)"]),
        ("draw", ["missing --model (see artist draw --help)"]),
        ("draw --modle=a", ["unknown option --modle=a; did you mean --model?"]),
        ("draw --mod a", ["unknown option --mod; did you mean --model?"]),
        ("draw --model a --style thin", ["option --style: ", "thin", "(see artist draw --help)"]),
        ("draw --model a --config", ["argument --config: expected one argument"]),
        ("draw --model a b", ["b (see artist draw --help)"]),
        ("draw --model=", ["option --model is empty: give a value, or leave the option out"]),
        ("draw --model a --mesh b", ["unknown option --mesh"]),
    ],
)
def test_what_is_mistyped_is_one_line(program, error, argv, parts):
    assert program(*argv.split()) == 2
    line = error()
    assert line.startswith("artist: error: ") and not program.seen
    assert all(part in line for part in parts), line


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("--grid_line", "--grid_lines"),
        ("--data", "--mesh.data"),  # the last name of a group's
        ("--dots", "--dpi"),  # by its help: "dots."
        ("--shard", ""),  # said, but late
        ("--spell", ""),
        ("--pdi", "--dpi"),
    ],
)
def test_hints_go_by_spelling_then_by_meaning(program, error, asked, meant):
    assert program("draw", "--model", "a", asked, "1") == 2
    every = "--config, --model, --dpi, --grid_lines, --style, --mesh.*"
    hint = f"; did you mean {meant}?" if meant else f"; the options are {every}"
    assert error() == f"artist: error: unknown option {asked}{hint}"


@pytest.mark.parametrize(
    "text",
    ["a: 2001-99-99", "[" * 5000, "a: &a [*a]", "? [1]\n: 2", "\x00", "a: !!python/object:x.y {}"],
)
def test_a_config_of_anything_is_one_line(program, error, tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert program("draw", "--model", "a", "--config", path) == 2
    assert error().startswith(f"artist: error: {path}: ")


def test_a_key_is_named_with_its_file(program, error, tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("model: a\n")
    bad.write_text("mesh:\n  dat: 2\n")
    assert program("draw", "--config", good, "--config", bad) == 2
    assert error() == f"artist: error: {bad}: unknown key 'mesh.dat'; did you mean mesh.data?"


@dataclasses.dataclass(frozen=True)
class Pen:
    width: PositiveInt = 1


@dataclasses.dataclass(frozen=True)
class Pens:
    """Pens.

    Args:
        pens: by name.
    """

    pens: dict[str, Pen] = dataclasses.field(default_factory=dict)


def test_a_mapping_of_dataclasses_comes_from_a_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("pens:\n  blue:\n    width: 3\n")
    found = parse("artist", "", Pens, ["--config", str(path)])
    assert found == Pens({"blue": Pen(3)})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("wdth: 3", "option --pens: unknown key 'wdth'"),
        ("width: 0", "option --pens: width must be 1 or more, not 0"),
    ],
)
def test_a_mapping_of_dataclasses_is_checked(tmp_path, line, said):
    path = tmp_path / "c.yaml"
    path.write_text(f"pens:\n  blue:\n    {line}\n")
    with pytest.raises(InputError, match=f"^{said} "):
        parse("artist", "", Pens, ["--config", str(path)])


def test_errors_of_a_command_are_one_line_unless_debugged(program, error):
    program.failure = InputError("a.png: no\n  room")
    assert program("draw", "--model", "m") == 2
    assert error() == "artist: error: a.png: no room"
    with pytest.raises(InputError):
        program("draw", "--debug", "--model", "m")
    program.failure = Terminated("step 3 is saved")
    assert program("draw", "--model", "m") == 143
    assert error() == "artist: told to end (SIGTERM): step 3 is saved"
    program.failure = KeyboardInterrupt()
    assert program("draw", "--model", "m") == 130
    assert error() == "artist: interrupted"
    program.failure = ZeroDivisionError()  # ours to mend, not the user's
    with pytest.raises(ZeroDivisionError):
        program("draw", "--model", "m")


def test_a_program_that_is_one_command(program, error, monkeypatch, capsys):
    enabled = []
    monkeypatch.setattr("common_jax.io.compile_cache.enable", lambda: enabled.append(1))

    def draw(*argv: str) -> int:
        return run_alone("python -m draw", Options, program.draw, argv)

    assert draw("--dip", "7") == 2
    assert error() == "python -m draw: error: unknown option --dip; did you mean --dpi?"
    assert draw("--model", "m", "--dpi", "7") == 0
    assert program.seen == [Options("m", dpi=7)] and enabled == [1]
    program.failure = InputError("no ink: fill it")
    assert draw("--model", "m") == 2
    assert error() == "python -m draw: error: no ink: fill it"
    assert draw("--help") == 0
    assert "python -m draw" in (text := capsys.readouterr().out) and "Draw." in text


def test_options_of_every_command_hold_while_one_runs(program, error, tmp_path, capsys):
    program.every = [PrecisionOption]
    path = tmp_path / "c.yaml"
    path.write_text("precision: bfloat16\nmodel: m\n")
    assert program("draw", "--config", path) == 0
    assert program("draw", "--config", path, "--precision", "tensorfloat32") == 0
    assert program("draw", "--model", "m") == 0
    assert program.precisions == ["bfloat16", "tensorfloat32", "float32"]
    assert program("draw", "--model", "m", "--precision", "tf32") == 2
    assert error().startswith("artist: error: option --precision: Expected a Literal['auto', ")
    assert program("draw", "--help") == 0 and "--precision" in capsys.readouterr().out
    program.every = []
    assert program("draw", "--config", path) == 2
    assert "unknown key 'precision'" in error()


HOSTILE = {
    "aliases": ("a: &a [x, x]\nb: &b [*a, *a]\nmodel: *b\n", "line 2: no aliases"),
    "nested": ("model: " + "[" * 5000, "not YAML"),
    "long": ("model: " + "a" * 2**17, "a config has at most 65536 bytes"),
    "a number of many digits": ("dpi: " + "1" * 5000, "not YAML: Exceeds the limit"),
    "a date that is none": ("dpi: 2001-99-99", "not YAML"),
    "a text of another encoding": (b"model: \xff", "not YAML"),
    "an object": ("model: !!python/object/apply:os.system [ls]", "not YAML"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_one_line_in_seconds(program, error, tmp_path, case):
    text, said = HOSTILE[case]
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with bounded():
        assert program("draw", "--model", "m", "--config", path) == 2
    line = error()
    assert line.startswith("artist: error: ") and said in line and len(line) < 600


@settings(fuzzed, max_examples=60)
@given(st.text("abm: {}[]-&*!|>'\"\n#0.,?%@", max_size=60))
def test_any_text_is_a_config_or_one_line(program, tmp_path, capsys, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    capsys.readouterr()
    with bounded():
        assert program("draw", "--model", "m", "--config", path) in (0, 2)
    assert capsys.readouterr().err.count("\n") <= 1
