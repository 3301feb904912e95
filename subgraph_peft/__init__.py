"""A compiler for parameter-efficient fine-tuning: a method is its equation."""

from .analysis import Analysis
from .analyze import analyze
from .capture import capture
from .checkpoint import load
from .errors import (
    AnalysisError,
    CacheWarning,
    CaptureError,
    CaptureWarning,
    CheckpointError,
    ConfigError,
    ExportError,
    FoldError,
    MethodError,
    SelectorError,
    SubgraphPeftError,
    TrainError,
    TrainWarning,
)
from .evaluate import evaluate
from .fold import fold
from .kernels import kernels
from .method import Method, Tensor, Wrapper, frozen, kaiming_uniform, normal, ones, trainable, zeros
from .optimise import optimise
from .pipeline import Pipeline
from .program import Program
from .rewrite import rewrite
from .saved import read
from .sites import Site, sites
from .train import TrainOptions, TrainResult, parameter_groups, train
from .train_step import TrainStep
from .unflatten import unflatten

__version__ = "0.1.0"

__all__ = [
    "Analysis", "AnalysisError", "CacheWarning", "CaptureError", "CaptureWarning", "CheckpointError", "ConfigError",
    "ExportError", "FoldError", "Method", "MethodError", "Pipeline", "Program", "SelectorError", "Site",
    "SubgraphPeftError", "Tensor", "TrainError", "TrainOptions", "TrainResult", "TrainStep", "TrainWarning", "Wrapper",
    "analyze", "capture", "evaluate", "fold", "frozen", "kaiming_uniform", "kernels", "load", "normal", "ones",
    "optimise", "parameter_groups", "read", "rewrite", "sites", "train", "trainable", "unflatten", "zeros",
]  # fmt: skip
