"""One way to edit a graph: what is added says where it comes from, what is replaced hands on its value."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx

from ..base.errors import PassError
from .nodes import operator_name, target_name

META = "subgraph_peft"  # in meta["custom"]: the site, the adapter and the term of a node that a rewrite added
ORIGIN = "origin"  # in meta: the name of the node of the model for whose sake another was added
CARRIED = ("custom", "nn_module_stack", "stack_trace")


class Rewriter:
    """Edits of one graph, in place.

    valued:  whether nodes get the values that their operators give for those of their arguments, as every node of an
             equation has one
    changes: how many places have changed
    """

    def __init__(self, graph: fx.Graph, valued: bool = False):
        self.graph, self.valued, self.changes = graph, valued, 0

    def add(
        self, target: Callable, args: tuple, kwargs: Mapping[str, Any] | None = None, *,
        like: fx.Node, before: fx.Node | None = None, name: str | None = None, says: Mapping[str, str] | None = None,
    ) -> fx.Node:  # fmt: skip
        """A node in front of `before` (by default of `like`) that stands for what `like` stands for: it carries the
        site, adapter, term and module of that node, or those that it `says` of itself."""
        name = name or f"{like.name}_{target_name(target)}"
        with self.graph.inserting_before(before or like):
            node = self.graph.create_node("call_function", target, args, dict(kwargs or {}), name=name)
        node.meta = carried(like)
        if says is not None:
            node.meta["custom"] = {META: dict(says)}
        elif META not in node.meta.get("custom", {}):
            node.meta[ORIGIN] = like.name
        if self.valued:
            node.meta["val"] = value_of(node)
        return node

    def change(self, node: fx.Node, target: Callable, args: tuple) -> None:
        """Another operator in the place of a node's own. A place has changed."""
        node.target, node.args = target, args
        self.changes += 1

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """One value in the place of another, which goes. A place has changed."""
        self.replace_all({node: by})

    def replace_all(self, pairs: Mapping[fx.Node, fx.Node]) -> None:
        """Several values at once, readers before what they read. One place has changed."""
        for node, by in pairs.items():
            if "val" in node.meta:
                by.meta.setdefault("val", node.meta["val"])
            node.replace_all_uses_with(by)
            self.graph.erase_node(node)
        self.changes += 1


def carried(node: fx.Node) -> dict[str, Any]:
    """The metadata by which a node says which site, adapter, term and module it belongs to."""
    return {key: node.meta[key] for key in CARRIED if key in node.meta}


def value_of(node: fx.Node) -> Any:
    """What a node's operator gives for the values of its arguments."""
    args, kwargs = (fx.node.map_arg(part, lambda source: source.meta["val"]) for part in (node.args, node.kwargs))
    return node.target(*args, **kwargs)


def copied(
    graph: fx.Graph, known: Mapping[fx.Node, Any], emit: Callable[[fx.Node, tuple, dict], Any]
) -> dict[fx.Node, Any]:
    """Every operator of a graph once more, by `emit(node, args, kwargs)` with the arguments' own copies. Returns the
    copy of each node; `known` are those of placeholders."""
    copies = dict(known)
    for node in graph.nodes:
        if node.op == "call_function":
            args, kwargs = (fx.node.map_arg(part, copies.__getitem__) for part in (node.args, node.kwargs))
            copies[node] = emit(node, args, kwargs)
    return copies


@contextmanager
def failing_as(who: str) -> Iterator[None]:
    """Turn what goes wrong into a PassError that begins with `who`."""
    try:
        yield
    except PassError as error:
        raise PassError(f"{who}: {error}") from error
    except Exception as error:
        raise PassError(f"{who}: {type(error).__name__}: {error}") from error


def check_added(graph: fx.Graph, known: Collection[str]) -> tuple[fx.Node, ...]:
    """The operators of a well-formed graph whose names are not `known`. Raises PassError for one that does not say
    where it comes from, an error of torch.fx for a graph that is none."""
    graph.lint()
    added = tuple(node for node in graph.nodes if node.op == "call_function" and node.name not in known)
    for node in added:
        if META not in node.meta.get("custom", {}) and ORIGIN not in node.meta:
            raise PassError(
                f"the node {node.name} = {operator_name(node)}(…) does not say where it comes from. Add it with "
                "Rewriter.add(…, like=…), or give it the metadata of the node that it stands for."
            )
    return added
