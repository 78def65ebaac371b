"""A command line: `PROGRAM COMMAND`, each command reading a YAML --config with flags on top.

Options are typed dataclasses, read by jsonargparse. A command's module is imported when that
command is chosen, so that --help is quick. Bad input gives one line on stderr and exit code 2.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

from common_jax import extras
from common_jax.agreement import agree
from common_jax.cli.commands import Commands, Group
from common_jax.cli.interrupts import came, interruptible
from common_jax.cli.options import PrecisionOption, ProcessOptions
from common_jax.cli.ranges import in_words, plain
from common_jax.distributed import count, joined
from common_jax.errors import InputError
from common_jax.termination import Terminated

__all__ = ["one_line", "parse", "run", "run_alone"]

_USAGE = """\
usage: {program} COMMAND [options]

{about}

commands:
{commands}

{program} COMMAND --help lists a command's options; all may stand in a YAML file (--config FILE).
--version prints the version; --debug shows the traceback of an error.
Compiled programs are kept in the user's cache folder; JAX_COMPILATION_CACHE_DIR names another."""


def run(
    program: str,
    about: str,
    commands: Commands,
    argv: Sequence[str] | None = None,
    *,
    every: Sequence[type[PrecisionOption]] = (),
) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 when interrupted.

    143 after SIGTERM, where a training has saved what it did.

    about: what the program does, for --help. argv: what follows the program's name, or None.
    every: options that each of its commands has, which are applied while one runs.
    """
    return _exit_code(program, argv, lambda given: _run(program, about, commands, given, every))


def run_alone(
    program: str,
    options_class: type,
    command: Callable[[Any], Any],
    argv: Sequence[str] | None = None,
) -> int:
    """As `run`, for a program that is one command, such as `python -m MODULE`."""
    about = (options_class.__doc__ or "").partition("\n")[0]
    return _exit_code(
        program, argv, lambda given: _call(program, about, options_class, command, given)
    )


def _exit_code(program: str, argv: Sequence[str] | None, call: Callable[[list[str]], None]) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    try:
        with extras.named():
            call([token for token in given if token != "--debug"])
    except SystemExit as stop:  # --help, --print_config
        if isinstance(stop, Terminated):
            print(f"{program}: {one_line(str(stop))}", file=sys.stderr)
        return int(stop.code or 0)
    except BaseException as stop:
        interrupted = isinstance(stop, KeyboardInterrupt) or came()
        if debug or not (interrupted or isinstance(stop, InputError)):
            raise
        what = "interrupted" if interrupted else f"error: {one_line(str(stop))}"
        print(f"{program}: {what}", file=sys.stderr)
        return 130 if interrupted else 2
    return 0


def _run(
    program: str,
    about: str,
    commands: Commands,
    argv: list[str],
    every: Sequence[type[PrecisionOption]],
) -> None:
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        width = max(8, *map(len, commands)) + 2
        lines = "\n".join(f"  {k:{width}}{v.help}" for k, v in commands.items())
        print(_USAGE.format(program=program, about=about, commands=lines))
    elif name == "--version":
        print(f"{program} {importlib.metadata.version('tuco-reward-jax')}")
    elif name not in commands:
        what = f"unknown command {name}" if name else "a command is missing"
        raise InputError(f"{what}{_nearest(name, commands)} (commands: {', '.join(commands)})")
    elif isinstance(chosen := commands[name], Group):
        _run(f"{program} {name}", chosen.help, chosen.load(), argv[1:], every)
    else:
        options_class, command = chosen.load()
        _call(
            f"{program} {name}",
            chosen.help,
            options_class,
            command,
            argv[1:],
            alone=chosen.alone,
            every=every,
        )


def _call(
    program: str,
    about: str,
    options_class: type,
    command: Callable[[Any], Any],
    argv: list[str],
    *,
    alone: bool = False,
    every: Sequence[type[PrecisionOption]] = (),
) -> None:
    """Run one command on the options of its command line."""
    classes = options_class, ProcessOptions, *every
    options, processes, *others = _parse(program, about, classes, argv)
    with joined(program, alone=alone, **dataclasses.asdict(processes)) as takes_part:
        if not takes_part:
            return
        from common_jax.io import compile_cache  # imports jax

        if count() > 1:
            _check_alike(program, options)
        compile_cache.enable()
        with contextlib.ExitStack() as applied, interruptible():
            for other in others:
                applied.enter_context(other.applied())
            command(options)


def _check_alike(program: str, options: Any) -> None:
    """InputError in all processes where one was started with other options, or other programs."""
    import jax

    agree({"command": program, **dataclasses.asdict(options)}, "give all the same options")
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    agree(versions, "install the same versions for all")
    agree({name: getattr(jax.config, name.lower()) for name in _SET}, "set it alike for all")


_VERSIONS = ("tuco-reward-jax", "jax", "jaxlib")
# Variables that choose the kind of device, or change what programs compute.
_SET = (
    "JAX_PLATFORMS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DEFAULT_PRNG_IMPL",
    "JAX_THREEFRY_PARTITIONABLE",
)


def parse(program: str, about: str, options_class: type, argv: Sequence[str]) -> Any:
    """An instance of `options_class` from flags over --config files over its defaults."""
    return _parse(program, about, (options_class, ProcessOptions), argv)[0]


def _parse(program: str, about: str, classes: Sequence[type], argv: Sequence[str]) -> list[Any]:
    """An instance of each class; options of a command first."""
    parser = ArgumentParser(prog=program, description=about, exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags go on top")
    for one in classes:
        parser.add_class_arguments(one, fail_untyped=True)
    # Jsonargparse adds --robots.help for a mapping of dataclasses, which is no group of options.
    actions = [a for a in parser._actions if not a.dest.endswith(".help")]
    every = [o for a in actions for o in a.option_strings]
    known, helps = [], {}
    for action in actions:
        if any(o.startswith(f"{own}.") for own in action.option_strings for o in every):
            action.help = SUPPRESS  # --mesh FILE: --config has groups, too
        else:
            known += action.option_strings
            helps |= dict.fromkeys(action.option_strings, str(action.help or ""))
        if getattr(action, "_typehint", None) is bool:  # --layers alone means --layers true
            action.nargs, action.const = "?", True

    argv = _arrange(argv, known)
    for token in argv:
        name, _, value = token.partition("=")
        if token.startswith("--") and name not in known:
            raise InputError(f"unknown option {token}{_meant(name, known, helps)}")
        if token.startswith("--config="):
            for key in _keys_of(value, known):
                if f"--{key}" not in known:
                    meant = _meant(f"--{key}", known, helps).replace(" --", " ")
                    raise InputError(f"{value}: unknown key {key!r}{meant}")
    try:
        found = parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        raise InputError(f"{_explain(str(error))} (see {program} --help)") from error
    made = [
        one(**{f.name: plain(found[f.name]) for f in dataclasses.fields(one)}) for one in classes
    ]
    for name in (name for one in made for name in _empty(one)):
        raise InputError(f"option --{name} is empty: give a value, or leave the option out")
    return made


def _empty(options: Any, prefix: str = "") -> Iterator[str]:
    """Names of options that were given as an empty text, which is neither a path nor a name."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _empty(value, f"{prefix}{field.name}.")
        elif value == "" and field.default != "":
            yield prefix + field.name


def _arrange(argv: Sequence[str], known: list[str]) -> list[str]:
    """--token-budget as --token_budget, and --config=FILE first, so that flags go on top of it."""
    tokens: list[str] = []
    for token in argv:
        name, equals, value = token.partition("=")
        underscored = "--" + name[2:].replace("-", "_")
        if tokens[-1:] == ["--config"]:
            tokens[-1] = f"--config={token}"
        elif name.startswith("--") and name not in known and underscored in known:
            tokens.append(underscored + equals + value)
        else:
            tokens.append(token)
    return sorted(tokens, key=lambda token: token.partition("=")[0] != "--config")


class _Loader(yaml.SafeLoader):
    """Without aliases: nine lines of them stand for a billion entries."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # pyright: ignore[reportOptionalMemberAccess]
            raise yaml.YAMLError(f"line {mark.line + 1}: no aliases (*name): write the value out")
        return super().compose_node(parent, index)


_LARGEST = 2**16  # bytes of a config


def _read_yaml(path: str) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise InputError(f"{path}: a config has at most {_LARGEST} bytes")
        value = yaml.load(text.decode(), _Loader)  # noqa: S506 (it is a safe one)
    except OSError as error:
        raise InputError(f"{path}: the config cannot be read: {error.strerror}") from error
    # Numbers and dates that are none raise ValueError, what is nested too deeply RecursionError.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not YAML: {one_line(str(error)):.200}") from error
    if not isinstance(value, Mapping):
        raise InputError(f"{path}: a config is a mapping of options, such as `base: MODEL`")
    return value


def _keys_of(path: str, known: list[str]) -> list[str]:
    """Names of the options that a file sets; InputError names the file."""
    try:
        return list(_keys(_read_yaml(path), known))
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(path) else f"{path}: {text}") from None


def _keys(config: Mapping[str, Any], known: list[str], prefix: str = "") -> Iterator[str]:
    """Names of the options that a config sets, groups resolved: mesh.data."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if any(o.startswith(f"--{name}.") for o in known):
            if not isinstance(value, Mapping):
                inner = next(o for o in known if o.startswith(f"--{name}.")).rpartition(".")[2]
                raise InputError(
                    f"{name} is a group of options, not {value!r}; write each on a line below it, "
                    f"such as {inner}: ..."
                )
            yield from _keys(value, known, f"{name}.")
        else:
            yield name


def _nearest(name: str, names: Collection[str], helps: Mapping[str, str] | None = None) -> str:
    """A hint at the name that was meant, or "".

    By spelling, dashes and groups left out. Else by meaning: the option whose help is the first
    to say a word of the name, so that --batch_size leads to "tokens of a batch".
    """
    asked = name.strip("-").replace("-", "_").lower()

    def likeness(other: str) -> float:
        whole = other.strip("-").lower()
        forms = {whole, whole.rpartition(".")[2]} if "." not in asked else {whole}
        close = max(difflib.SequenceMatcher(None, asked, form).ratio() for form in forms)
        begun = len(asked) > 2 and any(form.startswith(asked) for form in forms)
        return max(close, _ALIKE if begun else 0.0)

    close = max(names, key=likeness, default="")
    if close and likeness(close) >= _ALIKE:
        return f"; did you mean {close}?"
    group, _, field = asked.partition(".")
    if field and f"--{group}" in names:  # may be null, and so has no option for each field
        return f"; its fields are given together: --{group} '{{{field}: ...}}'"
    parts = [w for w in re.split(r"[._]", asked) if len(w) > 3]

    def place(option: str) -> int:
        said = re.findall(r"[a-z]+", (helps or {}).get(option, "").lower())
        return min((said.index(w) for w in parts if w in said), default=len(said) + 1000)

    meant = min(helps or (), key=place, default="")
    return f"; did you mean {meant}?" if meant and place(meant) < _EARLY else ""


_ALIKE, _EARLY = 0.6, 6


def _meant(name: str, known: list[str], helps: Mapping[str, str]) -> str:
    """A hint at the option that was meant; else all that there are, a group's as one."""
    if close := _nearest(name, known, helps):
        return close
    groups = (re.sub(r"\..*", ".*", option) for option in known)
    names = [o for o in dict.fromkeys(groups) if o.startswith("--") and o not in _OF_EVERY_COMMAND]
    return f"; the options are {', '.join(names)}"


_OF_EVERY_COMMAND = (
    "--help",
    "--print_config",
    *(f"--{field.name}" for field in dataclasses.fields(ProcessOptions)),
)


# Jsonargparse's message about a number beyond its range, or about what is not a number.
_RANGE = re.compile(
    r": Not of type (\w+): (?:invalid literal for int.. with base 10: "
    r"|could not convert string to float: )?'?(.*?)'?"
    r"(?: does not conform to restriction .*| not an integer| not a number)?$"
)

# The same for an option that may also be null.
_OR_NULL = re.compile(
    r"Does not validate against any of the Union subtypes .* Errors: - (Not of type \w+: ).*"
    r" Given value: (.*)$"
)


def _explain(message: str) -> str:
    """Jsonargparse's message as one line in the terms of the command line."""
    text = one_line(message)
    text = re.sub(r"^Parser key \"([^\"]+)\":", r"option --\1:", text)
    text = re.sub(r"Problem with given class_path '[^']+': ", "", text)  # a mapping's value
    text = re.sub(r"Option '(\w+)' is not accepted", r"unknown key '\1'", text)
    text = re.sub(r"Parser key \"([^\"]+)\"", r"\1", text)
    text = _OR_NULL.sub(r"\1\2", text)
    text = _RANGE.sub(lambda m: f" must be {in_words(m[1])}, not {m[2]}", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
    text, required = re.subn(r"^the following arguments are required: ", "missing --", text)
    return text.replace(", ", ", --") if required else text


def one_line(text: str) -> str:
    """The text with every run of spaces and line breaks as one space."""
    return " ".join(text.split())
