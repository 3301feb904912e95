"""The form every later pass relies on: a flat graph without assertions and without gradient-mode regions."""

import torch
from torch import fx, nn

from ..base.borrowed import GUARDS_MODULE, get
from ..graph.edit import eliminate_dead_code
from ..graph.nodes import aten, attribute
from ..graph.operators import Kind, is_a
from .recompose import recompose
from .recurrent import restore

GRAD_REGION = get("torch._higher_order_ops.wrap:wrap_with_set_grad_enabled")
AUTOCAST_REGION = get("torch._higher_order_ops.wrap:wrap_with_autocast")


def normalise(root: fx.GraphModule) -> None:
    """Inline gradient-mode and disabled-autocast regions, drop assertions, undo decompositions, sweep what nothing
    reads. In place.

    What enters a region under `no_grad` and can carry a gradient is detached: the region may write to its inputs.
    """
    graph = root.graph
    restore(root)
    inline_regions(root)
    for node in list(graph.nodes):
        if is_a(node, Kind.ASSERTION) or (node.op == "call_module" and str(node.target).startswith(GUARDS_MODULE)):
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "placeholder":
            node.target = node.name
            node.args = ()
    graph.set_codegen(fx.graph.CodeGen())
    recompose(graph)
    see_through_broadcasts(graph)
    read_sizes_early(graph)
    fill_in_captured_dtype(graph)
    eliminate_dead_code(graph)


def see_through_broadcasts(graph: fx.Graph) -> None:
    """A tensor that is broadcast to its own shape is itself, in place: mse_loss broadcasts prediction and target, so
    that the prediction would hang on the target."""
    for node in graph.find_nodes(op="call_function", target=aten.broadcast_tensors.default):
        for part in list(node.users):
            source = node.args[0][part.args[1]]
            if str(part.meta["val"].shape) == str(source.meta["val"].shape):
                part.replace_all_uses_with(source)
                graph.erase_node(part)


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


def fill_in_captured_dtype(graph: fx.Graph) -> None:
    """`x.masked_fill(mask, finfo(x.dtype).min)`, in place: the number is that of the captured dtype, so x is cast to
    it. Under autocast x may be of a dtype that the number does not fit."""
    for node in graph.find_nodes(op="call_function", target=aten.masked_fill.Scalar):
        x, _, value = node.args
        dtype = x.meta["val"].dtype
        wide = dtype.is_floating_point and torch.finfo(dtype).bits > 16
        if wide and torch.finfo(torch.float16).max < abs(value) < torch.inf:
            with graph.inserting_before(node):
                cast = graph.call_function(aten.to.dtype, (x, dtype))
            cast.meta = dict(x.meta)
            node.replace_input_with(x, cast)


def inline_regions(root: fx.GraphModule) -> None:
    """Inline gradient-mode and disabled-autocast regions, in place."""
    while regions := [node for node in root.graph.nodes if region_body(node) is not None]:
        for node in regions:
            inline(root, node)


def region_body(node: fx.Node) -> tuple[fx.Node, tuple] | None:
    """(get_attr of the body, its operands) of a region that may be inlined."""
    if node.target is GRAD_REGION:
        return node.args[1], node.args[2:]
    if node.target is AUTOCAST_REGION and node.args[2] is False:
        return node.args[4], node.args[5:]
    return None


def inline(root: fx.GraphModule, node: fx.Node) -> None:
    body, operands = region_body(node)
    inner: fx.GraphModule = root.get_submodule(str(body.target))
    graph = root.graph
    without_gradient = node.args[0] is False
    replaced: dict[fx.Node, object] = {}

    def detached(operand: fx.Node) -> fx.Node:
        inside = graph.call_function(aten.detach.default, (operand,))
        inside.meta = dict(operand.meta)
        return inside

    arguments = iter(operands)
    with graph.inserting_before(node):
        for inside in inner.graph.nodes:
            if inside.op == "placeholder":
                operand = next(arguments)
                carries = without_gradient and carries_gradient(root, operand)
                replaced[inside] = detached(operand) if carries else operand
            elif inside.op == "get_attr":
                root.add_submodule(f"{body.target}_{inside.target}", inner.get_submodule(str(inside.target)))
                replaced[inside] = graph.get_attr(f"{body.target}_{inside.target}")
            elif inside.op == "output":
                results = fx.node.map_arg(inside.args[0], replaced.__getitem__)
            else:
                replaced[inside] = graph.node_copy(inside, replaced.__getitem__)
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
        if value is not None and not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        if current.op == "placeholder":
            return True
        if current.op == "get_attr" and isinstance(attribute(root, str(current.target)), nn.Parameter):
            return True
        stack.extend(current.all_input_nodes)
    return False
