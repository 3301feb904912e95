"""Folded weights as a model folder."""

import copy
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from .errors import FoldError
from .files import replacing
from .program import Program
from .sources import quiet


def save_merged(program: Program, model: nn.Module | None, tokenizer: Any, folder: str | Path) -> None:
    """The folded weights: as `save_pretrained` writes them where the model has it, else `model.safetensors`.

    The model itself keeps its weights. The folder appears whole; an older one is replaced.
    """
    folder = Path(folder)
    if not hasattr(model, "save_pretrained"):
        tensors = {name: t.detach().contiguous() for name, t in program.module.state_dict().items()}
        with replacing(folder / "model.safetensors", FoldError) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        return
    dtype = program.module.home.dtype
    merged = copy.deepcopy(model).to(dtype)
    program.write_to(merged)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            target = Path(temporary) / "model"
            with quiet():
                merged.save_pretrained(target)
            if tokenizer is not None:
                tokenizer.save_pretrained(target)
            if folder.exists():
                folder.rename(Path(temporary) / "former")
            target.rename(folder)
    except OSError as error:
        raise FoldError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another folder or free space."
        ) from error
