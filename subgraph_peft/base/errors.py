"""Every error says what went wrong, where, and what to do about it."""

import difflib
from collections.abc import Iterable


class SubgraphPeftError(Exception):
    """Root of all errors raised on purpose by this package."""


class OptionError(SubgraphPeftError):
    """Of options. `option` has the keys down to the one at fault, where it is one."""

    def __init__(self, *args: object, option: tuple[str, ...] = ()):
        super().__init__(*args)
        self.option = option


class CaptureError(SubgraphPeftError):
    """A model could not be captured, or a captured module was called in a way its graph cannot serve."""


class SelectorError(SubgraphPeftError):
    """A selector is malformed, matches nothing, or matches what must not be touched."""


class MethodError(OptionError):
    """A method is unknown, has wrong options, or cannot be applied to a site."""


class PassError(SubgraphPeftError):
    """A pass over a graph failed, broke the graph, or cannot be ordered among the others."""


class FoldError(SubgraphPeftError):
    """Folding would give non-finite, unfaithful or lossy weights."""


class CheckpointError(SubgraphPeftError):
    """An adapter file is missing, damaged, or belongs to something else."""


class TrainError(SubgraphPeftError):
    """Training cannot start, or diverged."""


class AnalysisError(SubgraphPeftError):
    """A program or a site has nothing to analyze, or the results cannot be written."""


class ExportError(SubgraphPeftError):
    """An ONNX model could not be written, or does not reproduce the torch outputs."""


class ConfigError(OptionError):
    """A pipeline configuration is invalid."""


class VersionError(SubgraphPeftError):
    """A library is of a version without something that this package needs of it."""


class CaptureWarning(UserWarning):
    """The captured graph is narrower than the model it came from."""


class TrainWarning(UserWarning):
    """Training runs, but slower than was asked for."""


class MethodWarning(UserWarning):
    """A method does what it was asked for, but slower than it could."""


class CacheWarning(UserWarning):
    """A cached file is damaged, and what it held is computed again."""


def first_line(error: Exception) -> str:
    """What an error says first; where it says nothing, its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.0) -> list[str]:
    """The `n` known names most similar to `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=n, cutoff=cutoff)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'lora'?"`, or the empty string."""
    close = nearest(name, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
