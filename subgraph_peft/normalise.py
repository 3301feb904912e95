"""The form every later pass relies on: a flat graph without assertions and without gradient-mode regions."""

import torch
from torch import fx, nn

from .graphs import aten, sweep

ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
GRAD_REGION = "wrap_with_set_grad_enabled"
AUTOCAST_REGION = "wrap_with_autocast"


def normalise(root: fx.GraphModule) -> None:
    """Inline gradient-mode and disabled-autocast regions, drop assertions, sweep what nothing reads. In place.

    A region under `no_grad` whose inputs can carry a gradient keeps its meaning: its outputs are detached.
    """
    graph = root.graph
    while regions := [node for node in graph.nodes if region_body(node) is not None]:
        for node in regions:
            inline(root, node)
    for node in list(graph.nodes):
        if node.target in ASSERTIONS or (node.op == "call_module" and str(node.target).startswith("_guards")):
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = node.name
            node.args = ()
    graph.set_codegen(fx.graph.CodeGen())
    read_sizes_early(graph)
    sweep(graph)


def read_sizes_early(graph: fx.Graph) -> None:
    """Read every dynamic size from the first input that has it, in place: a batch size must not hang on the labels."""
    first: dict[str, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for dimension, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt):
                first.setdefault(str(size), (node, dimension))
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        node.args = first.get(str(node.meta.get("val")), node.args)


def region_body(node: fx.Node) -> tuple[fx.Node, tuple] | None:
    """(get_attr of the body, its operands) of a region that may be inlined."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    if name == GRAD_REGION:
        return node.args[1], node.args[2:]
    if name == AUTOCAST_REGION and node.args[2] is False:
        return node.args[4], node.args[5:]
    return None


def inline(root: fx.GraphModule, node: fx.Node) -> None:
    body, operands = region_body(node)
    inner: fx.GraphModule = root.get_submodule(str(body.target))
    graph = root.graph
    detached = node.args[0] is False and any(carries_gradient(root, operand) for operand in operands)
    replaced: dict[fx.Node, object] = {}
    arguments = iter(operands)
    with graph.inserting_before(node):
        for inside in inner.graph.nodes:
            if inside.op == "placeholder":
                replaced[inside] = next(arguments)
            elif inside.op == "get_attr":
                root.add_submodule(f"{body.target}_{inside.target}", inner.get_submodule(str(inside.target)))
                replaced[inside] = graph.get_attr(f"{body.target}_{inside.target}")
            elif inside.op == "output":
                results = fx.node.map_arg(inside.args[0], replaced.__getitem__)
            else:
                replaced[inside] = graph.node_copy(inside, replaced.__getitem__)
        if detached:
            results = fx.node.map_arg(results, lambda n: graph.call_function(aten.detach.default, (n,)))
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def carries_gradient(root: nn.Module, node: object) -> bool:
    """Whether a value can depend, differentiably, on a parameter or on a floating-point input."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if not isinstance(current, fx.Node) or current in seen:
            continue
        seen.add(current)
        value = current.meta.get("val")
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            continue
        if current.op == "placeholder":
            return True
        if current.op == "get_attr" and isinstance(attribute(root, str(current.target)), nn.Parameter):
            return True
        stack.extend(current.all_input_nodes)
    return False


def attribute(root: nn.Module, path: str) -> object:
    value: object = root
    for part in path.split("."):
        value = getattr(value, part)
    return value
