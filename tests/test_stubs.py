"""The typed stub of the core says what the module has: names, methods, parameter names."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from vmalloc import _core

STUB = ast.parse((Path(__file__).parent.parent / "vmalloc" / "_core.pyi").read_text())
ONLY_IN_STUB = {"ArenaStats"}  # a TypedDict: what stats() returns


def stub_functions(body):
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def stub_classes():
    return {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}


def stub_parameters(node):
    args = node.args
    return [
        arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs) if arg.arg != "self"
    ]


def module_parameters(function):
    """Parameter names in the first line of a pybind11 docstring."""
    signature = (function.__doc__ or "").splitlines()[0]
    inside = signature[signature.index("(") + 1 : signature.rindex(")")]
    inside = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", inside))
    names = [part.split(":")[0].strip() for part in inside.split(",")]
    return [name for name in names if name and name not in ("self", "*", "/")]


def public(names):
    return {name for name in names if not name.startswith("_")}


def test_names_of_the_module():
    in_stub = {*stub_functions(STUB.body), *stub_classes()} | {
        node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)
    }
    assert public(in_stub) - ONLY_IN_STUB == public(dir(_core))


@pytest.mark.parametrize("name", sorted(stub_functions(STUB.body)))
def test_function_parameters(name):
    assert stub_parameters(stub_functions(STUB.body)[name]) == module_parameters(
        getattr(_core, name)
    )


@pytest.mark.parametrize("name", sorted(set(stub_classes()) - ONLY_IN_STUB - {"Fault"}))
def test_methods_and_their_parameters(name):
    cls = getattr(_core, name)
    methods = stub_functions(stub_classes()[name].body)
    own = {n for n in vars(cls) if not n.startswith("_")}
    assert public(methods) == own
    for method, node in methods.items():
        member = inspect.getattr_static(cls, method)
        if isinstance(member, property):
            continue
        if method.startswith("__") and method != "__init__":
            continue
        assert stub_parameters(node) == module_parameters(getattr(cls, method)), method


def test_stats_keys():
    from tests.arenas import make_arena

    fields = [
        n.target.id for n in stub_classes()["ArenaStats"].body if isinstance(n, ast.AnnAssign)
    ]
    assert fields == list(make_arena().stats())
