"""Programs for others: merged ONNX that onnxruntime has been seen to run like torch, adapters as huggingface/peft has
them."""

from .bound import BoundSession
from .exporter import to_onnx
from .peft import PeftReport, from_peft, to_peft
from .report import Drift, ExportReport, Verification
from .runtime import session
from .scores import evaluate
from .verification import verify

__all__ = [
    "BoundSession", "Drift", "ExportReport", "PeftReport", "Verification", "evaluate", "from_peft", "session", "to_onnx", "to_peft",
    "verify",
]  # fmt: skip
