"""Limits on chat templates, which are programs that come with a model: they may loop, or blow up.

Nearly every template loops over messages and joins what they hold. Such a one is `tame`: each of
its steps takes little time, so that it is enough to look at the clock and at sizes between steps,
which `limited` does. Any other runs in a process of its own (`template_process.py`).
"""

import contextlib
import functools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["SECONDS", "TooMuchError", "limited", "most_characters", "names", "tame"]

SECONDS = 5.0  # of one conversation
_CHARACTERS, _TIMES, _ITEMS = 1_000_000, 50, 1000


class TooMuchError(Exception):
    """A template ran too long, or made too much."""


def most_characters(given: int) -> int:
    """How many characters a template may make of `given` ones."""
    return _CHARACTERS + _TIMES * given


@contextlib.contextmanager
def limited(characters: int, items: int, seconds: float = SECONDS) -> Iterator[None]:
    """Raise TooMuchError in a tame template that runs in this thread, within the block.

    characters, items: of what it reads; lists may grow to somewhat more, texts much more.
    """
    end, most = time.monotonic() + seconds, most_characters(characters)
    longest, made = _ITEMS + 4 * items, 0
    seen: dict[int, tuple[int, Any]] = {}  # long lists of texts, by id; held, so that ids stay

    def size(value: Any) -> int:
        if isinstance(value, str):
            return len(value)
        if isinstance(value, list | tuple | dict):
            if len(value) <= longest or seen.get(id(value), (0, None))[0] == len(value):
                return 0
            seen[id(value)] = len(value), value
            texts = all(isinstance(v, str) for v in value)  # such as the lines of a text
            return sum(map(len, value)) if texts else most + 1
        if isinstance(value, Namespace):
            held = getattr(value, "_Namespace__attrs", {})
            return max((size(v) for v in held.values() if not isinstance(v, Namespace)), default=0)
        return 0

    def step(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal made
        if time.monotonic() > end:
            raise TooMuchError(f"it runs for more than {seconds:g} s")
        if event == "return" and isinstance(value, str):  # what it writes
            made += len(value)
        largest = max(map(size, frame.f_locals.values()), default=0)
        if made > most or largest > most:
            raise TooMuchError(f"it makes more than {most} characters of them")
        return step

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return step if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


class _Generation(Extension):
    """{% generation %}, by which templates mark what the assistant writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=64)
def _parsed(template: str) -> nodes.Template | None:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        return environment.parse(template)
    except (TemplateSyntaxError, RecursionError):
        return None


@functools.lru_cache(maxsize=64)
def names(template: str) -> frozenset[str]:
    """Every name that a template reads: variables, fields, and texts that may be keys."""
    tree = _parsed(template)
    found: set[str] = set()
    for node in tree.find_all((nodes.Name, nodes.Getattr, nodes.Const)) if tree else ():
        value = getattr(node, {nodes.Name: "name", nodes.Getattr: "attr"}.get(type(node), "value"))
        if isinstance(value, str):
            found.add(value)
    return frozenset(found)


# What a tame template is made of. None of it can take long, nor make of texts more than their sum.
_NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign,
    nodes.AssignBlock, nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict,
    nodes.Pair, nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getattr,
    nodes.Getitem, nodes.Slice, nodes.Concat, nodes.Compare, nodes.Operand, nodes.Add, nodes.Sub,
    nodes.Mod, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Break, nodes.Continue,
    nodes.ExprStmt, nodes.Scope,
)  # fmt: skip
_FILTERS = frozenset(
    "trim length count upper lower capitalize title default d first last list string int safe "
    "items reverse selectattr rejectattr tojson replace".split()
)
_METHODS = frozenset(
    "strip lstrip rstrip split rsplit startswith endswith lower upper title capitalize items keys "
    "values get find index count replace removeprefix removesuffix".split()
)
_FUNCTIONS = frozenset("raise_exception namespace range strftime_now".split())
_PARTS, _QUOTING, _DEPTH = 400, 8, 60
_COUNTERS = frozenset("index index0 revindex revindex0 length".split())


@functools.lru_cache(maxsize=64)
def tame(template: str) -> bool:
    """Whether each step of a template is quick and small, whatever it is given."""
    tree = _parsed(template)
    if tree is None:
        return True  # it does not run at all
    assigned = {n.name for n in tree.find_all(nodes.NSRef)}
    spaces: set[str] = set()
    for node in tree.find_all((nodes.Assign, nodes.AssignBlock)):
        targets = {n.name for n in _all(node.target) if isinstance(n, nodes.Name)}
        assigned |= targets
        value = getattr(node, "node", None)
        if isinstance(value, nodes.Call) and getattr(value.node, "name", "") == "namespace":
            spaces |= targets
    if not _by_fields_alone(tree, spaces):
        return False
    numbers = _numbers(tree, spaces)
    return all(_is_tame(node, assigned, numbers) for node in _all(tree)) and _short(tree)


def _all(tree: nodes.Node) -> Iterator[nodes.Node]:
    yield tree
    yield from tree.find_all(nodes.Node)


def _by_fields_alone(tree: nodes.Template, spaces: set[str]) -> bool:
    """Whether namespaces are read by their fields: as values they could hold one another."""
    whole = [n for n in tree.find_all(nodes.Name) if n.name in spaces and n.ctx == "load"]
    read = [
        node.node
        for node in tree.find_all((nodes.Getattr, nodes.Getitem))
        if isinstance(node.node, nodes.Name) and node.node.name in spaces
    ]
    return len(whole) == len(read)


def _short(tree: nodes.Node, depth: int = 0) -> bool:
    """Whether no expression has many parts: with each, what it makes may grow."""
    if depth > _DEPTH:
        return False
    for child in tree.iter_child_nodes():
        if isinstance(child, nodes.Expr) and not isinstance(tree, nodes.Expr):
            parts = list(_all(child))
            # With each of these, backslashes in a text double.
            quoting = sum(isinstance(n, nodes.List | nodes.Tuple | nodes.Dict) for n in parts)
            quoting += sum(
                isinstance(n, nodes.Filter) and n.name in ("tojson", "string") for n in parts
            )
            if len(parts) > _PARTS or quoting > _QUOTING:
                return False
        if not _short(child, depth + 1):
            return False
    return True


def _numbers(tree: nodes.Template, spaces: set[str]) -> set[str]:
    """Fields, as "space.field", of namespaces that hold numbers alone, as a count of turns."""
    given: dict[str, list[nodes.Node]] = {}
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.NSRef):
            given.setdefault(node.target.attr, []).append(node.node)
    for call in tree.find_all(nodes.Call):
        if getattr(call.node, "name", "") == "namespace":
            for keyword in call.kwargs:
                given.setdefault(keyword.key, []).append(keyword.value)
    found = set(given)
    while True:
        numbers = {f"{space}.{name}" for space in spaces for name in found}
        wrong = {n for n in found if not all(_counts(v, numbers) for v in given[n])}
        if not wrong:
            return numbers
        found -= wrong


def _is_tame(node: nodes.Node, assigned: set[str], numbers: set[str]) -> bool:
    if not isinstance(node, _NODES):
        return False
    if isinstance(node, nodes.For):
        return not node.recursive
    if isinstance(node, nodes.Const):
        return not isinstance(node.value, int) or abs(node.value) < 1 << 31
    if isinstance(node, nodes.Mod):  # of numbers: of texts it is a format, of any width
        return _counts(node.left, numbers) and isinstance(node.right, nodes.Const)
    if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict):
        # Lists of lists double with each step, and are exponential in a text.
        stored = getattr(node, "ctx", "load") != "load"
        return stored or not any(n.name in assigned for n in node.find_all(nodes.Name))
    if isinstance(node, nodes.Filter):
        return node.name in _FILTERS and _small(node, node.name)
    if isinstance(node, nodes.Call):
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            return False
        if isinstance(node.node, nodes.Getattr):
            return node.node.attr in _METHODS and _small(node, node.node.attr)
        if isinstance(node.node, nodes.Name) and node.node.name == "namespace":
            values = [k.value for k in node.kwargs]
            return not any(
                isinstance(name, nodes.Name) and name.name in assigned
                for value in values
                for name in _all(value)
            )
        return (
            isinstance(node.node, nodes.Name)
            and node.node.name in _FUNCTIONS
            and _small(node, node.node.name)
        )
    return True


def _counts(node: nodes.Node, numbers: set[str]) -> bool:
    """Whether a node can only be a number; numbers: fields of namespaces that are."""
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        if node.node.name == "loop":
            return node.attr in _COUNTERS
        return f"{node.node.name}.{node.attr}" in numbers
    if isinstance(node, nodes.Filter):
        return node.name in ("length", "count", "int")
    if isinstance(node, nodes.Add | nodes.Sub):
        return _counts(node.left, numbers) and _counts(node.right, numbers)
    return isinstance(node, nodes.Const) and not isinstance(node.value, str)


def _small(node: nodes.Filter | nodes.Call, name: str) -> bool:
    """Whether its arguments keep it small."""
    given: Sequence[nodes.Expr] = [*node.args, *(k.value for k in node.kwargs)]
    if name == "replace":
        texts = [a.value for a in given if isinstance(a, nodes.Const)]
        return len(texts) == len(given) == 2 and 0 < len(str(texts[0])) >= len(str(texts[1]))
    if name == "tojson":  # an indent
        return all(isinstance(a, nodes.Const) and a.value in range(9) for a in given)
    if name == "strftime_now":
        return all(
            isinstance(a, nodes.Const) and not re.search(r"%[^%]*\d", str(a.value)) for a in given
        )
    return True
