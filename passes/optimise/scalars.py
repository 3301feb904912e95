from typing import ClassVar

from torch import fx

from subgraph_peft.graphs import aten
from subgraph_peft.module import GraphModel
from subgraph_peft.optimise import Optimisation

from .factors import derived, factor


class Scalars(Optimisation):
    """s (x Aᵀ) = x (s A)ᵀ

    A number that multiplies the result of a small factor multiplies the factor, before it is cast: the factor is read
    and cast in any case, the result has a row for every token.
    """

    name: ClassVar[str] = "scalars"

    def apply(self, graph: fx.Graph, owner: GraphModel) -> int:
        changed = 0
        for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            product, number = node.args
            if not isinstance(number, float) or not isinstance(product, fx.Node) or len(product.users) > 1:
                continue
            small = factor(product)
            if small is None:
                continue
            cast = small.target is aten.to.dtype and len(small.args) == 2
            held = small.args[0] if cast else small
            with graph.inserting_before(product):
                scaled = derived(graph, node, aten.mul.Tensor, (held, number), like=held)
                scaled = derived(graph, node, aten.to.dtype, (scaled, small.args[1]), like=small) if cast else scaled
                product.args = (product.args[0], scaled)
            node.replace_all_uses_with(product)
            graph.erase_node(node)
            changed += 1
        return changed
