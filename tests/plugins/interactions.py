"""What the tests of all interaction layers share: small inputs, comparison with a loop, and the exported graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recsys.contracts import EncodedSchema, Field, Fields
from recsys.nn.head import Head
from recsys.nn.table import Table

DOUBLE = torch.float64
ROWS = 11
"""A prime that no width of a layer under test is a multiple of: it tells a batch of tensors from weights."""


def fields(count: int, dim: int) -> Fields:
    """Return `count` fields f0, f1, … of ten rows each."""
    return Fields(tuple(f"f{i}" for i in range(count)), (10,) * count, dim)


def randomised(module: nn.Module, std: float = 0.5) -> nn.Module:
    """Give every parameter and every running mean and variance a value of its own; float64, in evaluation mode."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm1d):
            assert m.running_mean is not None
            assert m.running_var is not None
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2.0)
    return module.double().eval()


def vectors(rows: int, count: int, dim: int, seed: int = 1) -> Tensor:
    """Return `e [B, F, D]` in float64, with a gradient."""
    return torch.randn(rows, count, dim, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).requires_grad_()


def assert_equal_to_loop(module: nn.Module, loop: Callable[[Tensor], Tensor], e: Tensor, limit: float = 1e-9) -> None:
    """Compare with `loop`, which takes one row `[F, D]` and gives `[H]`: outputs, and the gradients of a random sum
    with respect to the input and every parameter."""
    fast = module(e)
    slow = torch.stack([loop(row) for row in e])
    assert fast.shape == slow.shape
    assert (fast - slow).abs().max() <= limit
    above = torch.randn(fast.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    names = ["e", *(name for name, _ in module.named_parameters())]
    wanted = [e, *module.parameters()]
    ours = torch.autograd.grad((fast * above).sum(), wanted)
    theirs = torch.autograd.grad((slow * above).sum(), wanted, allow_unused=True)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert b is not None, f"the loop does not use {name}"
        assert ((a - b).abs() <= limit * (1 + b.abs())).all(), name


def mlp_loop(block: nn.Module, x: Tensor) -> Tensor:
    """A perceptron in evaluation mode, `[W] -> [H]`, layer by layer from its weights."""
    for layer in block.layers:
        if isinstance(layer, nn.Linear):
            x = torch.stack([w @ x + b for w, b in zip(layer.weight, layer.bias, strict=True)])
        elif isinstance(layer, nn.BatchNorm1d):
            x = (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt() * layer.weight + layer.bias
        elif isinstance(layer, nn.ReLU):
            x = torch.where(x > 0, x, 0.0)
    return x


def assert_small_graph(build: Callable[[Fields], nn.Module], dim: int = 4) -> None:
    """Export at 5 and at 50 fields: as many operations, and never a tensor of B · F · F · D numbers."""
    nodes = {}
    for count in (5, 50):
        e = torch.randn(ROWS, count, dim)
        graph = torch.export.export(build(fields(count, dim)).eval(), (e,), strict=False).graph
        nodes[count] = len([n for n in graph.nodes if n.op == "call_function"])
        whole = ROWS * count * count * dim
        for node in graph.nodes:
            value = node.meta.get("val")
            sized = isinstance(value, Tensor) and value.numel() % ROWS == 0 and count == 50
            assert not (sized and value.numel() >= whole), f"{node} is {tuple(value.shape)}"
    assert nodes[5] == nodes[50], f"operations by number of fields: {nodes}"


def xor_auc(build: Callable[[Fields], nn.Module], *, steps: int = 150, dim: int = 8) -> float:
    """AUC on all combinations of two six-valued fields and a noise field; the label is the parity of the first two."""
    torch.manual_seed(3)
    ids = torch.cartesian_prod(torch.arange(6), torch.arange(6), torch.arange(6))
    y = ((ids[:, 0] + ids[:, 1]) % 2).float()
    schema = EncodedSchema(tuple(Field(n, 6) for n in "abc"))
    table = Table(schema, dim=dim, init_std=0.5)
    model = build(table.fields)
    head = Head(schema, [model])
    modules = nn.ModuleList([table, model, head])
    optimizer = torch.optim.Adam(modules.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        logit = head([model(table(ids))], ids, None)["label"]
        nn.functional.binary_cross_entropy_with_logits(logit, y).backward()
        optimizer.step()
    modules.eval()
    with torch.no_grad():
        logit = head([model(table(ids))], ids, None)["label"]
    above = logit[y == 1].unsqueeze(1) - logit[y == 0]
    return float((above > 0).double().mean() + 0.5 * (above == 0).double().mean())
