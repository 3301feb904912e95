"""A form: how peft spells one kind of adapter, in both directions."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch

from subgraph_peft.base.errors import CheckpointError, MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.adapter import Adapter, identifier
from subgraph_peft.method.method import Method
from subgraph_peft.program.program import Program

from ..pieces import Piece
from .folder import MODULES, FolderContents, Slot
from .options import ModuleOptions, Options
from .targets import shortest, targeted

Value = TypeVar("Value", bound=Hashable)
# tensor -> (last part of its key, its shape in the file)
Keys = Mapping[str, tuple[str, tuple[int, ...]]]


class PeftForm:
    """One `peft_type`.

    prefix: before the names of the model's own parameters
    only:   the value of `bias` that trains those of adapted modules; None where there is no such option
    needs_task: peft applies it by the task type
    """

    peft_type: ClassVar[str]
    options: ClassVar[type[Options]]
    prefix: ClassVar[str] = MODULES
    only: ClassVar[str | None] = None
    needs_task: ClassVar[bool] = False

    def takes(self, method: Method) -> bool:
        """Whether a method is of this kind."""
        raise NotImplementedError

    def layout(self, captured: Program, options: Any, tensors: Mapping[str, torch.Tensor]) -> FolderContents:
        """What a folder says about the captured program."""
        raise NotImplementedError

    def written(self, captured: Program, pieces: Sequence[Piece]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(configuration, tensors by key)"""
        raise NotImplementedError


class ModuleForm(PeftForm):
    """An adapter at modules with weights; its tensors differ from ours in name and shape alone.

    kinds: of weight that peft has this adapter for
    """

    options: ClassVar[type[ModuleOptions]]
    kinds: ClassVar[tuple[str, ...]] = ("linear", "addmm")

    def methods(self, options: Any, sites: Sequence[Site]) -> list[Method]:
        """The method at each site."""
        raise NotImplementedError

    def keys(self, site: Site, method: Method) -> Keys:
        """Where a site's tensors are in the file."""
        raise NotImplementedError

    def shared_keys(self, method: Method, shapes: Mapping[str, tuple[int, ...]]) -> Keys:
        """Where the tensors that all sites share are, under their whole keys."""
        return {}

    def config(self, captured: Program, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The keys of the configuration that say what the pieces are. Raises MethodError where it cannot."""
        raise NotImplementedError

    def layout(self, captured: Program, options: Any, tensors: Mapping[str, torch.Tensor]) -> FolderContents:
        sites = targeted(
            captured, options, lambda module: any(key.startswith(f"{MODULES}{module}.") for key in tensors)
        )
        methods = self.methods(options, sites)
        for site, method in zip(sites, methods, strict=True):
            if why := self.obstacle(site, method):
                raise CheckpointError(f"{site.name} {why}.")
        base = Counter(methods).most_common(1)[0][0]
        own = tuple((site.name, method) for site, method in zip(sites, methods, strict=True) if method != base)
        adapter = Adapter(identifier(base.name), base, sites, variants=own)
        slots = {}
        for site, method in zip(sites, methods, strict=True):
            for name, (key, shape) in self.keys(site, method).items():
                slots[adapter.path(site, name)] = Slot(f"{MODULES}{site.owner}.{key}", shape)
        shapes = {name: tensor.shape for name, tensor in adapter.shared.items() if tensor.saved}
        for name, (key, shape) in self.shared_keys(base, shapes).items():
            slots[adapter.path(sites[0], name)] = Slot(key, shape)
        return FolderContents((adapter,), slots)

    def written(self, captured: Program, pieces: Sequence[Piece]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        self.check(pieces)
        tensors = {}
        for piece in pieces:
            for name, (key, shape) in self.keys(piece.site, piece.method).items():
                tensors[f"{MODULES}{piece.site.owner}.{key}"] = piece.tensors[name].reshape(shape)
        first = pieces[0]
        shapes = {name: tuple(value.shape) for name, value in first.shared.items()}
        for name, (key, _) in self.shared_keys(first.method, shapes).items():
            tensors[key] = first.shared[name]
        owners = [piece.site.owner for piece in pieces]
        config = {
            "target_modules": shortest(owners, captured),
            "fan_in_fan_out": any(piece.site.kind == "addmm" for piece in pieces),
            **self.config(captured, pieces),
        }
        return config, tensors

    def obstacle(self, site: Site, method: Method) -> str | None:
        """Why peft has no such adapter at a site, or not ours."""
        if site.kind not in self.kinds or not site.name.endswith(".weight"):
            return f"is of the kind {site.kind}; peft has {self.peft_type} for {', '.join(self.kinds)}"
        return f"works in {site.groups} groups, where peft's factors have other shapes" if site.groups > 1 else None

    def check(self, pieces: Sequence[Piece]) -> None:
        """MethodError for a site where peft has no such adapter, and for two adapters at one site."""
        met: dict[str, str] = {}
        for piece in pieces:
            if why := self.obstacle(piece.site, piece.method):
                raise MethodError(f"{piece.adapter} at {piece.site.name} {why}. Use sp.save(program, folder).")
            if piece.site.name in met:
                raise MethodError(
                    f"{piece.site.name} is rewritten by {met[piece.site.name]} and {piece.adapter}; a peft folder has "
                    "one adapter at a module. as_lora=True writes their sum."
                )
            met[piece.site.name] = piece.adapter


def one(what: str, pieces: Sequence[Piece], read: Callable[[Any], Value]) -> Value:
    """The value that all pieces have in common; MethodError where they differ."""
    values = {read(piece.method): piece for piece in pieces}
    if len(values) > 1:
        (a, first), (b, second) = list(values.items())[:2]
        raise MethodError(
            f"{what} is {a} at {first.site.owner} and {b} at {second.site.owner}; a peft folder has one for all. "
            "Write them apart, or as_lora=True."
        )
    return next(iter(values))
