from typing import ClassVar, Literal

from pydantic import Field

from .pissa import PiSSA


class MiLoRA(PiSSA):
    """φ(W) = (W − s B₀A₀) + s B A,  s = α/r

    PiSSA on the r smallest singular triplets: the residual keeps the principal part. The decomposition is exact.
    Source: Wang et al. 2024, "MiLoRA", Eq. 4.
    """

    name: ClassVar[str] = "milora"
    paper: ClassVar[str] = "arXiv 2406.09044"

    components: Literal["minor"] = Field("minor", description="which singular triplets: the smallest")
    niter: None = Field(None, description="none: the decomposition is exact")
