"""What an export wrote and how far onnxruntime is from torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from subgraph_peft.base.text import layered

ROUNDING = 1e-6  # an absolute difference that outputs of any size may have


@dataclass(frozen=True)
class Drift:
    """Difference of one output: the largest, that relative to the output's largest absolute value in torch, and the
    mean of all."""

    absolute: float
    relative: float
    mean: float = 0.0

    def exceeds(self, bound: float) -> bool:
        """Relative to the largest value more than `bound`, and more than rounding; so is what is not a number."""
        return not (self.relative <= bound or self.absolute <= min(bound, ROUNDING))

    def __str__(self) -> str:
        return f"{self.absolute:.1e} at most, {self.relative:.1e} of the largest value, {self.mean:.1e} on average"


@dataclass(frozen=True)
class Verification:
    """A comparison of an ONNX file with torch.

    provider: the execution provider of onnxruntime that ran
    shapes:   input name -> shape, one entry a run
    drift:    output name -> its largest drift over all runs
    bound:    what each drift, relative to the output's largest value, was held to
    """

    provider: str
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]
    drift: Mapping[str, Drift]
    bound: float

    def __and__(self, other: "Verification") -> "Verification":
        """Of two comparisons at the same shapes, the larger drift of each output."""
        worst = {name: max(own, other.drift[name], key=lambda d: d.relative) for name, own in self.drift.items()}
        return replace(self, drift=worst)

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
    dtype:        in which floats are computed and stored
    fused:        operators of onnxruntime's own in the file, by name: how many
    quantize:     bits of the weights of matrix products, None where they are as trained
    before:       drift of the model before it was quantised and fused
    identity:     hash of the captured base, see `subgraph_peft.store.state.fingerprint`
    slots:        weights to which an adapter adds, and tensors that it replaces, at run time
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
    dtype: str
    fused: Mapping[str, int]
    quantize: int | None
    before: Mapping[str, Drift]
    identity: str
    slots: tuple[str, ...] = ()

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
            ("dtype", self.dtype),
            ("fused", ", ".join(f"{count} {name}" for name, count in self.fused.items())),
            ("weights of products", f"{self.quantize} bits" if self.quantize else ""),
            ("inputs", shaped(self.inputs)),
            ("outputs", shaped(self.outputs)),
            ("fixed dimensions", ", ".join(f"{name} = {size}" for name, size in self.fixed.items())),
            ("holds where", "; ".join(self.holds)),
            ("inputs left out", ", ".join(self.left_out)),
            ("not merged", ", ".join(self.unmerged)),
            ("adapters in the graph", ", ".join(self.remaining)),
            ("slots", ", ".join(dict.fromkeys(map(layered, self.slots)))),
            *((f"drift of {name} before", str(drift)) for name, drift in self.before.items()),
        ]
        return [*((what, value) for what, value in rows if value), *super().rows()]
