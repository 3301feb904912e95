"""Adapters of a slotted ONNX file: one onnxruntime session serves the base and any of them.

An `.onnx_adapter` file holds A and B by weight and tensors that replace the base's, and the base's identity as its
`model_version`. Where the model's slots are merged on load, Wᵀ + A B is computed then, in float32 at least.
onnxruntime itself asks little of it: a name that the file lacks and another dtype fail when it runs, half a pair and
another base do not, and of two active adapters with the same names the first wins.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch

from subgraph_peft.base.borrowed import model_path
from subgraph_peft.base.errors import ExportError, first_line, suggestion

from ..onnx.runtime import device_of, dtype_of, run, session, tensor_of, value_of
from ..onnx.slots import IDENTITY, MERGED, A, B, version, weights_of
from ..onnx.weights import values as stored

Values = Mapping[str, onnxruntime.OrtValue]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter that fits a session.

    values: tensor by slot name, on the session's device        ranks: r by weight
    """

    path: str
    values: Values
    ranks: Mapping[str, int]

    @cached_property
    def native(self) -> onnxruntime.LoraAdapter:
        """The file as onnxruntime activates it."""
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(self.path)
        return adapter


class Options(onnxruntime.RunOptions):
    """Run options that keep their active adapters, to which onnxruntime only points."""

    def __init__(self, adapters: Sequence[onnxruntime.LoraAdapter]):
        super().__init__()
        self.adapters = adapters
        for adapter in adapters:
            self.add_active_adapter(adapter)


class Adapters:
    """The adapters of one slotted model.

    model: its file, or an onnxruntime session on it. Raises ExportError where it has no slots
    """

    def __init__(self, model: str | os.PathLike | onnxruntime.InferenceSession):
        self.session = model if isinstance(model, onnxruntime.InferenceSession) else session(model)
        self.identity = self.session.get_modelmeta().custom_metadata_map.get(IDENTITY)
        self.slots = {value.name: value for value in self.session.get_overridable_initializers()}
        if self.identity is None or not self.slots:
            raise ExportError("The model has no slots for adapters: export.to_onnx(program, path, slots=…) makes them.")

    def load(self, path: str | os.PathLike) -> LoadedAdapter:
        """Read an adapter file. Raises ExportError, which says what differs, where it is damaged, was made for another
        base, or has other names, shapes or dtypes than the model's slots, or half a pair."""
        made = read_adapter(path)
        where = Path(path).name
        if made.get_model_version() != version(self.identity):
            raise ExportError(
                f"{where} was made for another base: its model_version is {made.get_model_version()}, that of this "
                f"model {version(self.identity)}. Write it again from its program, by export.to_adapter(program, …, "
                "model)."
            )
        values = made.get_parameters()
        self.check(where, values)
        ranks = {name.removesuffix(A): value.shape()[-1] for name, value in values.items() if name.endswith(A)}
        return LoadedAdapter(os.fspath(path), self.held(values), ranks)

    def slot(self, name: str) -> onnxruntime.NodeArg | None:
        """What takes a tensor of an adapter file: the slot of its name, or the weight that A or B is merged into."""
        (weight,) = weights_of([name])
        return self.slots.get(name) or (self.slots.get(weight + MERGED) if name != weight else None)

    def sizes(self, name: str) -> tuple[int | str, ...]:
        """The shape that a tensor of an adapter file has to have, a name where any size will do."""
        shape = tuple(self.slot(name).shape)
        if name in self.slots:
            return shape
        return (*shape[:-1], "r") if name.endswith(A) else (*shape[:-2], "r", shape[-1])

    def check(self, where: str, values: Values) -> None:
        """Raises ExportError for values that the slots do not take."""
        if not values:
            raise ExportError(f"{where} is empty.")
        for name, value in values.items():
            if (slot := self.slot(name)) is None:
                close = suggestion(name, self.slots)
                raise ExportError(f"{where} has {name!r}, for which the model has no slot.{close}")
            if value.data_type() != slot.type:
                raise ExportError(
                    f"{where}: {name} is a {value.data_type()}, the model takes a {slot.type}. Write the adapter again "
                    "for this model, by export.to_adapter(program, …, model)."
                )
            if not fits(value.shape(), sizes := self.sizes(name)):
                wanted = ", ".join("r" if isinstance(size, str) else str(size) for size in sizes)
                raise ExportError(f"{where}: {name} is {value.shape()}, the model takes [{wanted}].")
        for weight in weights_of(name for name in values if name.endswith((A, B))):
            halves = [name for name in (weight + A, weight + B) if name in values]
            if len(halves) < 2:
                raise ExportError(f"{where} has {halves[0]} without the other half of the pair: it changes nothing.")
            down, up = (values[name].shape() for name in halves)
            if down[-1] != up[-2]:
                raise ExportError(f"{where}: {halves[0]} is {down} and {halves[1]} is {up}: their ranks differ.")

    def fitted(self, tensors: Mapping[str, torch.Tensor]) -> Values:
        """Tensors in the dtypes of their slots, as an adapter file holds them. Raises ExportError where one is not
        finite there."""
        values = {}
        for name, tensor in tensors.items():
            dtype = dtype_of(self.slot(name))
            if not torch.isfinite(cast := tensor.to(dtype)).all():
                raise ExportError(f"{name} has values that {dtype} cannot hold. Export the slots in float32.")
            values[name] = value_of(cast)
        return values

    @torch.no_grad()
    def held(self, values: Values) -> Values:
        """An adapter file's values as the session takes them: on its device, with A B added to weights that are merged
        on load. Raises ExportError where a sum is not finite."""
        device = device_of(self.session)
        placed = {name: value_of(tensor_of(value), device) for name, value in values.items() if name in self.slots}
        for weight, base in self.weights(weights_of(name for name in values if name not in self.slots)):
            wide = torch.promote_types(base.dtype, torch.float32)
            W, down, up = (t.to(device, wide) for t in (base, *(tensor_of(values[weight + half]) for half in (A, B))))
            merged = (W + down @ up).to(base.dtype)
            if not merged.isfinite().all():
                raise ExportError(f"{weight} has values under the adapter that {base.dtype} cannot hold.")
            placed[weight + MERGED] = value_of(merged, device)
        return placed

    def weights(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The base's weights [in, out] that are merged on load, out of the session's file. Raises ExportError."""
        if not names:
            return
        if (path := model_path(self.session)) is None:
            raise ExportError("The model's slots are merged on load, with the weights of its file: Adapters(path).")
        initializers = ir.load(path).graph.initializers
        for name in names:
            yield name, stored(initializers[name + MERGED].const_value)

    def run(self, inputs: Mapping[str, torch.Tensor], *adapters: LoadedAdapter) -> dict[str, torch.Tensor]:
        """Outputs by name, on the CPU, of the base under these adapters. Raises ExportError."""
        return run(self.session, inputs, together(adapters))

    def options(self, *adapters: LoadedAdapter) -> onnxruntime.RunOptions:
        """For `session.run(names, feeds, options)`. Raises ExportError for adapters that share a slot, and for slots
        that are merged on load, of which onnxruntime knows nothing."""
        together(adapters)
        if any(name.endswith(MERGED) for name in self.slots):
            raise ExportError(
                "The model's slots are merged on load: bind its adapters (Adapters.bind, BoundSession), or export "
                "with merge='run'."
            )
        return Options([adapter.native for adapter in adapters])

    def bind(self, binding: onnxruntime.IOBinding, *adapters: LoadedAdapter) -> None:
        """For `session.run_with_iobinding`, which ignores the adapters of its options: binds their tensors, which
        stay on the device, in place of all inputs that were bound. Bind the others after it. Raises ExportError for
        adapters that share a slot."""
        binding.clear_binding_inputs()
        bind(binding, adapters)


def bind(binding: onnxruntime.IOBinding, adapters: Sequence[LoadedAdapter]) -> None:
    """Beside what is bound already. Raises ExportError for adapters that share a slot."""
    for name, value in together(adapters).items():
        binding.bind_ortvalue_input(name, value)


def together(adapters: Sequence[LoadedAdapter]) -> Values:
    """The tensors of adapters that act at once, at different weights. Raises ExportError."""
    counts = Counter(name for adapter in adapters for name in adapter.values)
    if twice := [name for name, count in counts.items() if count > 1]:
        files = [Path(adapter.path).name for adapter in adapters if twice[0] in adapter.values]
        raise ExportError(
            f"{' and '.join(files)} both change {weights_of(twice)[0]}, where one alone would win. Run with one of "
            "them, or write one adapter of a program that has both."
        )
    return {name: value for adapter in adapters for name, value in adapter.values.items()}


def fits(shape: list[int], wanted: list[int | str]) -> bool:
    """Whether a shape is the wanted one, of which a name stands for any size."""
    return len(shape) == len(wanted) and all(isinstance(w, str) or w == s for s, w in zip(shape, wanted, strict=True))


def read_adapter(path: str | os.PathLike) -> onnxruntime.AdapterFormat:
    """Raises ExportError for a file that is missing, cut short or no adapter."""
    if not Path(path).is_file():
        raise ExportError(f"There is no adapter file {path}.")
    try:
        return onnxruntime.AdapterFormat.read_adapter(os.fspath(path))
    except Exception as error:
        raise ExportError(
            f"{Path(path).name} is damaged or no onnxruntime adapter ({first_line(error)[-120:]}). Write it again."
        ) from error
