"""Merged ONNX: a program written as a file that onnxruntime has been seen to run like torch."""

from .exporter import to_onnx
from .report import Drift, ExportReport, Verification
from .runtime import session
from .verification import verify

__all__ = ["Drift", "ExportReport", "Verification", "session", "to_onnx", "verify"]
