"""The catalogue: every method of this package, one a file, each its equation."""

from .combination.dora import DoRA
from .extension.lora import LoRA
from .extension.parallel_adapter import ParallelAdapter
from .extension.rslora import RsLoRA
from .reconstruction.bitfit import BitFit
from .reconstruction.ia3 import IA3
from .reconstruction.milora import MiLoRA
from .reconstruction.pissa import PiSSA
from .reconstruction.ssb import SSB
from .reconstruction.ssl import SSL

__all__ = ["IA3", "SSB", "SSL", "BitFit", "DoRA", "LoRA", "MiLoRA", "ParallelAdapter", "PiSSA", "RsLoRA"]
