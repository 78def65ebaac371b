"""Public signatures say their arrays' shapes, and each word has one spelling."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("common_jax", "tuco_jax", "reward_jax")
BARE = {"jax.Array", "jnp.ndarray", "np.ndarray"}


def bare_arrays(annotation: ast.expr | None) -> list[str]:
    """Array types without a shape: all but those in Float[np.ndarray, "B T"] and its like."""
    if annotation is None:
        return []
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
        first, *rest = annotation.slice.elts
        if ast.unparse(first) in {"np.ndarray", "Array"} and isinstance(rest[0], ast.Constant):
            return []
    if ast.unparse(annotation) in BARE | {"Array"}:
        return [ast.unparse(annotation)]
    children = [n for n in ast.iter_child_nodes(annotation) if isinstance(n, ast.expr)]
    return [found for child in children for found in bare_arrays(child)]


# A shape in words: [B, 2], [..., D], [T].
SHAPE = r"\[(?:\.\.\.|\d+|[A-Z]\w*)(?:, (?:\.\.\.|\d+|[A-Z]\w*))*\]"


def shaped_in_words(node: ast.FunctionDef) -> bool:
    """Whether a docstring says the shape of an argument whose type is Any.

    It names the argument ("starts [B, 2]", "plans: [B, H, 2]"), or begins with the shape of the
    only ones that there are ("Whether points [..., 2] lie in free cells").
    """
    a = node.args
    given = [x for x in [*a.posonlyargs, *a.args, *a.kwonlyargs] if x.arg not in ("self", "cls")]
    loose = [x.arg for x in given if x.annotation and ast.unparse(x.annotation) == "Any"]
    text = ast.get_docstring(node) or ""
    if any(re.search(rf"\b{name}:? {SHAPE}", text) for name in loose):
        return True
    first = text.partition("\n\n")[0]
    return bool(loose) and len(loose) == len(given) and bool(re.search(SHAPE, first))


def unshaped(tree: ast.Module | ast.ClassDef) -> list[str]:
    """Public functions, methods and fields with an array whose shape is not said."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += unshaped(node)
        elif isinstance(node, ast.FunctionDef):
            if node.name.startswith("_") and node.name != "__call__":
                continue
            a = node.args
            given = [*a.posonlyargs, *a.args, *a.kwonlyargs]
            given += [x for x in (a.vararg, a.kwarg) if x is not None]
            types = [*(x.annotation for x in given), node.returns]
            if any(map(bare_arrays, types)) or shaped_in_words(node):
                found.append(f"line {node.lineno}: {node.name}")
        elif isinstance(node, ast.AnnAssign) and isinstance(tree, ast.ClassDef):
            if bare_arrays(node.annotation):
                found.append(f"line {node.lineno}: {tree.name}.{ast.unparse(node.target)}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_public_signatures_say_shapes(package):
    found = [
        f"{path.relative_to(ROOT)} {where}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for where in unshaped(ast.parse(path.read_text()))
    ]
    assert not found, "say the shape with jaxtyping, as in Float[Array, 'B T']:\n" + "\n".join(
        found
    )


def test_bare_arrays_are_found():
    tree = ast.parse(
        "def a(x: jax.Array): ...\n"
        "def b(x: Float[Array, 'B']) -> dict[str, np.ndarray]: ...\n"
        "def c(x: Float[np.ndarray, 'B'] | None) -> Callable[[Int[Array, '']], str]: ...\n"
        "def _d(x: jax.Array): ...\n"
        "class E:\n    x: np.ndarray\n    def f(self, *, y: Array | None = None): ...\n"
    )
    assert [where.split(": ")[1] for where in unshaped(tree)] == ["a", "b", "E.x", "f"]


def test_shapes_that_only_words_say_are_found():
    tree = ast.parse(
        "def a(xy: Any):\n    'Whether points [..., 2] lie in free cells.'\n"
        "def b(maze: Maze, starts: Any):\n    'Walk from starts [B, 2].'\n"
        "def c(maze: Maze, plans: Any):\n    '''Execute.\n\n    plans: [B, H, 2] metres.'''\n"
        "def d(axes: Any, xy: Float[np.ndarray, '2']):\n    'Draw rows [B, 2].'\n"
        "def e(given: Any):\n    'A goal: a number, or [x, y].'\n"
        "def f(value: Any):\n    '''A function.\n\n    It gives rows [B].'''\n"
    )
    assert [where.split(": ")[1] for where in unshaped(tree)] == ["a", "b", "c"]


def test_tokenizers_are_typed():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.arg == "tokenizer"
        and (argument.annotation is None or ast.unparse(argument.annotation) == "Any")
    ]
    assert not found


BANNED = {"Asking", "kept", "option_chances", "terms", "told", "words"}


def test_names_say_what_a_thing_is():
    """A tokenizer is no `words`, what is printed not `told`; prose may use either."""
    found = []
    for folder in (*PACKAGES, "tests", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                for field in ("id", "arg", "attr", "name", "asname"):
                    name = getattr(node, field, None)
                    if isinstance(name, str) and name in BANNED:
                        line = getattr(node, "lineno", "?")
                        found.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert not found, "\n".join(found)


def test_one_spelling():
    """American in these two, as the libraries have them: optimizer and tokenize."""
    folders = (*PACKAGES, "tests", "benchmarks", "configs", "docs", "examples")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    paths += [ROOT / name for name in ("README.md", "Makefile", "pyproject.toml")]
    wrong = re.compile(r"(optimi|tokeni)s(e|er|ers|ed|es|ing|ation)\b", re.IGNORECASE)
    suffixes = {".py", ".md", ".yaml", ".toml", ".html", ""}
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in paths
        if path.is_file() and path.suffix in suffixes and path != pathlib.Path(__file__)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if wrong.search(line)
    ]
    assert not found
