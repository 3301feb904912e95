"""AdamW over what a program trains, and gradients in one buffer a dtype; on CUDA recorded as a graph."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..base.borrowed import add_to
from ..base.errors import TrainWarning
from ..program.program import Program
from .cuda_graph import Recorded


class Gradients:
    """Buffers that stay where they are, so that recorded work finds them again.

    buffers: one flat tensor a dtype        views: parameter by parameter, in their order
    used:    which parameters have had a gradient; the others have none, so that no optimiser decays them
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        sizes: dict[torch.dtype, int] = {}
        places = []
        for parameter in self.parameters:
            start = sizes.get(parameter.dtype, 0)
            places.append(start)
            sizes[parameter.dtype] = start + -(-parameter.numel() // 16) * 16  # every view starts at 64 bytes or more
        device = self.parameters[0].device
        flat = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        self.buffers = list(flat.values())
        self.views = [
            flat[p.dtype][start : start + p.numel()].view(p.shape)
            for p, start in zip(self.parameters, places, strict=True)
        ]
        self.used: set[int] = set()

    def attach(self) -> None:
        """The `grad` of every parameter is its view, or None where it never had one, whatever it was."""
        for index, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            parameter.grad = view if index in self.used else None

    def adopt(self) -> None:
        """Take over gradients that others, such as another process, gave to parameters that never had one."""
        for index, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            if index not in self.used and parameter.grad is not None:
                view.copy_(parameter.grad)
                self.used.add(index)

    def zero(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add one gradient a parameter; None where the loss does not depend on it."""
        given = [index for index, new in enumerate(gradients) if new is not None]
        if not self.used.issuperset(given):
            self.used.update(given)
            self.attach()
        if given:
            add_to([self.views[index] for index in given], [gradients[index] for index in given])


OPTIONS = ("weight_decay", "betas", "eps")


class StepOptimizer(torch.optim.Optimizer):
    """θ ← θ − lr (m̂ / (√v̂ + ε) + λθ) after g ← g · min(1, c / ‖g‖)

    Schedulers, hooks and state dicts take it as any optimiser; `norm` is ‖g‖ of the last step. On CUDA the third step
    is recorded, and later ones launch the recording; a changed learning rate is copied into it, any other changed
    option, or a parameter that has its first gradient, records anew. Source: Loshchilov and Hutter 2019, Algorithm 2.

    groups:        see `parameter_groups`          max_grad_norm: c, 0 for no clipping
    gradients:     the buffers that are read        record:        whether to record
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        gradients: Gradients,
        lr: float,
        max_grad_norm: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        record: bool = False,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.gradients, self.max_grad_norm, self.record = gradients, max_grad_norm, record
        first = gradients.parameters[0]
        self.norm = torch.zeros((), device=first.device)
        cuda = first.is_cuda
        inner = [{**group, "lr": torch.tensor(group["lr"], device=first.device)} if cuda else dict(group)
                 for group in self.param_groups]  # fmt: skip
        self.inner = torch.optim.AdamW(inner, fused=cuda, capturable=cuda)
        self.inner.state = self.state
        self.rates = [group["lr"] for group in self.param_groups]
        self.taken = 0
        self.recorded: Recorded | None = None
        self.used = 0
        self.stream: torch.cuda.Stream | None = torch.cuda.Stream(first.device) if cuda and record else None

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        self.follow()
        self.gradients.adopt()
        self.gradients.attach()
        if self.used != len(self.gradients.used):
            self.used, self.recorded = len(self.gradients.used), None
        if self.recorded is None and self.record and self.taken >= 2:
            self.try_to_record()
        if self.recorded is not None:
            self.recorded({})
        else:
            self.update()
        self.taken += 1

    def update(self) -> None:
        if self.max_grad_norm:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self.norm.copy_(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        self.inner.step()

    def follow(self) -> None:
        """Take over what schedulers and users have set in `param_groups`."""
        for index, (group, inner) in enumerate(zip(self.param_groups, self.inner.param_groups, strict=True)):
            if any(group[name] != inner[name] for name in OPTIONS):
                inner |= {name: group[name] for name in OPTIONS}
                self.recorded = None
            if group["lr"] != self.rates[index]:
                self.rates[index] = group["lr"]
                if isinstance(inner["lr"], torch.Tensor):
                    inner["lr"].fill_(group["lr"])
                else:
                    inner["lr"] = group["lr"]

    def try_to_record(self) -> None:
        try:
            self.recorded = Recorded(self.update, {}, self.stream, torch.cuda.graph_pool_handle())
        except RuntimeError as error:
            self.record = False
            warnings.warn(f"The optimiser's step is not recorded as a CUDA graph: {error}", TrainWarning, stacklevel=4)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The buffers stay: what was accumulated is zero."""
        self.gradients.zero()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            state["step"] = state["step"].to(parameter.device if self.inner.defaults["capturable"] else "cpu")
        self.inner.state = self.state
        self.recorded = None


def parameter_groups(program: Program, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for any torch optimiser, over exactly what trains, each with its learning rate.

    Weight decay is off for a method's tensors that say so (those whose neutral value is not 0), and for vectors among
    the model's own parameters (biases, norm scales).
    """
    declared = {path: tensor for adapter in program.adapters for path, tensor in adapter.declared().items()}
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in program.parameters(trainable=True):
        tensor = declared.get(name)
        decays, factor = (tensor.decay, tensor.lr) if tensor else (parameter.ndim > 1, 1.0)
        groups.setdefault((decays, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr": lr * factor}
        for (decays, factor), parameters in groups.items()
    ]
