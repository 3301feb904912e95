"""A compiler for parameter-efficient fine-tuning: a method is its equation."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis import Analysis
    from .analysis_report import write_analysis
    from .analyze import analyze
    from .capture import capture
    from .checkpoint import load, save
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
        MethodWarning,
        PassError,
        SelectorError,
        SubgraphPeftError,
        TrainError,
        TrainWarning,
        VersionError,
    )
    from .evaluate import evaluate
    from .fold import fold
    from .graph_passes import EquationPass, ProgramPass
    from .kernels import kernels, promise
    from .merged import write_to
    from .method import Method, Tensor, Wrapper, frozen, kaiming_uniform, normal, ones, trainable, zeros
    from .options import TrainOptions, TrainResult
    from .penalty import penalty
    from .pipeline import Pipeline
    from .program import Program
    from .rewrite import rewrite
    from .saved import read, write
    from .schedule import schedule
    from .site import Site
    from .sites import sites
    from .step_optimizer import parameter_groups
    from .switches import optimise
    from .train import train
    from .train_step import TrainStep
    from .unflatten import take, unflatten

__version__ = "0.1.0"

__all__ = [
    "Analysis", "AnalysisError", "CacheWarning", "CaptureError", "CaptureWarning", "CheckpointError", "ConfigError",
    "EquationPass", "ExportError", "FoldError", "Method", "MethodError", "MethodWarning", "PassError", "Pipeline",
    "Program", "ProgramPass", "SelectorError", "Site", "SubgraphPeftError", "Tensor", "TrainError", "TrainOptions",
    "TrainResult", "TrainStep", "TrainWarning", "VersionError", "Wrapper", "analyze", "capture", "evaluate", "fold",
    "frozen", "kaiming_uniform", "kernels", "load", "normal", "ones", "optimise", "parameter_groups", "penalty",
    "promise", "read", "rewrite", "save", "schedule", "sites", "take", "train", "trainable", "unflatten", "write",
    "write_analysis", "write_to", "zeros",
]  # fmt: skip

# module -> its public names, imported when one is first asked for: torch takes a second, and the help none of it
_MODULES = {
    "analysis": "Analysis",
    "analysis_report": "write_analysis",
    "analyze": "analyze",
    "capture": "capture",
    "checkpoint": "load save",
    "errors": "AnalysisError CacheWarning CaptureError CaptureWarning CheckpointError ConfigError ExportError "
    "FoldError MethodError MethodWarning PassError SelectorError SubgraphPeftError TrainError TrainWarning "
    "VersionError",
    "evaluate": "evaluate",
    "fold": "fold",
    "graph_passes": "EquationPass ProgramPass",
    "kernels": "kernels promise",
    "merged": "write_to",
    "method": "Method Tensor Wrapper frozen kaiming_uniform normal ones trainable zeros",
    "options": "TrainOptions TrainResult",
    "penalty": "penalty",
    "pipeline": "Pipeline",
    "program": "Program",
    "rewrite": "rewrite",
    "saved": "read write",
    "schedule": "schedule",
    "sites": "Site sites",
    "step_optimizer": "parameter_groups",
    "switches": "optimise",
    "train": "train",
    "train_step": "TrainStep",
    "unflatten": "take unflatten",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A module with the name of a public function does not take its place when it is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
