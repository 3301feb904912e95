"""Constants: what an equation computes from no trainable tensor, computed once and read from a buffer."""

from collections.abc import Mapping

import torch
from torch import fx

from ..graph.nodes import evaluate_node
from ..method.stacks import stacked
from ..program.module import GraphModel
from ..program.records import Constant
from ..program.tree import attach, named_tensors


@torch.no_grad()
def refresh(module: GraphModel, constants: Mapping[str, Constant]) -> None:
    """Compute the constants of the equations from the tensors as they are now; into the buffers that hold them, where
    there are such, which recorded work goes on reading."""
    tensors = dict(named_tensors(module))
    for path, constant in constants.items():
        value, held = evaluate_constant(constant, tensors), tensors.get(path)
        if held is None or (held.shape, held.dtype, held.device) != (value.shape, value.dtype, value.device):
            attach(module, path, value, persistent=False)
        else:
            held.copy_(value)


def evaluate_constant(constant: Constant, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Computed in float32 or wider; held in the model's dtype when it is as large as the weight."""
    target, equation = constant.target, constant.equation
    dtype = tensors[target.name].dtype
    wide = torch.promote_types(torch.float32, dtype)

    def read(operand: fx.Node) -> torch.Tensor:
        adapter, tensor = equation.operands[operand]
        return tensors[target.path(adapter, tensor)].detach().to(wide) if adapter else target.read(tensors)

    if target.part == "weight" and target.site.stack:
        varying = stacked(equation, target.shared)
        given = {leaf: read(leaf) for leaf in equation.leaves(constant.node)}
        dims = {leaf: 0 if leaf in varying else None for leaf in given}
        over = torch.func.vmap(lambda own: evaluate_node(constant.node, own.__getitem__), in_dims=(dims,))
        result = over(given) if constant.node in varying else evaluate_node(constant.node, given.__getitem__)
    else:
        result = evaluate_node(constant.node, read)
    size = target.site.out_features * target.site.in_features
    full = target.part == "weight" and equation.numel(constant.node) >= size
    return result.to(dtype if full else wide).contiguous()
