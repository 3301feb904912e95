"""How the source is built."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import subgraph_peft as sp
from subgraph_peft import export, passes

LONGEST = 60
ROOTS = [Path(package.__file__).parent for package in (sp, passes, export)]


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """(name, lines of code) of functions with too many; docstring, signature, comments and empty lines do not count."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            code = lines[body[0].lineno - 1 : body[-1].end_lineno] if body else []
            length = sum(bool(text := line.strip()) and not text.startswith("#") for line in code)
            if length > LONGEST:
                yield node.name, length


@pytest.mark.parametrize(("lines", "found"), [(60, []), (61, [("f", 61)])])
def test_lines_of_code_are_counted(lines, found):
    head = 'def f(\n    x: int,\n):\n    """A\n\n    docstring."""\n    # why\n\n'
    assert list(long_functions(head + "    x = 1\n" * lines)) == found


def test_no_function_is_longer_than_sixty_lines():
    files = {path for root in ROOTS for path in root.rglob("*.py")}
    assert len(files) > 150
    assert not {str(path): found for path in files if (found := list(long_functions(path.read_text())))}
