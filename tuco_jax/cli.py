"""The command line: `tuco-jax COMMAND`, each reading a YAML --config with flags on top.

Options are typed dataclasses, read by jsonargparse. A command's module is imported when that
command is chosen, so that --help and mistyped options are answered at once. What a user can mend
is one line on stderr and exit code 2.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml
from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    ArgumentParser,
)

from common_jax.errors import InputError

__all__ = ["ImportOptions", "MeshOptions", "ScoreOptions", "main"]

_STARTED = time.perf_counter()

_COMMANDS = {
    "score": "score a file of prompts: how much does tuning contribute to each answer?",
    "import": "write a model, or a base and its adapter, into a store that loads fast",
    "finetune": "make a tuned model, LoRA or full, and watch TuCo while it trains",
    "demo": "score a real pair on four kinds of prompts and write an HTML report",
}
_USAGE = """\
usage: tuco-jax COMMAND [options]

What did fine-tuning change? TuCo of a language model, prompt by prompt.

commands:
{commands}

tuco-jax COMMAND --help lists a command's options; all may stand in a YAML file (--config FILE).
--version prints the version; --debug shows the traceback of an error.
Compiled programs are kept in the user's cache folder; JAX_COMPILATION_CACHE_DIR names another."""


@dataclasses.dataclass
class MeshOptions:
    """Devices along each axis; one of them may be -1, for all that are left.

    Args:
        data: whole copies of the models, each with its part of a batch.
        fsdp: devices among which weights are cut, gathered when used.
        tensor: devices among which single matrices are cut.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class ScoreOptions:
    """Score a file of prompts.

    Args:
        base: the pre-trained model: a Hugging Face directory, a hub id, a .gguf file or a store.
        tuned: the tuned model, likewise; or the directory of a PEFT adapter over the base.
        prompts: .jsonl, .csv, .parquet or .txt; rows have prompt or messages, may have id, label.
        out: .jsonl, .csv or .parquet: id, tuco, preco, tokens. Metadata goes to OUT.meta.json.
        dtype: what weights are held in; sums are float32.
        norm: 1, the paper's, or 2.
        layers: also write the last token's beta_1 .. beta_L.
        truncate: keep the last tokens of prompts beyond the model's context; else an error.
        token_budget: tokens of a batch, padding included.
        mesh: devices.
        parallel: jit over the mesh, or pmap over its data axis.
    """

    base: str
    tuned: str
    prompts: str
    out: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    norm: Literal[1, 2] = 1
    layers: bool = False
    truncate: bool = False
    token_budget: int = 4096
    mesh: MeshOptions = dataclasses.field(default_factory=MeshOptions)
    parallel: Literal["jit", "pmap"] = "jit"


@dataclasses.dataclass
class ImportOptions:
    """Write a model, or a pair, into a store.

    Args:
        model: a Hugging Face directory, a hub id or a .gguf file.
        out: folder of the store; it must not exist yet.
        tuned: also keep what tuning made of it (or a PEFT adapter over it): the store is a pair.
        dtype: what weights are written in.
    """

    model: str
    out: str
    tuned: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    try:
        _run([token for token in given if token != "--debug"])
    except SystemExit as stop:  # --help, --print_config
        return int(stop.code or 0)
    except InputError as error:
        if debug:
            raise
        print(f"tuco-jax: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("tuco-jax: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(argv: list[str]) -> None:
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(_USAGE.format(commands="\n".join(f"  {k:10}{v}" for k, v in _COMMANDS.items())))
    elif name == "--version":
        print(f"tuco-jax {importlib.metadata.version('tuco-reward-jax')}")
    elif name not in _COMMANDS:
        what = f"unknown command {name}" if name else "a command is missing"
        raise InputError(f"{what}{_nearest(name, _COMMANDS)} (commands: {', '.join(_COMMANDS)})")
    else:
        options_class, command = _command(name)
        options = _parse(name, options_class, argv[1:])
        from common_jax import compile_cache

        compile_cache.enable()
        command(options)


def _command(name: str) -> tuple[type, Callable[[Any], Any]]:
    """The options of a command, and what runs it."""
    if name == "score":
        return ScoreOptions, _score
    if name == "import":
        return ImportOptions, _import
    if name == "finetune":
        from tuco_jax.finetune import FinetuneConfig, run_finetune

        return FinetuneConfig, run_finetune
    from tuco_jax.studies.demo import DemoConfig, run_demo

    return DemoConfig, run_demo


def _score(options: ScoreOptions) -> None:
    from tuco_jax.score_file import score_file

    meta = score_file(**_shallow(options), started=_STARTED)
    seconds = ", ".join(f"{name} {value:.2f}" for name, value in meta["seconds"].items())
    resumed = f" ({meta['resumed_rows']} from the journal)" if meta["resumed_rows"] else ""
    for note in meta["notes"]:
        print(f"note: {_one_line(note)}")
    print(f"{meta['rows']} prompts{resumed}, {meta['tokens']} tokens: {options.out}")
    print(f"mean TuCo {meta['mean_tuco']:.4f}, telescoping error {meta['telescoping_error']:.1e}")
    print(f"seconds: {seconds}")


def _import(options: ImportOptions) -> None:
    from tuco_jax.weights import load, store

    if options.tuned is None:
        store.save(options.out, load.load_model(options.model, dtype=options.dtype))
    else:
        pair, tokenizer = load.load_pair(options.model, options.tuned, dtype=options.dtype)
        store.save_pair(options.out, pair, tokenizer)
    print(f"stored in {options.out}")


def _shallow(options: Any) -> dict[str, Any]:
    """A dataclass as keyword arguments; nested ones become dicts."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)} | {
        f.name: dataclasses.asdict(getattr(options, f.name))
        for f in dataclasses.fields(options)
        if dataclasses.is_dataclass(getattr(options, f.name))
    }


def _parse(command: str, options_class: type, argv: list[str]) -> Any:
    """An instance of `options_class` from flags over --config files over its defaults."""
    parser = ArgumentParser(
        prog=f"tuco-jax {command}",
        description=_COMMANDS[command],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags go on top")
    parser.add_class_arguments(options_class, fail_untyped=True)
    known = [o for a in parser._actions for o in a.option_strings]
    for action in parser._actions:
        if getattr(action, "_typehint", None) is bool:  # --layers alone means --layers true
            action.nargs, action.const = "?", True

    argv = _arrange(argv, known)
    for token in argv:
        if token.startswith("--") and token.split("=")[0] not in known:
            raise InputError(f"unknown option {token}{_nearest(token, known)}")
    for path in _config_files(argv):
        for key in _keys(_read_yaml(path), known):
            if f"--{key}" not in known:
                names = [o.removeprefix("--") for o in known]
                raise InputError(f"{path}: unknown key {key!r}{_nearest(key, names)}")
    try:
        found = parser.instantiate(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise InputError(_explain(str(error), command)) from error
    return options_class(**{f.name: found[f.name] for f in dataclasses.fields(options_class)})


def _arrange(argv: list[str], known: list[str]) -> list[str]:
    """--token-budget as --token_budget, and --config first, so that flags go on top of it."""
    configs, flags = [], []
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name.startswith("--") and name not in known and name.replace("-", "_")[2:]:
            underscored = "--" + name[2:].replace("-", "_")
            token = (underscored if underscored in known else name) + equals + value
        if name == "--config":
            configs += [token] if equals else [token, *([v] if (v := next(tokens, None)) else [])]
        else:
            flags.append(token)
    return configs + flags


def _config_files(argv: list[str]) -> Iterator[str]:
    for token, following in zip(argv, [*argv[1:], ""], strict=False):
        if token == "--config" and following:
            yield following
        elif token.startswith("--config="):
            yield token.partition("=")[2]


def _read_yaml(path: str) -> Mapping[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            value = yaml.safe_load(file)
    except OSError as error:
        raise InputError(f"{path}: the config cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {_one_line(str(error))}") from error
    if not isinstance(value, Mapping):
        raise InputError(f"{path}: a config is a mapping of options, such as `base: MODEL`")
    return value


def _keys(config: Mapping[str, Any], known: list[str], prefix: str = "") -> Iterator[str]:
    """Names of the options that a config sets, groups resolved: mesh.data."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and any(o.startswith(f"--{name}.") for o in known):
            yield from _keys(value, known, f"{name}.")
        else:
            yield name


def _nearest(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name.split("=")[0], list(names), 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _explain(message: str, command: str) -> str:
    """Jsonargparse's message as one line in the terms of the command line."""
    text = _one_line(message)
    text = re.sub(r"^Parser key \"([^\"]+)\":", r"option --\1:", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
    required = re.match(r"the following arguments are required: (.+)", text)
    if required:
        names = ", ".join(f"--{name.strip()}" for name in required[1].split(","))
        text = f"missing {names}"
    return f"{text} (see tuco-jax {command} --help)"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
