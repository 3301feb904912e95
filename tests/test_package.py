"""The package as it is installed: what it declares, and what its import and its command line cost."""

import ast
import re
import subprocess
import sys
import tomllib
import types
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import subgraph_peft as sp

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("subgraph_peft", "passes", "export") for path in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distribution(text: str) -> str:
    """The name in a requirement, as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text)[0]).lower()


OPTIONAL = [text for name, texts in PROJECT["optional-dependencies"].items() if name != "test" for text in texts]
DECLARED = {distribution(text) for text in (*PROJECT["dependencies"], *OPTIONAL)}


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of packages that are imported absolutely."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"subgraph_peft"}


def test_every_import_is_declared() -> None:
    providers = packages_distributions()
    undeclared = set()
    for path in FILES:
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            if not {distribution(text) for text in providers.get(name, [name])} & DECLARED:
                undeclared.add(f"{path.relative_to(ROOT)}: {name}")
    assert not undeclared


def modules_after(statement: str) -> set[str]:
    """What is loaded when a fresh process has run a statement."""
    code = f"import sys\n{statement}\nprint('\\n', *sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


HEAVY = {"torch", "transformers", "numpy", "sympy", "onnx", "matplotlib", "accelerate"}


@pytest.mark.parametrize("command", ["--help", "run --help", "--version"])
def test_help_loads_nothing_heavy(command: str) -> None:
    ask = f"from subgraph_peft.cli import app\ntry: app({command.split()!r})\nexcept SystemExit: pass"
    loaded = modules_after(ask)
    assert not loaded & HEAVY
    assert "subgraph_peft.cli" in loaded and "subgraph_peft.pipeline.passes" not in loaded


def test_the_import_of_the_package_loads_nothing_but_itself() -> None:
    loaded = modules_after("import subgraph_peft")
    assert not loaded & HEAVY and not {name for name in loaded if name.startswith("subgraph_peft.")}


def test_every_public_name_is_there_however_it_is_asked_for() -> None:
    assert set(sp.__all__) <= set(dir(sp))
    for name in sp.__all__:
        value = getattr(sp, name)
        assert not isinstance(value, types.ModuleType) and value.__module__.startswith("subgraph_peft."), name
    with pytest.raises(AttributeError, match="captures"):
        sp.captures  # noqa: B018


# each in a child of a process that has imported what is heavy, and nothing of this package
VERBS = """
import os, torch, transformers
for first in ("import subgraph_peft.store.program_file", "import subgraph_peft.cli"):
    for name in ("capture", "fold", "train", "sites", "optimise"):
        child = os.fork()
        if not child:
            exec(f"{first}\\nfrom subgraph_peft import {name}\\nassert {name}.__call__ and {name}.__code__")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, (first, name)
"""


def test_a_verb_stays_a_function_whatever_was_imported_before() -> None:
    assert not {name for name in modules_after(VERBS) if name.startswith("subgraph_peft")}


def test_type_checkers_see_what_is_exported() -> None:
    """The stub gives every name again under its own, and its home is where the name is defined."""
    tree = ast.parse(Path(sp.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imported_from = {
        alias.name: f"subgraph_peft.{node.module}"
        for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname == alias.name
    }  # fmt: skip
    assert imported_from == {name: getattr(sp, name).__module__ for name in sp.__all__}
