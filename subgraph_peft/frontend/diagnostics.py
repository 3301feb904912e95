"""Why a model cannot be captured: which weight or which line of its source stands in the way, and what to do."""

import inspect
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from ..base.borrowed import holds_packed_weights, is_traceable_wrapper_subclass
from ..base.errors import CaptureError
from ..graph.nodes import backward_slice
from ..graph.operators import CONTRACTIONS, is_a

UNWRAP = "capture its .module, and wrap program.module instead"
UNSHARD = "capture the model before it is sharded, and shard program.module instead"
# class of torch that holds a model -> what it does, what to do
WRAPPERS = {
    "DistributedDataParallel": ("wraps a model for several processes", UNWRAP),
    "DataParallel": ("wraps a model for several devices", UNWRAP),
    "FullyShardedDataParallel": ("holds a shard of its weights (FSDP)", UNSHARD),
    "FSDPModule": ("holds a shard of its weights (FSDP)", UNSHARD),
    "ScriptModule": ("is a TorchScript module", "capture the Python model that it was made from"),
}
UNQUANTISED = "Load the model unquantised: an adapter cannot be folded into quantised weights"
# what a failed trace says -> what to do
ADVICE = {
    r"data-dependent|GuardOnDataDependent|Could not guard|DynamicControlFlow|bool\(\)|\.item\(\)": (
        "Control flow depends on tensor values: rewrite that line with torch.where or torch.cond, or move it out of "
        "forward."
    ),
    r"numpy\(\)|can't convert|SymBool|fake tensor.*(data_ptr|storage)": (
        "That line takes values out of torch: compute them with torch operators, or outside of forward."
    ),
    r"[Cc]onstraints violated|specializ|marked as dynamic|dynamic_shapes": (
        "A dimension asked to vary cannot: pass dynamic={'input_name': [dimensions]} with those that can."
    ),
}


def check_model(model: nn.Module) -> None:
    """Refuse a model whose weights a graph cannot hold: wrapped, sharded, scripted, quantised, complex, uninitialised.

    Raises CaptureError.
    """
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in WRAPPERS and cls.__module__.startswith("torch."):
                what, advice = WRAPPERS[cls.__name__]
                refuse(model, path, f"{named(path, module)} {what}: {advice}.")
        if holds_packed_weights(module):
            refuse(model, path, f"{named(path, module)} holds packed, quantised weights. {UNQUANTISED}.")
        check_names(path, module)
    devices: dict[torch.device, str] = {}
    for path, parameter in model.named_parameters():
        shown = f"{path} [{', '.join(map(str, parameter.shape))}] {parameter.dtype}" if not is_lazy(parameter) else path
        if is_lazy(parameter):
            refuse(model, path, f"{path} is not initialised: call the model once on its inputs first.")
        if hasattr(parameter, "device_mesh"):
            refuse(model, path, f"{path} is a {type(parameter).__name__}, a shard of a weight: {UNSHARD}.")
        if parameter.is_complex():
            advice = "Keep it as real and imaginary parts (torch.view_as_real) and join them in forward"
            refuse(model, path, f"{shown} is complex, which adapters and their equations are not. {advice}.")
        if is_quantised(parameter):
            refuse(model, path, f"{shown} ({type(parameter).__name__}) is quantised. {UNQUANTISED}.")
        if parameter.ndim:
            devices.setdefault(parameter.device, path)
    if len(devices) > 1:
        places = ", ".join(f"{path} on {device}" for device, path in devices.items())
        raise CaptureError(f"The model is spread over devices ({places}): move it to one of them and capture it there.")


def check_names(path: str, module: nn.Module) -> None:
    """Refuse a child or tensor that a method of nn.Module hides, as setattr allows: `self.train = nn.Linear(…)`."""
    held = (module.named_children(), module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    for name in (name for several in held for name, _ in several):
        if name in vars(module) or hasattr(nn.Module, name):
            raise CaptureError(
                f"{f'{path}.{name}'.lstrip('.')} has the name of an attribute of nn.Module, which hides it. Give it "
                "another name."
            )


def is_quantised(tensor: torch.Tensor) -> bool:
    """Whether a parameter holds its values in 8 bits or fewer, or in a tensor type of its own."""
    own = is_traceable_wrapper_subclass(tensor)
    return own or tensor.is_quantized or hasattr(tensor, "quant_state") or (is_narrow(tensor) and tensor.ndim > 1)


def is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype.itemsize == 1 and tensor.dtype is not torch.bool


def check_graph(graph: fx.Graph) -> None:
    """Refuse a weight that the graph makes from a table of 8 bits or fewer, larger than all else that it is made of.

    Raises CaptureError.
    """
    activations: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or activations.intersection(node.all_input_nodes):
            activations.add(node)
        for operand in node.all_input_nodes if is_a(node, CONTRACTIONS) else ():
            if operand not in activations:
                check_weight(node, operand)


def check_weight(node: fx.Node, weight: fx.Node) -> None:
    held = [(n, n.meta["val"]) for n in backward_slice(weight) if n.op == "get_attr" and "val" in n.meta]
    table, value = max(held, key=lambda pair: (pair[1].numel(), not is_narrow(pair[1])), default=(None, None))
    if table is not None and is_narrow(value) and value.ndim > 1:
        line = user_line(str(node.meta.get("stack_trace", "")))
        raise CaptureError(
            f"The weight of {node.name} is {table.target}, quantised to {value.dtype}. {UNQUANTISED}."
            + (f"\n  at {line}" if line else "")
        )


def named(path: str, module: nn.Module) -> str:
    kind = repr(module).partition("(")[0]  # what it calls itself: several quantised layers are named as the plain one
    return f"{path or 'The model'} ({kind})"


def refuse(model: nn.Module, path: str, text: str) -> None:
    line = declared(model, path)
    raise CaptureError(text + (f"\n  at {line}" if line else ""))


def declared(model: nn.Module, path: str) -> str:
    """`file:line: text` of the line that sets a parameter or a module in the source of the module that owns it, or of
    the nearest one above that is not torch's."""
    names = path.split(".") if path else []
    for depth in reversed(range(len(names))):
        owner = model.get_submodule(".".join(names[:depth]))
        for cls in type(owner).__mro__:
            if cls.__module__.partition(".")[0] in ("torch", "builtins"):
                continue
            try:
                lines, first = inspect.getsourcelines(cls)
            except (OSError, TypeError):
                continue
            name = re.escape(names[depth])
            for pattern in (rf"\bself\.{name}\s*[:=]", rf"\bself\.{name}\b|['\"]{name}['\"]"):
                for number, line in enumerate(lines, first):
                    if re.search(pattern, line):
                        return f"{inspect.getsourcefile(cls)}:{number}: {line.strip()}"
    return ""


def refused(name: str, error: Exception, run: Callable[[], object] | None = None) -> CaptureError:
    """The error of a failed trace, with the last line of the user's own code that led to it, and what to try.

    run: calls the model itself; where that fails too, the trace is not to blame
    """
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    what = f"{type(error).__name__}: {lines[0] if lines else ''}"
    advice = next((text for pattern, text in ADVICE.items() if re.search(pattern, str(error))), None)
    if advice is None and run is not None and (own := raised(run)) is not None:
        what = f"{type(own).__name__}: {next(iter(str(own).strip().splitlines()), '')}"
        advice = "The model itself raises this on the example inputs: pass inputs that it takes."
    advice = advice or (
        "Try example inputs without labels, attn_implementation='sdpa' or 'eager', or capture the submodule that holds "
        "the weights."
    )
    where = "\n  ".join(f"at {line}" for line in lines_of(error)) or "inside torch.export"
    return CaptureError(f"{name} cannot be captured: {what}\n  {where}\n  {advice}")


def raised(run: Callable[[], object]) -> Exception | None:
    try:
        run()
    except Exception as error:
        return error
    return None


def lines_of(error: BaseException) -> list[str]:
    """`file:line: text` of the user's last line that led to the error; after it, that of the library it calls there."""
    for cause in causes(error):
        frames = [f for f in traceback.extract_tb(cause.__traceback__) if f.line and not is_internal(f.filename)]
        if frames:
            own = [f for f in frames if not is_installed(f.filename)]
            last = [own[-1], frames[-1]] if own else [frames[-1]]
            return list(dict.fromkeys(f"{f.filename}:{f.lineno}: {f.line}" for f in last))
    line = user_line(str(error))
    return [line] if line else []


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def user_line(text: str) -> str:
    """`file:line: text` of the last frame outside of torch in a stack trace that torch kept as text."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]+)', text)
    frames = [frame for frame in frames if not is_internal(frame[0])]
    own = [frame for frame in frames if not is_installed(frame[0])] or frames
    return "{}:{}: {}".format(*own[-1]) if own else ""


def is_internal(file: str) -> bool:
    """Whether a file is torch's or this package's, or no file."""
    roots = (Path(torch.__file__).parent, Path(__file__).parent)
    return (file.startswith("<") and not file.startswith("<ipython")) or any(r in Path(file).parents for r in roots)


def is_installed(file: str) -> bool:
    return any(Path(sysconfig.get_path(kind)) in Path(file).parents for kind in ("purelib", "platlib", "stdlib"))
