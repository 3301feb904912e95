"""Programs for others: merged ONNX that onnxruntime has been seen to run like torch, adapters as onnxruntime and
huggingface/peft have them, and what a fold changed as a file that a base takes."""

from .adapter_file import AdapterReport, to_adapter
from .adapters import Adapters, LoadedAdapter
from .apply import apply_delta
from .bound import BoundSession
from .decoder import DecoderReport, to_decoder
from .delta import Delta, to_delta
from .exporter import to_onnx
from .generator import Generator
from .peft import PeftReport, from_peft, to_peft
from .report import Drift, ExportReport, Verification
from .runtime import session
from .scores import evaluate
from .verification import verify

__all__ = [
    "AdapterReport", "Adapters", "BoundSession", "DecoderReport", "Delta", "Drift", "ExportReport", "Generator",
    "LoadedAdapter", "PeftReport", "Verification", "apply_delta", "evaluate", "from_peft", "session", "to_adapter",
    "to_decoder", "to_delta", "to_onnx", "to_peft", "verify",
]  # fmt: skip
