"""Optimizers, with weight decay on tables as published results have it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

OptimizerName = Literal["adam", "adamw", "sgd", "adagrad"]

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
}


def build_optimizer(
    groups: tuple[Iterable[nn.Parameter], Iterable[nn.Parameter]],
    *,
    name: OptimizerName = "adam",
    lr: float = 1e-3,
    embedding_l2: float = 0.0,
    network_l2: float = 0.0,
) -> torch.optim.Optimizer:
    """Build the optimizer of a model.

    `embedding_l2` = λ adds λ·w to the gradient of *every* row of the tables (and of the first-order weights) in
    every step, rows that the batch did not touch included: the gradient of (λ/2)‖E‖². Published results of CTR
    models need it; decaying touched rows only is another regulariser. `network_l2` does the same for the rest.
    With `adamw` both are decoupled instead: w ← w − lr·λ·w.

    Args:
        groups: (table parameters, other parameters), from `Model.parameter_groups()`.
        name: adam, adamw, sgd or adagrad, with PyTorch's defaults.
        lr: learning rate.
        embedding_l2: λ of the table parameters.
        network_l2: λ of the others.
    """
    tables, others = ([p for p in group if p.requires_grad] for group in groups)
    parameters: list[dict[str, Any]] = [
        {"params": params, "weight_decay": decay}
        for params, decay in ((tables, embedding_l2), (others, network_l2))
        if params
    ]
    fused = _can_fuse(name, [*tables, *others])
    options: dict[str, Any] = {"lr": lr, "fused": True} if fused else {"lr": lr}
    return _OPTIMIZERS[name](parameters, **options)


def _can_fuse(name: str, parameters: list[nn.Parameter]) -> bool:
    """Whether PyTorch has the one-kernel step: it updates a table about ten times faster on the CPU."""
    devices = {"cpu"} if name == "adagrad" else {"cpu", "cuda"}
    return all(p.device.type in devices and p.is_floating_point() for p in parameters)
