"""Programs for others: merged ONNX that onnxruntime has been seen to run like torch, adapters as onnxruntime and
huggingface/peft have them, and what a fold changed as a file that a base takes."""

from .apply import apply_delta
from .delta import Delta, to_delta
from .onnx.exporter import to_onnx
from .onnx.report import Drift, ExportReport, Verification
from .onnx.runtime import session
from .onnx.scores import evaluate
from .onnx.verification import verify
from .peft import PeftReport, from_peft, to_peft
from .serving.adapter_file import AdapterReport, to_adapter
from .serving.adapters import Adapters, LoadedAdapter
from .serving.bound import BoundSession
from .serving.decoder import DecoderReport, to_decoder
from .serving.generator import Generator

__all__ = [
    "AdapterReport", "Adapters", "BoundSession", "DecoderReport", "Delta", "Drift", "ExportReport", "Generator",
    "LoadedAdapter", "PeftReport", "Verification", "apply_delta", "evaluate", "from_peft", "session", "to_adapter",
    "to_decoder", "to_delta", "to_onnx", "to_peft", "verify",
]  # fmt: skip
