"""FinalMLP against its equations: gates, two perceptrons, and the bilinear form block by block."""

import pytest
import torch
from interactions import assert_equal_to_loop, assert_small_graph, fields, mlp_loop, randomised, vectors, xor_auc

from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_finalmlp import FinalMLP

SMALL = {"first": (8, 6), "second": (4,), "gate_hidden": (5,)}
OPTIONS = [
    {"heads": 2, "first_context": ("f0",), "second_context": ("f2", "f1")},
    {"batch_norm": True, "dropout": 0.4},
    {"gates": False, "heads": 2},
    {"context_dims": 2, "first_context": ("f1", "f2")},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_contract(options):
    contract("interaction", lambda f: FinalMLP(f, **SMALL, **options))
    assert_small_graph(lambda f: FinalMLP(f, **SMALL, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_and_gradients_are_those_of_the_equations(options):
    model = randomised(FinalMLP(fields(3, 4), **SMALL, **options))
    own = options.get("context_dims", 0)
    contexts = [options.get(f"{s}_context", ()) for s in ("first", "second")]

    def loop(row):
        h = []
        for s, stack in enumerate(model.stacks):
            x, seen = row[:, : 4 - own].flatten(), row[:, 4 - own :] if own else row
            if options.get("gates", True):
                gate = model.gates[s]
                c = torch.cat([seen[int(name[1:])] for name in contexts[s]]) if contexts[s] else gate.learned[0]
                z = gate.last.weight @ mlp_loop(gate.stack, c) + gate.last.bias
                x = x * 2 / (1 + (-z).exp())
            h.append(mlp_loop(stack, x))
        one, two = h
        logit = model.linears[0].weight[0] @ one + model.linears[1].weight[0] @ two
        heads = options.get("heads", 1)
        a, b = 6 // heads, 4 // heads
        for k in range(heads):
            for i in range(a):
                for j in range(b):
                    logit = logit + one[k * a + i] * model.weight[k, i, j] * two[k * b + j]
        return logit.reshape(1)

    assert_equal_to_loop(model, loop, vectors(3, 3, 4))


def test_gates_start_near_one_and_depend_on_their_context_only():
    torch.manual_seed(0)
    model = FinalMLP(fields(4, 3), first_context=("f1",)).eval()
    assert torch.allclose(model.gates[0](torch.zeros(2, 4, 3)), torch.ones(2, 12))
    model = randomised(model)
    e = vectors(5, 4, 3)
    gates = model.gates[0](e)
    (gradient,) = torch.autograd.grad(gates.sum(), e)
    assert gradient[:, 1].abs().min() > 0
    assert gradient[:, [0, 2, 3]].abs().max() == 0
    assert ((gates > 0) & (gates < 2)).all()
    learned = model.gates[1](e)
    assert torch.equal(learned, learned[:1].expand(5, -1)), "a learned vector gates every row alike"
    shown = model.explain(e)
    assert list(shown) == ["gate.1", "gate.2"]
    assert torch.allclose(shown["gate.1"][:, 2], gates[:, 6:9].mean(1))


def test_parameters_are_the_published_count():
    model = FinalMLP(
        fields(10, 20), first=(400,), second=(100,), batch_norm=True, heads=5, gate_hidden=(400,),
        first_context=("f0",), second_context=("f1",), context_dims=10,
    )  # fmt: skip
    gates = 2 * (10 * 400 + 400 + 400 * 100 + 100)
    streams = 100 * 400 + 3 * 400 + 100 * 100 + 3 * 100
    count = gates + streams + 500 + 5 * 80 * 20
    assert sum(p.numel() for p in model.parameters()) == count
    tables = 10 * (5399 + 956 + 4084)  # all fields; user and item once more, for the contexts
    assert count + tables + 2 == 253_392, "the published run has a bias for each stream"


def test_wrong_options_are_named():
    with pytest.raises(RecipeError, match=r"no field 'f9'\. Did you mean 'f\d'\? Fields: f0, f1, f2"):
        FinalMLP(fields(3, 2), second_context=("f9",))
    with pytest.raises(RecipeError, match="last widths 6 and 4 cannot both be split into 4 heads"):
        FinalMLP(fields(3, 2), first=(6,), second=(4,), heads=4)
    with pytest.raises(RecipeError, match="context_dims is 2 of 2 dimensions: none is left to the perceptrons"):
        FinalMLP(fields(3, 2), context_dims=2)
    with pytest.raises(RecipeError, match="the gates, which are off"):
        FinalMLP(fields(3, 2), context_dims=1, gates=False)


def test_it_learns_xor():
    assert xor_auc(lambda f: FinalMLP(f, first=(16,), second=(16,), heads=2)) > 0.99
