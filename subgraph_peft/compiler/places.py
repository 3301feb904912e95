"""Where a method can rewrite a program: the candidate sites, by what the method defines."""

from collections.abc import Iterator

from ..base.patterns import patterns
from ..graph.sequence.attention import attention_sites
from ..graph.sequence.token_embedding import sequence_sites
from ..graph.site import VECTORS, Site
from ..method.method import Method
from ..program.modules import module_sites, unfit
from ..program.program import Program
from ..program.selectors import Where
from ..program.sites import find


def candidates(program: Program, method: Method) -> list[Site]:
    """Sites of the captured program among which a selector chooses for `method`."""
    return list(found(program, method))


def found(program: Program, method: Method) -> Iterator[Site]:
    every = list(find(program))
    if method.every_parameter:
        yield from every
    elif method.defines("weight") or method.defines("output"):
        yield from (site for site in every if site.kind not in VECTORS)
    elif method.defines("bias"):
        yield from (site for site in every if site.kind == "bias")
    if method.defines("output"):
        yield from module_sites(program)
    if method.defines("embeddings"):
        yield from sequence_sites(program.captured.graphs()[0])
    if method.defines("keys_values"):
        yield from attention_sites(program.captured.graphs()[0], program.source)


def unusable(program: Program, method: Method, where: Where) -> str | None:
    """Why a module that a selector names is no place for `method`, if it names one."""
    if not method.defines("output") or callable(where):
        return None
    return unfit(program, lambda path: any(pattern.match((path,)) == "named" for pattern in patterns(where)))


def what(method: Method) -> str:
    """What a method rewrites, in words."""
    named = {
        "weight": "weights",
        "output": "the results of layers and modules",
        "bias": "biases",
        "embeddings": "an embedded sequence",
        "keys_values": "the keys and values of attention",
    }
    return next((text for part, text in named.items() if method.defines(part)), "nothing")
