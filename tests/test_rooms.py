"""The rooms of the package import those below them, and no file imports itself through others."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec, resolve_name
from pathlib import Path

import pytest

LAYERS = (
    "base", "graph", "method", "program", "frontend compiler", "store", "training", "analysis", "export", "pipeline",
    "cli",
)  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms.split()}
SHOWN = ("subgraph_peft", "subgraph_peft.export", "subgraph_peft.passes")


def modules() -> dict[str, Path]:
    """Module name -> its file, of the whole package."""
    found = {}
    for package in SHOWN:
        root = Path(find_spec(package).origin).parent
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


FILES = modules()


def imported(name: str, source: str) -> set[str]:
    """The modules of the package that a file imports, inside functions and under TYPE_CHECKING too."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & (FILES.keys() - {name})


def room(name: str) -> str:
    return (name.split(".") + ["cli"])[1]


def upward(name: str, others: set[str]) -> list[str]:
    """Those that the rule of the rooms keeps `name` from importing."""
    mine, wrong = room(name), []
    for other in others:
        theirs = room(other)
        if theirs == mine:
            continue
        if mine == "passes":
            allowed = theirs != "passes" and RANK[theirs] <= RANK["program"]
        elif theirs == "passes":
            allowed = RANK[mine] >= RANK["export"]
        else:
            allowed = RANK[theirs] < RANK[mine]
        if not allowed:
            wrong.append(f"{name} → {other}")
    return wrong


IMPORTS = {name: imported(name, path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def test_rooms_import_those_below():
    assert not [arrow for name, others in IMPORTS.items() for arrow in upward(name, others)]


def test_no_file_imports_itself_through_others():
    list(TopologicalSorter(IMPORTS).static_order())


@pytest.mark.parametrize(
    "source",
    ["from ..program import program", "def f():\n    from ..program.program import Program",
     "if TYPE_CHECKING:\n    from subgraph_peft.program import sites", "import subgraph_peft.passes.extension.lora"],
)  # fmt: skip
def test_an_arrow_up_is_found_wherever_it_stands(source):
    assert upward("subgraph_peft.graph.uses", imported("subgraph_peft.graph.uses", source))


def test_a_circle_is_found():
    circle = {"subgraph_peft.base.errors": {"subgraph_peft.base.files"}}
    with pytest.raises(CycleError):
        list(TopologicalSorter(IMPORTS | circle).static_order())


def test_a_room_says_in_one_line_what_it_is():
    rooms = [path for name, path in FILES.items() if name.count(".") == 1 and path.name == "__init__.py"]
    rooms = [path for path in rooms if path.parent.name in RANK and path.parent.name != "export"]
    assert len(rooms) == len(RANK) - 2  # export is public, cli a file
    for path in rooms:
        text = path.read_text(encoding="utf-8")
        assert text == f'"""{ast.get_docstring(ast.parse(text))}"""\n' and text.count("\n") == 1, path
