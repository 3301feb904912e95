"""A module on one screen: its call, its size, and its tensors with the layers of one kind on one line."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .module import GraphModel

LINES = 24


def outline(module: "GraphModel") -> str:
    """Call signature, size and state, then one line for each group of modules whose paths differ in numbers alone."""
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    groups: dict[str, dict[str, list]] = {}
    for name, tensor in module.tensors():
        owner, _, leaf = name.rpartition(".")
        held = groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", owner), {})
        held.setdefault(f"{leaf} {list(tensor.shape)}", []).append(tensor)
    width = min(60, max((len(path) for path in groups), default=0))
    lines = []
    for path, held in groups.items():
        count = max(map(len, held.values()))
        trains = any(tensor.requires_grad for tensors in held.values() for tensor in tensors)
        text = f"  {path:<{width}}  {', '.join(held)}{f'  × {count}' if count > 1 else ''}"
        lines.append(f"{text}{'  trains' if trains else ''}")
    if len(lines) > LINES:
        lines = [*lines[:LINES], f"  … and {len(lines) - LINES} more"]
    signature, home = module.signature, module.home
    call = f"{type(module).__name__}({', '.join(signature.inputs)}) → {', '.join(signature.output_names())}"
    size = f"{sum(sizes.values()):,} parameters, {trainable:,} of them train; {len(module.graph.nodes)} nodes"
    state = f"{str(home.dtype).removeprefix('torch.')} on {home.device}, {'train' if module.training else 'eval'} mode"
    return "\n".join([call, f"  {size}; {state}", *lines])
