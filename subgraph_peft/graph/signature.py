"""The call signature of a captured model: named arguments in, flat tensors through, the model's own output type out."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..base.borrowed import guard_code, input_structure, pytree
from ..base.errors import CaptureError
from .guards import guards_of

CALL, UNKNOWN = "_subgraph_call", "_subgraph_unknown"  # names of ours beside those of a model's arguments


def named_inputs(forward: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Example inputs by parameter name, in signature order, without those that are None."""
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise CaptureError(
            f"The example inputs do not fit the model: forward{inspect.signature(forward)}: {error}. "
            "Pass a tensor, a tuple of positional arguments, or a dict of keyword arguments."
        ) from error
    named: dict[str, Any] = {}
    for name, value in bound.items():
        if inspect.signature(forward).parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return {name: value for name, value in named.items() if value is not None}


def export_arguments(forward: Callable, inputs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """(args, kwargs) for `torch.export`: positional where the signature leaves no choice, else by name."""
    spec = input_structure(getattr(forward, "__self__", None))
    if isinstance(spec, pytree.TreeSpec):  # a GraphModule that takes its arguments as it was traced
        keywords = spec.children()[1].context or ()
        return (
            tuple(value for name, value in inputs.items() if name not in keywords),
            {name: value for name, value in inputs.items() if name in keywords},
        )
    parameters = inspect.signature(forward).parameters
    args: list[Any] = []
    by_name = dict(inputs)
    positional = [p for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    variadic = [p for p in parameters.values() if p.kind is inspect.Parameter.VAR_POSITIONAL and p.name in inputs]
    if variadic:
        positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for parameter in positional:
        if parameter.name in by_name:
            args.append(by_name.pop(parameter.name))
    for parameter in variadic:
        args.extend(by_name.pop(parameter.name))
    return tuple(args), by_name


@dataclass(frozen=True)
class Signature:
    """What a graph is called with and what it returns.

    inputs:      argument name -> pytree spec of its leaves, in placeholder order
    constants:   values of the captured leaves that are no tensors, by leaf index
    parameters:  the source model's own parameters, for the generated `forward`
    output:      pytree spec of the result
    guards:      conditions on the sizes of inputs under which the graph is the model, see `guards`
    """

    inputs: Mapping[str, pytree.TreeSpec]
    constants: Mapping[int, Any]
    parameters: tuple[inspect.Parameter, ...]
    output: pytree.TreeSpec
    guards: tuple[str, ...] = ()

    @staticmethod
    def of(program: torch.export.ExportedProgram, forward: Callable | None) -> "Signature":
        """Read from an exported program; `forward` is the source model's, where there is one."""
        spec = program.call_spec.in_spec
        args_spec, kwargs_spec = spec.children()
        parameters = tuple(inspect.signature(forward).parameters.values()) if forward else ()
        inputs: dict[str, pytree.TreeSpec] = {}
        if not parameters:
            parameters = positional_parameters(program, len(args_spec.children()))
        names = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        variadic = {p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL}
        children = list(args_spec.children())
        for name in names:
            if not children:
                break
            if name in variadic:
                inputs[name] = pytree.tree_structure(
                    tuple(pytree.tree_unflatten([0] * c.num_leaves, c) for c in children)
                )
                children = []
            else:
                inputs[name] = children.pop(0)
        inputs |= dict(zip(kwargs_spec.context or (), kwargs_spec.children(), strict=True))
        parameters = tuple(p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD)
        known = {p.name for p in parameters}
        parameters += tuple(
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in inputs if n not in known
        )
        constants: dict[int, Any] = {}
        if program.example_inputs is not None:
            leaves = pytree.tree_leaves(program.example_inputs)
            constants = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, torch.Tensor)}
        guards = guards_of(guard_code(program), inputs)
        return Signature(inputs, constants, parameters, program.call_spec.out_spec, guards)

    def flatten(self, inputs: Mapping[str, Any]) -> list[Any]:
        """Leaves in placeholder order; an argument that was not given leaves None in its places.

        Raises CaptureError for an argument that the graph was captured without, or with another structure or constant.
        """
        for name, value in inputs.items():
            if name not in self.inputs and value is not None:
                self._check_uncaptured(name, value)
        flat: list[Any] = []
        for name, spec in self.inputs.items():
            value = inputs.get(name)
            if value is None:
                flat.extend([None] * spec.num_leaves)
            elif spec.is_leaf():
                flat.append(value)
            else:
                leaves, given = pytree.tree_flatten(value)
                if given != spec:
                    raise CaptureError(f"Argument {name!r} has the structure {given}, but was captured as {spec}.")
                flat.extend(leaves)
        for index, constant in self.constants.items():
            if flat[index] is not None and flat[index] != constant:
                raise CaptureError(
                    f"Input {index} is the constant {constant!r} in the captured graph; {flat[index]!r} was passed. "
                    "Capture again with that value."
                )
        return flat

    def _check_uncaptured(self, name: str, value: Any) -> None:
        default = next((p.default for p in self.parameters if p.name == name), inspect.Parameter.empty)
        if isinstance(value, torch.Tensor) or value != default:
            raise CaptureError(
                f"The graph was captured without the argument {name!r}; it takes {', '.join(self.inputs)}. "
                f"Capture again with {name!r} among the example inputs."
            )

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        return pytree.tree_unflatten(list(leaves), self.output)

    def output_names(self) -> list[str]:
        """One name a flat output: the field names of a ModelOutput or dict, `output_i` otherwise."""
        paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(self.output.num_leaves)), self.output))[
            0
        ]
        names = []
        for index, (path, _) in enumerate(paths):
            parts = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path]
            named = any(not part.isdigit() for part in parts)
            names.append("_".join(parts) if named else f"output_{index}" if len(paths) > 1 else "output")
        return names

    def input_names(self) -> list[str]:
        """One name a placeholder: the argument's own, `argument.key` in a mapping, `argument_i` where it is nested
        otherwise."""
        names = []
        for name, spec in self.inputs.items():
            if spec.type is dict and spec.num_leaves == len(spec.context):
                names += [f"{name}.{key}" for key in spec.context]
            else:
                names += [name] if spec.is_leaf() else [f"{name}_{i}" for i in range(spec.num_leaves)]
        return names


def positional_parameters(program: torch.export.ExportedProgram, count: int) -> tuple[inspect.Parameter, ...]:
    """Parameters of a program whose source is not at hand: placeholder names where each argument is one tensor."""
    leaves = program.graph_signature.user_inputs
    flat = program.call_spec.in_spec.num_leaves == len(leaves) and all(
        c.is_leaf() for c in program.call_spec.in_spec.children()[0].children()
    )
    names = [str(leaves[i]) if flat else f"input_{i}" for i in range(count)]
    return tuple(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in names)


def compile_forward(parameters: Sequence[inspect.Parameter], call: Callable) -> Callable:
    """`def forward(self, <the source's parameters>, **unknown): return call(self, {name: value})`. Tools that read
    signatures (transformers.Trainer, torch.compile) see the source model's own; `call` refuses what is unknown."""
    seen_keyword_only = False
    text, defaults = ["self"], {}
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            text.append(f"*{parameter.name}")
            seen_keyword_only = True
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not seen_keyword_only:
            text.append("*")
            seen_keyword_only = True
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        defaults[f"default_{parameter.name}"] = default
        text.append(f"{parameter.name}=default_{parameter.name}")
    text.append(f"**{UNKNOWN}")
    inputs = ", ".join([*(f"{p.name!r}: {p.name}" for p in parameters), f"**{UNKNOWN}"])
    namespace: dict[str, Any] = {**defaults, CALL: call}
    exec(f"def forward({', '.join(text)}):\n    return {CALL}(self, {{{inputs}}})", namespace)
    forward = namespace["forward"]
    *shown, _ = inspect.signature(forward).parameters.values()
    forward.__signature__ = inspect.Signature(shown)
    return forward
