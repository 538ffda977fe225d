"""What a loss promises; see `recsys.contracts.Loss`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from recsys.contracts import FIRST_ID, SAMPLED, EncodedSchema, Field
from recsys.data.schema import CONTEXT as LOGGED
from recsys.testing import modules, samples
from recsys.testing.kit import Check, expect

CONTEXT = (*LOGGED, *SAMPLED)
ROWS = 8


def checks(build: Callable[..., Any]) -> list[Check]:
    """Return the checks of a loss."""
    return [
        Check("needs", f"list the context columns it reads, of {', '.join(CONTEXT)}", lambda: _needs(build)),
        Check("float32_scalar", "compute on `logit.float()` and return the mean, `[]`", lambda: _scalar(build)),
        Check(
            "bce_equality",
            "with weight and propensity 1, all rows observed: the mean binary_cross_entropy_with_logits, nothing added",
            lambda: _bce(build),
        ),
        Check("gradients", "let every logit take part, and keep exponentials from overflowing", lambda: _grads(build)),
        Check("every_task", "average over `tasks`, not the first one only", lambda: _tasks(build)),
        Check(
            "pure", "change neither the batch nor own state, and draw no random numbers in eval", lambda: _pure(build)
        ),
    ]


def schema(tasks: tuple[str, ...] = ("label",)) -> EncodedSchema:
    """Return two fields, of which the second tells items apart, the tasks and every context column."""
    return EncodedSchema((Field("f0", 5), Field("f1", FIRST_ID + ROWS)), (), tasks, CONTEXT)


def sample(tasks: tuple[str, ...] = ("label",), scale: float = 2.0) -> tuple[dict[str, Tensor], Any]:
    """Return logits and a batch with every context column, weights and propensities 1.

    One row is sampled for each of the four logged ones, which are positive.
    """
    of = schema(tasks)
    logits = {
        task: scale * torch.randn(ROWS, generator=samples.generator(i)).requires_grad_() for i, task in enumerate(tasks)
    }
    for logit in logits.values():
        logit.retain_grad()
    batch = samples.batch(ROWS, of)
    half = ROWS // 2
    row = torch.arange(ROWS)
    item = FIRST_ID + row  # nobody meets itself
    marks = {"positive": torch.where(row < half, -1, row - half), "item": item, "log_q": -0.5 * item.float()}
    label = {task: (row < half).float() for task in tasks}
    ids = torch.stack([batch.ids[:, 0], item], 1)
    return logits, replace(batch, ids=ids, label=label, context={**batch.context, **marks}, negatives=1)


def _build(build: Callable[..., Any], tasks: tuple[str, ...] = ("label",)) -> Any:
    torch.manual_seed(1)
    return build(tasks, schema(tasks))


def _needs(build: Callable[..., Any]) -> None:
    needs = getattr(_build(build), "needs", None)
    fine = isinstance(needs, tuple) and all(name in CONTEXT for name in needs)
    expect(fine, f"`needs` is {needs!r}, expected a tuple of context columns")
    logits, batch = sample()
    only = {name: value for name, value in batch.context.items() if name in (needs or ())}
    _build(build)(logits, replace(batch, context=only))  # a column outside `needs` may be absent


def _scalar(build: Callable[..., Any]) -> None:
    logits, batch = sample()
    loss = _build(build)(logits, batch)
    expect(isinstance(loss, Tensor) and loss.shape == (), "it must return a tensor `[]`")
    expect(loss.dtype == torch.float32, f"it returns {loss.dtype}")
    half = {task: logit.detach().bfloat16() for task, logit in logits.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = _build(build)(half, batch)
    expect(under.dtype == torch.float32, f"under bfloat16 autocast it returns {under.dtype}")
    exact = _build(build)({task: logit.float() for task, logit in half.items()}, batch)
    modules.close(under, exact, "under bfloat16 autocast, with the same logits, the loss", 1e-5)


def _bce(build: Callable[..., Any]) -> None:
    for scale in (0.1, 2.0, 30.0):
        logits, batch = sample(scale=scale)
        wanted = nn.functional.binary_cross_entropy_with_logits(logits["label"], batch.label["label"])
        modules.close(_build(build)(logits, batch), wanted, f"loss and BCE for logits around ±{scale}", 1e-5)


def _grads(build: Callable[..., Any]) -> None:
    for scale in (2.0, 60.0):
        logits, batch = sample(scale=scale)
        loss = _build(build)
        value = loss(logits, batch)
        modules.finite(value, f"the loss for logits around ±{scale}")
        value.backward()
        gradient = logits["label"].grad
        expect(gradient is not None, "no gradient reaches the logits")
        if gradient is not None:
            modules.finite(gradient, f"the gradient for logits around ±{scale}")
            expect(scale > 10 or bool((gradient != 0).all()), "some rows get no gradient")
        if isinstance(loss, nn.Module):
            idle = [name for name, p in loss.named_parameters() if p.requires_grad and p.grad is None]
            expect(not idle, f"no gradient reaches {', '.join(idle)}")


def _tasks(build: Callable[..., Any]) -> None:
    logits, batch = sample(("click", "buy"))
    value = _build(build, ("click", "buy"))(logits, batch)
    expect(value.shape == (), f"with two tasks it returns {tuple(value.shape)}, expected []")
    value.backward()
    for task, logit in logits.items():
        expect(logit.grad is not None and bool(logit.grad.any()), f"the task '{task}' gets no gradient")


def _pure(build: Callable[..., Any]) -> None:
    logits, batch = sample()
    loss = _build(build)
    if isinstance(loss, nn.Module):
        loss.eval()
    kept = {name: value.clone() for name, value in {**batch.context, **batch.label}.items()}
    first = loss(logits, batch)
    expect(torch.equal(first, loss(logits, batch)), "two calls with the same batch differ")
    for name, value in {**batch.context, **batch.label}.items():
        expect(torch.equal(value, kept[name]), f"it changes the batch's '{name}'")
