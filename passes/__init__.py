"""The catalogue: every method of this package, one a file, each its equation."""

from .combination.dora import DoRA
from .combination.spectral_additive import SpectralAdditive
from .combination.spectral_rotational import SpectralRotational
from .combination.svdiff import SVDiff
from .constraints.blocks import Blocks
from .constraints.mpc_d import MPCd
from .constraints.mpc_n import MPCn
from .constraints.mpc_o import MPCo
from .extension.adalora import AdaLoRA
from .extension.flora import FLoRA
from .extension.houlsby import Houlsby
from .extension.liera import LieRA
from .extension.lora import LoRA
from .extension.lora_dash import LoRADash
from .extension.moslora import MoSLoRA
from .extension.parallel_adapter import ParallelAdapter
from .extension.pfeiffer import Pfeiffer
from .extension.rslora import RsLoRA
from .extension.trilora import TriLoRA
from .extension.vera import VeRA
from .reconstruction.bitfit import BitFit
from .reconstruction.diff_pruning import DiffPruning
from .reconstruction.ia3 import IA3
from .reconstruction.milora import MiLoRA
from .reconstruction.p_tuning import PTuning
from .reconstruction.pissa import PiSSA
from .reconstruction.prefix_tuning import PrefixTuning
from .reconstruction.prompt_tuning import PromptTuning
from .reconstruction.sam_parser import SAMParser
from .reconstruction.ssb import SSB
from .reconstruction.ssl import SSL

__all__ = [
    "AdaLoRA",
    "BitFit",
    "Blocks",
    "DiffPruning",
    "DoRA",
    "FLoRA",
    "Houlsby",
    "IA3",
    "LieRA",
    "LoRA",
    "LoRADash",
    "MiLoRA",
    "MoSLoRA",
    "MPCd",
    "MPCn",
    "MPCo",
    "ParallelAdapter",
    "Pfeiffer",
    "PiSSA",
    "PromptTuning",
    "PTuning",
    "PrefixTuning",
    "RsLoRA",
    "SAMParser",
    "SpectralAdditive",
    "SpectralRotational",
    "SSB",
    "SSL",
    "SVDiff",
    "TriLoRA",
    "VeRA",
]
