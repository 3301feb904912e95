"""What is borrowed from the private or unstable API of other libraries: each thing, the version in which it was last
seen, and what breaks without it. No other file names one.

Where a thing is gone, whoever asks for it gets a VersionError. A new version of a library is tried by
`tests/test_borrowed.py`, a test an entry.
"""

import io
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib import import_module, metadata
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from .errors import VersionError


class Borrowed(NamedTuple):
    """seen: library and version in which it was last there       use: what it is for, and breaks without it"""

    seen: str
    use: str


TORCH, TRANSFORMERS = "torch 2.13.0", "transformers 5.23.0"
ONNXRUNTIME, ONNXSCRIPT = "onnxruntime 1.31.1", "onnxscript 0.7.2"

# hooks of transformers.Trainer that a trainer of programs takes the place of -> what happens where one is not called
HOOKS = {
    "create_accelerator_and_postprocess": "models are wrapped in DDP, and gradients averaged twice",
    "_move_model_to_device": "a sharded model is moved as a whole",
    "get_train_dataloader": "examples come in another order after a resumption",
    "_prepare_inputs": "batches stay on the CPU",
    "create_optimizer": "the base trains too",
    "get_batch_samples": "accumulated losses are weighted by batch, not by label",
    "compute_loss": "penalties are left out",
    "training_step": "compiled steps are not taken",
    "_get_grad_norm": "the norm of a compiled step is not logged",
    "evaluate": "metrics are Trainer's",
    "_save_checkpoint": "checkpoints hold the base",
    "_load_from_checkpoint": "a base is looked for in checkpoints",
    "_load_optimizer_and_scheduler": "the optimiser starts anew after a resumption",
    "_load_rng_state": "random numbers start anew after a resumption",
}

# `module:attribute` -> entry
ENTRIES = {
    "torch._ops:OpOverload": Borrowed(TORCH, "operators with a schema are told from other functions"),
    "torch._ops:HigherOrderOperator": Borrowed(TORCH, "operators over graphs are told from other functions"),
    "torch._subclasses:FakeTensor": Borrowed(TORCH, "the values that nodes of a graph stand for"),
    "torch.fx.experimental.proxy_tensor:make_fx": Borrowed(TORCH, "an operator over a stack becomes a graph"),
    "torch.fx.experimental.sym_node:SymNode.expr": Borrowed(TORCH, "formulas of sizes"),
    "torch.fx.experimental.sym_node:SymNode.hint": Borrowed(TORCH, "sizes at which a graph is run to see its shapes"),
    "torch.fx.experimental.sym_node:SymNode.has_hint": Borrowed(TORCH, "as SymNode.hint"),
    "torch.utils:_pytree": Borrowed(TORCH, "nested inputs and outputs are flattened; torch has no public one"),
    "torch.utils._python_dispatch:is_traceable_wrapper_subclass": Borrowed(TORCH, "quantised weights are refused"),
    "torch.utils.checkpoint:CheckpointFunction": Borrowed(TORCH, "as CheckpointFunction.apply"),
    "torch.utils.checkpoint:CheckpointFunction.apply": Borrowed(TORCH, "reentrant checkpoints are not traced"),
    "torch.utils.checkpoint:_checkpoint_hook.__enter__": Borrowed(TORCH, "other checkpoints are warned of"),
    "torch.autograd:Function.apply": Borrowed(TORCH, "backward passes by hand are compared with those of the graph"),
    "torch.autograd.graph:saved_tensors_hooks": Borrowed(TORCH, "as torch.utils.checkpoint._checkpoint_hook"),
    "torch.autograd.graph:saved_tensors_hooks.__enter__": Borrowed(TORCH, "as torch.utils.checkpoint._checkpoint_hook"),
    "torch:_foreach_add_": Borrowed(TORCH, "gradients are added up in one launch"),
    "torch:Tensor._version": Borrowed(TORCH, "constants are computed again where a schedule wrote what they hang on"),
    "torch._C:_dispatch_has_kernel": Borrowed(TORCH, "operators of TorchScript are refused in files"),
    "torch._C:_cuda_clearCublasWorkspaces": Borrowed(TORCH, "recorded products have their workspaces to themselves"),
    "torch._functorch.config:patch": Borrowed(TORCH, "what compiled steps keep for the backward pass"),
    "torch._functorch.config:ban_recompute_materialized_backward": Borrowed(TORCH, "as torch._functorch.config.patch"),
    "torch._functorch.config:activation_memory_budget": Borrowed(TORCH, "as torch._functorch.config.patch"),
    "torch._inductor.config:combo_kernels": Borrowed(TORCH, "kernels of a compiled step are launched together"),
    "torch._functorch.predispatch:_vmap_increment_nesting": Borrowed(TORCH, "a vmap in a graph is seen"),
    "torch._higher_order_ops.wrap:wrap_with_set_grad_enabled": Borrowed(TORCH, "regions of a graph under no_grad"),
    "torch._higher_order_ops.wrap:wrap_with_autocast": Borrowed(TORCH, "regions of a graph under autocast"),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper:_CHECKPOINT_PREFIX": Borrowed(
        TORCH, "names of what a checkpoint wrapper holds"
    ),
    "torch._dynamo.eval_frame:OptimizedModule": Borrowed(TORCH, "a module that torch.compile wraps is seen through"),
    **{f"transformers:Trainer.{name}": Borrowed(TRANSFORMERS, use) for name, use in HOOKS.items()},
    "transformers.core_model_loading:revert_weight_conversion": Borrowed(TRANSFORMERS, "names of tensors in files"),
    "transformers:PreTrainedModel._keys_to_ignore_on_save": Borrowed(TRANSFORMERS, "what files need not hold"),
    "transformers.modeling_layers:GradientCheckpointingLayer": Borrowed(TRANSFORMERS, "layers stay checkpointed"),
    "transformers.cache_utils:DynamicLayer": Borrowed(TRANSFORMERS, "keys and values of a layer as a file's inputs"),
    "transformers.cache_utils:DynamicSlidingWindowLayer": Borrowed(TRANSFORMERS, "as DynamicLayer"),
    "onnxruntime:AdapterFormat": Borrowed(ONNXRUNTIME, "files of adapters"),
    "onnxruntime:preload_dlls": Borrowed(ONNXRUNTIME, "its CUDA provider finds torch's libraries"),
    "onnxruntime.quantization.matmul_nbits_quantizer:MatMulNBitsQuantizer": Borrowed(ONNXRUNTIME, "8 and 4 bits"),
    "onnxruntime.quantization.matmul_nbits_quantizer:DefaultWeightOnlyQuantConfig": Borrowed(
        ONNXRUNTIME, "as MatMulNBitsQuantizer"
    ),
    "onnxscript.rewriter.ort_fusions:optimize_for_ort": Borrowed(ONNXSCRIPT, "onnxruntime's own operators"),
    "onnxscript.rewriter.ort_fusions.gqa:gqa_rules": Borrowed(ONNXSCRIPT, "as its rules"),
    "onnxscript.rewriter.ort_fusions.gqa:gqa_rules.rules": Borrowed(ONNXSCRIPT, "masks are kept where rules fuse"),
}  # fmt: skip

# texts by which something is found in a graph, a module or a model file, and no more is known of it
CHECKPOINTS = "torch.utils.checkpoint"
GUARDS_MODULE = "_guards"
FX_NODE = "pkg.torch.onnx.fx_node"
ORIGINAL_NAMES = "dynamo_flat_name_to_original_fqn"
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def get(path: str) -> Any:
    """The thing of an entry. Raises VersionError where it is gone."""
    module, _, names = path.partition(":")
    try:
        found: Any = import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise gone(path) from error
    return found


def gone(path: str, what: str = "is not there") -> VersionError:
    """The error of an entry that cannot be had."""
    return missing(path.replace(":", "."), *ENTRIES[path], what)


def missing(name: str, seen: str, use: str, what: str = "is not there") -> VersionError:
    """The error of an attribute of an object, or of an effect, that is not there."""
    library, version = seen.split()
    return VersionError(
        f"{name} {what} in {library} {installed(library)}, which is needed for this: {use}. It was last seen in "
        f"{library} {version}: install that version, or a version of this package that knows the newer one."
    )


def installed(library: str) -> str:
    """The version of a library, of those that are installed under other names too."""
    module = sys.modules.get(library)
    try:
        return str(getattr(module, "__version__", None) or metadata.version(library))
    except metadata.PackageNotFoundError:
        return "(not installed)"


OpOverload = get("torch._ops:OpOverload")
HigherOrderOperator = get("torch._ops:HigherOrderOperator")
FakeTensor = get("torch._subclasses:FakeTensor")
make_fx = get("torch.fx.experimental.proxy_tensor:make_fx")
pytree = get("torch.utils:_pytree")
is_traceable_wrapper_subclass = get("torch.utils._python_dispatch:is_traceable_wrapper_subclass")


def attribute(held: Any, name: str, seen: str, use: str) -> Any:
    """An attribute of an object. Raises VersionError where it is gone."""
    try:
        return getattr(held, name)
    except (AttributeError, KeyError) as error:  # wrappers look for theirs in a dictionary
        raise missing(f"{type(held).__name__}.{name}", seen, use) from error


# of torch


def schema_of(operator: Any) -> Any:
    """The torch.FunctionSchema of an operator."""
    return attribute(operator, "_schema", TORCH, "the arguments of operators by name")


def has_kernel(operator: Any) -> bool:
    """Whether an operator computes; those of TorchScript alone have no kernel."""
    return get("torch._C:_dispatch_has_kernel")(operator.name())


def guard_code(exported: Any) -> Sequence[str]:
    """The conditions on sizes of an ExportedProgram (`L['x'].size()[1] > 4`)."""
    return attribute(exported, "_guards_code", TORCH, "a graph would be run where the model takes another branch")


def input_structure(module: Any) -> Any:
    """The structure of (args, kwargs) that a GraphModule was traced with; None where it takes them as written."""
    structure = getattr(module, "_in_spec", None)
    if structure is None and isinstance(module, fx.GraphModule) and hasattr(module.graph, "_codegen"):
        codegen = module.graph._codegen
        if getattr(codegen, "pytree_info", None) is not None:
            raise missing("GraphModule._in_spec", TORCH, "arguments of a traced graph in their order")
    return structure


def is_of_vmap(target: Any) -> bool:
    """Whether a node's target opens, closes or fills a vmap."""
    return getattr(target, "__module__", "") == get("torch._functorch.predispatch:_vmap_increment_nesting").__module__


def size_formula(size: torch.SymInt) -> Any:
    """The sympy expression of a size."""
    return attribute(size.node, "expr", TORCH, "formulas of sizes")


def size_hint(size: torch.SymInt, otherwise: int) -> int:
    """The number that a size had when it was traced."""
    node = size.node
    known = attribute(node, "has_hint", TORCH, "sizes at which a graph is run")()
    return attribute(node, "hint", TORCH, "sizes at which a graph is run") if known else otherwise


def fake_mode_of(value: Any) -> Any:
    return attribute(value, "fake_mode", TORCH, "fake values are made on other devices")


def version_of(tensor: torch.Tensor) -> int:
    """Counts the writes to a tensor."""
    return tensor._version


def add_to(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    """tᵢ ← tᵢ + oᵢ for all i at once."""
    get("torch:_foreach_add_")(tensors, others)


def clear_workspaces() -> None:
    """Free the workspaces of cuBLAS."""
    get("torch._C:_cuda_clearCublasWorkspaces")()


def recomputation(**options: Any) -> Any:
    """A context in which torch.compile recomputes in the backward pass by these options of functorch."""
    for name in options:
        get(f"torch._functorch.config:{name}")
    return get("torch._functorch.config:patch")(options)


def runs_in_traces(function: Callable) -> Callable:
    """torch.compile runs it where it would trace it: torch.compiler.assume_constant_result, without its imports."""
    function._dynamo_marked_constant = True
    return function


def holds_packed_weights(module: nn.Module) -> bool:
    """Whether it is a quantised layer of torch.ao."""
    return type(module).__module__.startswith("torch.ao.nn") and hasattr(module, "_packed_params")


def uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile wraps, for a module that it wraps; any other as it is."""
    if "torch._dynamo.eval_frame" not in sys.modules:
        return model
    if isinstance(model, get("torch._dynamo.eval_frame:OptimizedModule")):
        return attribute(model, "_orig_mod", TORCH, "a module that torch.compile wraps is seen through")
    return model


class Pickled:
    """What no file of weights holds."""


def check_weights_only() -> None:
    """Raises VersionError where torch unpickles anything although the environment forbids it."""
    file = io.BytesIO()
    torch.save(Pickled(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=False)
    except Exception:
        return
    raise missing(f"the effect of {WEIGHTS_ONLY}", TORCH, "a file could run anything that it names")


# of transformers


def trainer_class(module: Any = None) -> Any:
    """transformers.Trainer, which has and calls every hook. Raises VersionError where it does not: what takes the
    place of a hook would then do nothing."""
    trainer = (module or import_module("transformers")).Trainer
    names = called(trainer)
    for name in HOOKS:
        path = f"transformers:Trainer.{name}"
        if not hasattr(trainer, name):
            raise gone(path)
        if name not in names:
            raise gone(path, "is not called")
    return trainer


def called(cls: type) -> set[str]:
    """The names that the functions of a class read."""

    def of(code: CodeType) -> Iterator[str]:
        yield from code.co_names
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from of(inner)

    functions = [getattr(f, "__wrapped__", f) for f in vars(cls).values()]
    return {name for f in functions if isinstance(f, FunctionType) for name in of(f.__code__)}


def one_gpu(arguments: Any) -> None:
    """Let TrainingArguments see one GPU: several are for several processes."""
    seen = min(arguments.n_gpu, 1)
    arguments._n_gpu = seen
    if arguments.n_gpu != seen:
        raise missing("TrainingArguments._n_gpu", TRANSFORMERS, "a model would be wrapped for several devices")


def save_checkpoint(trainer: Any) -> None:
    trainer._save_checkpoint(None)


def checkpointed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> layer, of those that transformers checkpoints as a whole."""
    if "transformers.modeling_layers" not in sys.modules:  # imported if the model has any
        return {}
    kind = get("transformers.modeling_layers:GradientCheckpointingLayer")
    if (name := "_gradient_checkpointing_func") not in called(kind):
        raise missing(f"{kind.__name__}.{name}", TRANSFORMERS, "options of checkpointing")
    return {path: m for path, m in model.named_modules() if isinstance(m, kind) and m.gradient_checkpointing}


def checkpoint_options(layers: Collection[nn.Module]) -> dict[str, Any]:
    """Options of torch.utils.checkpoint.checkpoint that transformers calls layers with."""
    how = next((f for m in layers if (f := getattr(m, "_gradient_checkpointing_func", None))), None)
    return {name: value for name, value in getattr(how, "keywords", {}).items() if name != "use_reentrant"}


def unsaved_names(model: nn.Module) -> set[str]:
    """Names of tensors that transformers leaves out of files."""
    get("transformers:PreTrainedModel._keys_to_ignore_on_save")
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def attention_of(config: Any) -> str | None:
    """How a transformers model computes attention."""
    return attribute(config, "_attn_implementation", TRANSFORMERS, "attention that has no ONNX form is replaced")


def commit_of(config: Any) -> str | None:
    """The revision of the hub that a config is from."""
    return getattr(config, "_commit_hash", None)


# of onnxruntime


def model_path(session: Any) -> str | None:
    """The file of a session; None for one that was made of bytes."""
    return attribute(session, "_model_path", ONNXRUNTIME, "weights are merged on load")
