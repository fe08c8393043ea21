"""_core.pyi is a snapshot of the compiled module: neither may change without the other."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import flexcore
from flexcore import _core

STUB = Path(flexcore.__file__).with_name("_core.pyi")
TREE = ast.parse(STUB.read_text())
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}


def parameters(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Names and defaults, self left out."""
    names = [argument.arg for argument in function.args.args]
    defaults = [None] * (len(names) - len(function.args.defaults)) + [ast.unparse(d) for d in function.args.defaults]
    return [(name, default) for name, default in zip(names, defaults, strict=True) if name != "self"]


def bound_parameters(doc: str) -> list[tuple[str, str | None]]:
    """The same from the first line of a pybind11 docstring: name(self: X, a: object, b: object = None) -> Y."""
    inside = re.match(r"\w+\((.*)\) ->", doc.splitlines()[0])
    assert inside, doc
    out = []
    for part in filter(None, inside[1].split(", ")):
        name, _, rest = part.partition(":")
        default = rest.partition(" = ")[2]
        if name != "self":
            out.append((name, default or None))
    return out


def methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {f.name: f for f in node.body if isinstance(f, ast.FunctionDef) and not f.decorator_list}


def attributes(node: ast.ClassDef) -> list[str]:
    """Fields in order: annotated names and properties."""
    names = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id != "_fields":
            names.append(item.target.id)
        elif isinstance(item, ast.FunctionDef) and any(ast.unparse(d) == "property" for d in item.decorator_list):
            names.append(item.name)
    return names


def test_same_public_names() -> None:
    assert {name for name in vars(_core) if not name.startswith("_")} == set(CLASSES) | set(FUNCTIONS)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_class(name: str) -> None:
    node, bound = CLASSES[name], getattr(_core, name)
    if issubclass(bound, BaseException):
        assert [ast.unparse(base) for base in node.bases] == [base.__name__ for base in bound.__bases__]
        return
    if hasattr(bound, "_fields"):
        assert attributes(node) == list(bound._fields)
    elif "__init__" in methods(node):
        assert parameters(methods(node)["__init__"]) == bound_parameters(bound.__init__.__doc__)
    else:  # an engine makes it
        with pytest.raises(TypeError):
            bound()
    public = {m for m, value in vars(bound).items() if not m.startswith("_") and callable(value)}
    assert public == set(methods(node)) - {"__init__"}
    for method in public:
        assert parameters(methods(node)[method]) == bound_parameters(getattr(bound, method).__doc__), method


@pytest.mark.parametrize(
    "name", [name for name in CLASSES if "__init__" in methods(CLASSES[name]) and name != "Engine"]
)
def test_record_defaults(name: str) -> None:
    made = getattr(_core, name)()
    for field, default in parameters(methods(CLASSES[name])["__init__"]):
        assert default is not None
        if default != "...":
            assert getattr(made, field) == ast.literal_eval(default), field


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_function(name: str) -> None:
    assert parameters(FUNCTIONS[name]) == bound_parameters(inspect.getdoc(getattr(_core, name)) or "")
