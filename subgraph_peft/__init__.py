"""A compiler for parameter-efficient fine-tuning: a method is its equation."""

from importlib import import_module
from typing import Any

from lazy_loader import attach_stub

__version__ = "0.1.0"
_public, __dir__, __all__ = attach_stub(__name__, __file__)  # torch takes a second to import, the help none of it


def __getattr__(name: str) -> Any:
    if name == "capture":
        import_module(".store.program_file", __name__)  # a program pickles as its file
    return _public(name)
