"""Methods that constrain the factors A and B of another method."""

from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Wrapper
from subgraph_peft.method.tensors import Tensor


class FactorWrapper(Wrapper):
    """A wrapper of methods with trained factors A [r, in] and B [out, r]."""

    def tensors(self, site: Site) -> dict[str, Tensor]:
        declared = self.of.tensors(site)
        for name in ("A", "B"):
            if name not in declared or not declared[name].trainable:
                raise MethodError(
                    f"{self.name} needs a method with trained factors A and B; {self.of.name} has no such {name}."
                )
        return declared
