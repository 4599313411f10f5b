"""The typed face of the C extension is what the extension has."""

from __future__ import annotations

import ast
from pathlib import Path

from motorcade.core import _native

STUB = Path(__file__).resolve().parents[2] / "core" / "_native.pyi"


def test_the_stub_names_exactly_what_lib_has() -> None:
    tree = ast.parse(STUB.read_text())
    [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "_Lib"]
    named = {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    named |= {n.name for n in body if isinstance(n, ast.FunctionDef)}
    assert named == set(dir(_native.lib))


def test_the_stub_s_functions_take_as_many_arguments() -> None:
    tree = ast.parse(STUB.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and hasattr(_native.lib, node.name):
            ctype = _native.ffi.typeof(getattr(_native.lib, node.name))
            assert len(node.args.posonlyargs or node.args.args) - 1 == len(ctype.args), node.name
