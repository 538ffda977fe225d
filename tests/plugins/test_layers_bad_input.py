"""Input at the edge through every installed interaction and sequence encoder: what is registered is tested here."""

import pytest
import torch
from torch import nn

from recsys.contracts import Fields
from recsys.errors import RecsysError
from recsys.plugin.registry import load_registry

REGISTRY = load_registry()
INTERACTIONS = REGISTRY.names("interaction")
SEQUENCES = REGISTRY.names("sequence")
ALONE = {"fwfm", "fm", "nfm"}
"""Sums over pairs of fields: of one field there are none, and the output is a constant."""

NAMED = {"macr": {"user": "f0", "item": "f1"}, "two_tower": {"item": ["f1"]}}
"""Options of layers that read fields by name."""


def interaction(name, count, dim):
    torch.manual_seed(0)
    fields = Fields(tuple(f"f{i}" for i in range(count)), (10,) * count, dim)
    spec = {"use": name, **NAMED.get(name, {})}
    return REGISTRY.build("interaction", spec, fields, where="model.interaction")


def refusal(name, count, dim):
    """What a layer says that cannot be built for so many fields or dimensions; empty if it can."""
    try:
        interaction(name, count, dim)
    except RecsysError as error:
        return str(error)
    return ""


def sequence(name, width=8):
    torch.manual_seed(0)
    return REGISTRY.build("sequence", name, width, where="model.sequence")


def finite(module, *inputs):
    """Output and gradients in training, and the output in evaluation, are finite; returns the latter."""
    module.train()
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    module(*leaves).float().square().mean().backward()
    for parameter in (*module.parameters(), *(x for x in leaves if x.is_floating_point())):
        assert parameter.grad is None or bool(parameter.grad.isfinite().all())
    module.eval()
    with torch.no_grad():
        out = module(*inputs)
    assert bool(out.isfinite().all())
    return out


@pytest.mark.parametrize("name", INTERACTIONS)
def test_one_field_is_enough_or_refused_in_words(name):
    """A product of nothing, a softmax over one field: the defined value, never NaN."""
    if said := refusal(name, 1, 4):
        assert "field" in said
        return
    module = interaction(name, 1, 4)
    e = torch.randn(5, 1, 4)
    out = finite(module, e)
    assert out.shape == (5, module.width)
    moved = module(e + 1)
    assert name in ALONE or not torch.equal(moved, out), "the one field is not read"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", INTERACTIONS)
def test_embeddings_fifty_times_as_large_stay_finite_both_ways(name, dtype):
    module = interaction(name, 6, 8)
    e = 50 * torch.randn(16, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        finite(module, e)


@pytest.mark.parametrize("name", INTERACTIONS)
def test_odd_widths_build_and_count_every_column(name):
    """Seven dimensions over five fields: nothing may assume an even number, or say so."""
    if said := refusal(name, 5, 7):
        assert "7" in said, "the message does not say which width"
        return
    module = interaction(name, 5, 7)
    e = torch.randn(4, 5, 7)
    out = finite(module, e)
    for column in (0, 6):
        moved = e.clone()
        moved[:, :, column] += 0.5
        assert not torch.equal(module(moved), out), f"dimension {column} is not read"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEQUENCES)
def test_histories_of_any_length_and_size_stay_finite_both_ways(name, dtype):
    """All padding, one event, all events; vectors fifty times as large as usual, NaN where there is no event."""
    module = sequence(name)
    torch.manual_seed(1)
    length = torch.tensor([0, 1, 5, 3])
    history = 50 * torch.randn(4, 5, 8)
    history[torch.arange(5) >= length.unsqueeze(1)] = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = finite(module, 50 * torch.randn(4, 8), history, length)
        assert not out[0].any(), "an empty history gives zeros"
        alone = finite(sequence(name), torch.randn(3, 8), torch.zeros(3, 5, 8), torch.zeros(3, dtype=torch.int64))
        assert not alone.any()
        finite(sequence(name), torch.randn(1, 8), torch.randn(1, 1, 8), torch.tensor([1]))


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_target_that_is_like_no_event_is_scored_like_any_other(name):
    """A target outside the history's vocabulary is the unknown row: at first a vector near zero."""
    module = sequence(name)
    history, length = torch.randn(3, 4, 8), torch.tensor([4, 2, 1])
    for target in (torch.zeros(3, 8), 1e-4 * torch.randn(3, 8)):
        out = finite(module, target, history, length)
        assert out.shape == (3, 8)


def test_the_lists_are_not_empty():
    assert len(INTERACTIONS) > 15
    assert len(SEQUENCES) > 3
    assert isinstance(interaction("mlp", 2, 2), nn.Module)
