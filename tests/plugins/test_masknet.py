"""MaskNet against its equations, and masks that differ from row to row."""

import pytest
import torch
from interactions import assert_equal_to_loop, assert_small_graph, fields, mlp_loop, randomised, vectors, xor_auc

from recsys.testing import contract
from recsys_masknet import MaskNet

OPTIONS = [
    {"structure": "serial", "hidden": (7, 5)},
    {"structure": "serial", "hidden": (7,), "field_norm": False, "layer_norm": False, "ratio": 0.5},
    {"structure": "parallel", "hidden": (5,), "blocks": 2, "block_width": 3, "dropout": 0.2},
    {"structure": "parallel", "hidden": (), "blocks": 1, "block_width": 4, "field_norm": False},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_contract(options):
    contract("interaction", lambda f: MaskNet(f, **options))
    assert_small_graph(lambda f: MaskNet(f, **options))


def normalised(x, eps=1e-5):
    centred = x - x.mean()
    return centred / (centred.square().mean() + eps).sqrt()


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_equations(options):
    model = randomised(MaskNet(fields(3, 4), **options))

    def block_loop(block, embedded, v):
        first, _, second = block.mask
        mask = second.weight @ torch.relu(first.weight @ embedded + first.bias) + second.bias
        y = torch.stack([sum(w[i] * mask[i] * v[i] for i in range(len(v))) for w in block.linear.weight])
        if options.get("layer_norm", True):
            y = normalised(y) * block.norm.weight + block.norm.bias
        else:
            y = y + block.linear.bias
        return torch.relu(y)

    def loop(row):
        v = row
        if options.get("field_norm", True):
            v = torch.stack([normalised(row[f]) * model.gain[f] + model.shift[f] for f in range(3)])
        v = v.flatten()
        if options["structure"] == "serial":
            for block in model.blocks:
                v = block_loop(block, row.flatten(), v)
            return v
        return mlp_loop(model.stack, torch.cat([block_loop(b, row.flatten(), v) for b in model.blocks]))

    assert_equal_to_loop(model, loop, vectors(4, 3, 4))


def test_the_mask_is_the_rows_own():
    model = randomised(MaskNet(fields(3, 4), blocks=2))
    shown = model.explain(vectors(5, 3, 4))
    assert list(shown) == ["mask.0", "mask.1"]
    for mask in shown.values():
        assert mask.shape == (5, 3)
        assert (mask[0] - mask[1]).abs().max() > 1e-2
    assert list(MaskNet(fields(3, 4), structure="serial").explain(torch.zeros(1, 3, 4))) == ["mask.0"]


def test_parameters_are_the_published_count():
    model = MaskNet(fields(10, 10), blocks=3, block_width=50, field_norm=False)
    blocks = 3 * (100 * 200 + 200 + 200 * 100 + 100 + 100 * 50 + 100)
    stack = 150 * 400 + 2 * 400 * 400 + 3 * 400
    assert sum(p.numel() for p in model.parameters()) == blocks + stack
    assert blocks + stack + 401 + 53_890 == 571_691, "with the head and the embedding of the published run"


@pytest.mark.parametrize("structure", ["serial", "parallel"])
def test_it_learns_xor(structure):
    assert xor_auc(lambda f: MaskNet(f, structure=structure, hidden=(16,), blocks=2, block_width=16)) > 0.99
