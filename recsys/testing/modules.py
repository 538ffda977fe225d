"""Checks that all trainable parts of a model share: embedding, selector, sequence encoder, interaction."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, export

from recsys.abilities import Regularised, Supervised
from recsys.testing.kit import Check, expect
from recsys.testing.samples import batch, generator

Inputs = tuple[Tensor, ...]
ROWS = 6


class Subject(Protocol):
    """How to build and call the part under test."""

    @abstractmethod
    def build(self, count: int = 3) -> nn.Module:
        """Return a new one for `count` fields."""

    @abstractmethod
    def inputs(self, rows: int, count: int = 3) -> Inputs:
        """Return arguments of forward; the first dimension of each is B."""

    @abstractmethod
    def shape(self, module: nn.Module, rows: int, count: int = 3) -> tuple[int, ...]:
        """Return the shape that forward must give."""

    @abstractmethod
    def dynamic(self, batch: Any) -> tuple[dict[int, Any], ...]:
        """Return the dynamic dimensions of each argument, for `torch.export`; `batch` is B."""

    @abstractmethod
    def objective(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """Return `[]`, a number that depends on everything that training would change."""


def checks(subject: Subject) -> list[Check]:
    """Return the shared checks, in order."""
    runs: dict[str, tuple[Callable[[Subject], None], str]] = {
        "shapes": (_shapes, "return the documented shape for every batch size, one row included"),
        "finite": (_finite, "keep zeros out of divisions, logarithms and square roots: all-zero vectors do occur"),
        "gradients": (_gradients, "remove the parameter, or use it; a buffer holds what is not learned"),
        "rows_independent": (_independent, "in eval mode, take no mean, norm or attention over the batch dimension"),
        "eval_deterministic": (_repeatable, "pass `self.training` to functional dropout and gate noise on it"),
        "seeded_construction": (_seeded, "draw initial weights with torch's global generator only"),
        "meta_device": (_meta, "create tensors with torch functions, read no value while building"),
        "export_any_batch": (_export, "no Python `if` or loop on tensor values or on the batch size"),
        "graph_constant_in_fields": (_graph, "replace the loop over fields by one batched operation on [B, F, D]"),
        "state_round_trip": (_state, "register what the output depends on as parameter or buffer"),
        "bf16_autocast": (_bf16, "compute differences of large sums and exponentials in float32"),
    }

    def bound(run: Callable[[Subject], None]) -> Callable[[], None]:
        return lambda: run(subject)

    return [Check(name, fix, bound(run)) for name, (run, fix) in runs.items()]


def disturb(module: nn.Module, scale: float = 0.05, seed: int = 3) -> nn.Module:
    """Move every parameter off its initial value, so that zero initialisation hides nothing."""
    numbers = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(scale * torch.randn(parameter.shape, generator=numbers))
    return module


def random_sum(x: Tensor, seed: int = 4) -> Tensor:
    """Return a weighted sum whose weights no normalisation cancels, `[]`."""
    return (x.float() * torch.randn(x.shape, generator=generator(seed))).sum()


def close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Raise unless two tensors are equal up to rounding."""
    expect(a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.detach().double(), b.detach().double()
    gap = (a - b).abs()
    fine = gap <= tolerance * (1 + b.abs())
    expect(bool(fine.all()), f"{what}: the largest difference is {float(gap.max()):.2e}")


def finite(x: Tensor, what: str) -> None:
    """Raise unless every value is finite."""
    expect(bool(torch.isfinite(x).all()), f"{what} has {int((~torch.isfinite(x)).sum())} values that are not finite")


def _evaluating(subject: Subject, count: int = 3) -> nn.Module:
    torch.manual_seed(1)
    module = subject.build(count)
    expect(isinstance(module, nn.Module), f"the factory returned {type(module).__name__}, expected a torch.nn.Module")
    return disturb(module).eval()


def _shapes(subject: Subject) -> None:
    module = _evaluating(subject)
    for rows in (1, ROWS):
        y = module(*subject.inputs(rows))
        expect(isinstance(y, Tensor), f"forward returned {type(y).__name__}, expected a tensor")
        wanted = subject.shape(module, rows)
        expect(tuple(y.shape) == wanted, f"B={rows}: forward returned {tuple(y.shape)}, expected {wanted}")
        expect(y.is_floating_point(), f"forward returned {y.dtype}, expected a floating-point tensor")


def _finite(subject: Subject) -> None:
    for inputs, what in ((subject.inputs(ROWS), "random"), (_zeros(subject.inputs(ROWS)), "all-zero")):
        module = _evaluating(subject).train()
        floats = _require_grad(inputs)
        finite(module(*inputs), f"the output for {what} input")
        subject.objective(module, inputs).backward()  # type: ignore[no-untyped-call]
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                finite(_dense(parameter.grad), f"the gradient of {name} for {what} input")
        for x in floats:
            if x.grad is not None:
                finite(x.grad, f"the gradient of the input for {what} input")


def _gradients(subject: Subject) -> None:
    module = _evaluating(subject).train()
    inputs = subject.inputs(ROWS)
    floats = _require_grad(inputs)
    subject.objective(module, inputs).backward()  # type: ignore[no-untyped-call]
    if isinstance(module, Supervised) or (_idle(module) and isinstance(module, Regularised)):
        subject.objective(module, inputs)
        own = _own_terms(module)  # some parameters are used by the part's own terms in the loss alone
        if own.requires_grad:
            own.backward()  # type: ignore[no-untyped-call]
    idle = _idle(module)
    expect(not idle, f"no gradient reaches {', '.join(idle)}")
    blocked = floats and not any(x.grad is not None and bool(x.grad.any()) for x in floats)
    expect(not blocked, "no gradient reaches the input, so the embedding before it could not learn")


def _own_terms(module: nn.Module) -> Tensor:
    """What the part adds to the loss of the batch it saw last, `[]`."""
    total = torch.zeros(())
    if isinstance(module, Regularised):
        total = total + module.penalty()
    if isinstance(module, Supervised):
        auxiliary = call(module, "auxiliary", batch(ROWS))
        expect(isinstance(auxiliary, Tensor), f"auxiliary returned {type(auxiliary).__name__}, expected a tensor")
        what = f"{auxiliary.dtype} {tuple(auxiliary.shape)}"
        expect(auxiliary.shape == () and auxiliary.dtype == torch.float32, f"auxiliary is {what}, expected float32 ()")
        finite(auxiliary, "auxiliary")
        total = total + auxiliary
    return total


def _idle(module: nn.Module) -> list[str]:
    """The names of the parameters without a gradient."""
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not bool(_dense(parameter.grad).any()))
    ]


def _independent(subject: Subject) -> None:
    module = _evaluating(subject)
    inputs = subject.inputs(ROWS)
    whole = module(*inputs)
    for part in (slice(0, 3), slice(3, ROWS), slice(2, 3)):
        alone = module(*(x[part] for x in inputs))
        close(alone, whole[part], f"rows {part.start}:{part.stop} alone and among {ROWS} rows differ")


def _repeatable(subject: Subject) -> None:
    module = _evaluating(subject)
    inputs = subject.inputs(ROWS)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first = module(*inputs)
    expect(torch.equal(first, module(*inputs)), "the same input gives different outputs in eval mode")
    for name, value in module.state_dict().items():
        expect(torch.equal(before[name], value), f"forward changes {name} in eval mode")


def _seeded(subject: Subject) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        states.append(subject.build().state_dict())
    expect(states[0].keys() == states[1].keys(), "two builds have different parameters")
    for name, value in states[0].items():
        expect(torch.equal(value, states[1][name]), f"{name} differs between two builds with the same seed")


def _meta(subject: Subject) -> None:
    with torch.device("meta"):
        module = subject.build()
    here = [name for name, parameter in module.named_parameters() if parameter.device.type != "meta"]
    expect(not here, f"{', '.join(here)} ignore the default device")


def _export(subject: Subject) -> None:
    module = _evaluating(subject)
    exported = _exported(subject, module, 3)
    for rows in (1, 2, 17):
        inputs = subject.inputs(rows)
        close(exported.module()(*inputs), module(*inputs), f"exported and original differ for B={rows}", 1e-4)


def _graph(subject: Subject) -> None:
    sizes = {}
    for count in (3, 9):
        graph = _exported(subject, _evaluating(subject, count), count).graph
        sizes[count] = sum(node.op == "call_function" for node in graph.nodes)
    expect(sizes[3] == sizes[9], f"the graph has {sizes[3]} operations for 3 fields and {sizes[9]} for 9")


def _state(subject: Subject) -> None:
    module = _evaluating(subject)
    inputs = subject.inputs(ROWS)
    wanted = module(*inputs)
    torch.manual_seed(99)
    other = subject.build().eval()
    other.load_state_dict(module.state_dict())
    close(other(*inputs), wanted, "a new one with the same state gives another output", 1e-6)
    close(copy.deepcopy(module)(*inputs), wanted, "a deep copy gives another output", 1e-6)


def _bf16(subject: Subject) -> None:
    module = _evaluating(subject)
    inputs = subject.inputs(ROWS)
    wanted = module(*inputs).detach().double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(*inputs).detach().double()
    finite(got, "the output under bfloat16 autocast")
    error = float((got - wanted).norm() / wanted.norm().clamp(min=1e-12))
    expect(error <= 2e-2, f"under bfloat16 autocast the output is {error:.1%} off, at most 2% is allowed")


def _exported(subject: Subject, module: nn.Module, count: int) -> torch.export.ExportedProgram:
    inputs = subject.inputs(ROWS, count)
    return export(module, inputs, dynamic_shapes=subject.dynamic(Dim("batch", min=1)), strict=False)


def _require_grad(inputs: Inputs) -> list[Tensor]:
    floats = [x for x in inputs if x.is_floating_point()]
    for x in floats:
        x.requires_grad_()
    return floats


def _zeros(inputs: Inputs) -> Inputs:
    return tuple(torch.zeros_like(x) if x.is_floating_point() else x for x in inputs)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def call(module: nn.Module, name: str, *args: Any) -> Any:
    """Call a method of the part's protocol; a missing one is a failure with its name.

    Raises:
        AssertionError: there is no such method.
    """
    method = getattr(module, name, None)
    expect(callable(method), f"it has no method `{name}`")
    return cast("Callable[..., Any]", method)(*args)
