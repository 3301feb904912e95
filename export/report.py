"""What an export wrote and how far onnxruntime is from torch."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Drift:
    """Largest difference of one output: absolute, and relative to the output's largest absolute value in torch."""

    absolute: float
    relative: float

    def exceeds(self, bound: float) -> bool:
        """Over the bound by either measure, a difference that is not a number included."""
        return not min(self.absolute, self.relative) <= bound

    def __str__(self) -> str:
        return f"{self.absolute:.1e} absolute, {self.relative:.1e} relative"


@dataclass(frozen=True)
class Verification:
    """A comparison of an ONNX file with torch.

    provider: the execution provider of onnxruntime that ran
    shapes:   input name -> shape, one entry a run
    drift:    output name -> its largest drift over all runs
    bound:    what each drift was held to, absolute or relative
    """

    provider: str
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    drift: Mapping[str, Drift]
    bound: float

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""

        def sizes(run: Mapping[str, tuple[int, ...]]) -> str:
            return "; ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in run.items())

        return [
            ("provider", self.provider),
            *(("checked at", sizes(run)) for run in self.shapes),
            *((f"drift of {name}", str(drift)) for name, drift in self.drift.items()),
            ("bound", f"{self.bound:.0e}"),
        ]


@dataclass(frozen=True)
class ExportReport(Verification):
    """An ONNX file and its verification.

    path, files:  the model, and every file of it
    bytes:        of all files together
    nodes:        in the ONNX graph
    inputs, outputs: name -> shape, with axis names for dynamic dimensions
    fixed:        `x[1]` -> size, dimensions of inputs that do not vary
    holds:        conditions on sizes under which the file is the model, which onnxruntime does not ask
    left_out:     inputs of the program that no exported output needs
    merged:       whether every adapter that folds is folded
    unmerged:     adapters that would fold and were not folded
    remaining:    adapters that do not fold; their nodes are in the file
    """

    path: str
    files: tuple[str, ...]
    bytes: int
    nodes: int
    opset: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    fixed: Mapping[str, int]
    holds: tuple[str, ...]
    left_out: tuple[str, ...]
    unmerged: tuple[str, ...]
    remaining: tuple[str, ...]

    @property
    def merged(self) -> bool:
        return not self.unmerged

    def rows(self) -> list[tuple[str, str]]:
        def shaped(tensors: Mapping[str, tuple[int | str, ...]]) -> str:
            return "; ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in tensors.items())

        rows = [
            ("file", self.path),
            ("bytes", f"{self.bytes:,}"),
            ("nodes", f"{self.nodes:,}"),
            ("opset", str(self.opset)),
            ("inputs", shaped(self.inputs)),
            ("outputs", shaped(self.outputs)),
            ("fixed dimensions", ", ".join(f"{name} = {size}" for name, size in self.fixed.items())),
            ("holds where", "; ".join(self.holds)),
            ("inputs left out", ", ".join(self.left_out)),
            ("not merged", ", ".join(self.unmerged)),
            ("adapters in the graph", ", ".join(self.remaining)),
        ]
        return [*((what, value) for what, value in rows if value), *super().rows()]
