"""AutoInt against a loop over heads and fields, the paper's counts, and a task that only interactions solve."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from recsys.contracts import EncodedSchema, Field, Fields
from recsys.errors import RecipeError
from recsys.nn.head import Head
from recsys.nn.table import Table
from recsys_autoint import AutoInt, AutoIntPlus, InteractingLayer, Variant

PRESETS = ("paper", "official", "fuxictr", "deepctr")


def fields(count, dim):
    return Fields(tuple(f"f{i}" for i in range(count)), (10,) * count, dim)


def projections(layer):
    """W_Q, W_K, W_V, W_Res and their biases, cut out of the fused matrix."""
    names = ("q", "k", "v", "res")[: layer.parts]
    weights = dict(zip(names, layer.weight.split(layer.width), strict=True))
    biases = {} if layer.bias is None else dict(zip(names, layer.bias.split(layer.width), strict=True))
    return weights, biases


def slow_layer(layer, e, *, scaled, activated, residual, norm):
    """One row, one head, one pair of fields at a time, with the preset spelled out by the caller."""
    weights, biases = projections(layer)
    rows, count, in_width = e.shape
    size = layer.width // layer.heads

    def project(name, vector):
        out = weights[name] @ vector
        if activated:
            out = torch.relu(out + biases[name])
        return out

    out = []
    for b in range(rows):
        for m in range(count):
            heads = []
            for h in range(layer.heads):
                part = slice(h * size, (h + 1) * size)
                scores = [project("q", e[b, m])[part] @ project("k", e[b, k])[part] for k in range(count)]
                scores = [s / math.sqrt(size) for s in scores] if scaled else scores
                total = sum(s.exp() for s in scores)
                heads.append(sum(s.exp() / total * project("v", e[b, k])[part] for k, s in enumerate(scores)))
            mixed = torch.cat(heads)
            if residual == "projected" or (residual == "identity" and in_width != layer.width):
                mixed = mixed + project("res", e[b, m])
            elif residual == "identity":
                mixed = mixed + e[b, m]
            out.append(norm(mixed, layer.norm))
    return torch.stack(out).view(rows, count, layer.width)


def relu_only(x, _):
    return torch.relu(x)


def normalised(x, norm):
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def relu_then_norm(x, norm):
    return normalised(torch.relu(x), norm)


def norm_then_relu(x, norm):
    return torch.relu(normalised(x, norm))


PLAIN = {"scaled": False, "activated": False, "residual": "projected", "norm": relu_only}
ORACLES = [
    pytest.param({"preset": "paper"}, PLAIN, id="paper"),
    pytest.param(
        {"preset": "official"},
        {"scaled": True, "activated": True, "residual": "projected", "norm": relu_then_norm},
        id="official",
    ),
    pytest.param({"preset": "fuxictr"}, PLAIN | {"residual": "identity"}, id="fuxictr"),
    pytest.param(
        {"preset": "fuxictr", "scale": True, "layer_norm": True},
        {"scaled": True, "activated": False, "residual": "identity", "norm": norm_then_relu},
        id="fuxictr with scale and layer norm",
    ),
    pytest.param({"preset": "deepctr"}, PLAIN, id="deepctr"),
    pytest.param({"preset": "paper", "residual": "none", "scale": True}, PLAIN | {"residual": "none", "scaled": True}),
]


@pytest.mark.parametrize(("options", "oracle"), ORACLES)
@pytest.mark.parametrize("width", [6, 8])
def test_outputs_and_gradients_are_those_of_the_loop(options, oracle, width):
    torch.manual_seed(0)
    width = 6 if options["preset"] == "deepctr" else width  # there, the embedding dimension
    given_width = None if options["preset"] == "deepctr" else width
    model = AutoInt(fields(4, 6), layers=2, heads=2, width=given_width, **options).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    e = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4 * width, dtype=torch.float64)
    wanted_from = [e, *model.parameters()]

    slow = e
    for layer in model.layers:
        slow = slow_layer(layer, slow, **oracle)
    slow = slow.flatten(1)
    fast = model(e)
    assert (fast - slow).abs().max() <= 1e-9
    fast_grads = torch.autograd.grad((fast * weight).sum(), wanted_from)
    slow_grads = torch.autograd.grad((slow * weight).sum(), wanted_from)
    for a, b in zip(fast_grads, slow_grads, strict=True):
        assert (a - b).abs().max() <= 1e-9


def test_parameter_count_is_the_papers():
    schema = EncodedSchema(tuple(Field(f"f{i}", 3) for i in range(39)))
    model = AutoInt(fields(39, 16), layers=3, heads=2, width=64)
    head = Head(schema, [model])
    count = sum(p.numel() for module in (model, head) for p in module.parameters())
    assert count == 39_361 == 4096 + 2 * 16384 + 39 * 64 + 1


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_parameter_count_identity(count, dim, heads, per_head, layers):
    width = heads * per_head
    model = AutoInt(fields(count, dim), layers=layers, heads=heads, width=width)
    assert sum(p.numel() for p in model.parameters()) == sum(4 * width * d for d in [dim, *[width] * (layers - 1)])
    assert model.width == count * width


def test_constant_keys_give_uniform_attention():
    torch.manual_seed(0)
    layer = InteractingLayer(5, 6, 2, Variant(residual="none")).double()
    with torch.no_grad():
        projections(layer)[0]["k"].zero_()
    e = torch.randn(3, 7, 5, dtype=torch.float64)
    assert torch.allclose(layer.attention(e), torch.full((3, 2, 7, 7), 1 / 7, dtype=torch.float64))
    out = layer(e)
    assert torch.allclose(out, out[:, :1].expand_as(out))
    assert torch.allclose(out[:, 0], torch.relu(e.mean(1) @ projections(layer)[0]["v"].T))


def test_scale_switch_is_exactly_a_factor_of_the_queries():
    torch.manual_seed(0)
    plain = InteractingLayer(5, 8, 2, Variant()).double()
    scaled = InteractingLayer(5, 8, 2, Variant(scale=True)).double()
    scaled.load_state_dict(plain.state_dict())
    e = torch.randn(4, 6, 5, dtype=torch.float64)
    assert (plain(e) - scaled(e)).abs().max() > 1e-3
    with torch.no_grad():
        projections(scaled)[0]["q"].mul_(2.0)  # √d' with d' = 4
    assert torch.allclose(plain(e), scaled(e), atol=1e-12)


def test_residual_alone_and_its_absence():
    torch.manual_seed(0)
    e = torch.randn(4, 6, 5)
    for residual in ("none", "projected", "identity"):
        layer = InteractingLayer(5, 5 if residual == "identity" else 8, 1, Variant(residual=residual))
        with torch.no_grad():
            projections(layer)[0]["v"].zero_()
        want = {"none": 0 * layer(e), "identity": e.relu()}.get(residual)
        want = torch.relu(e @ projections(layer)[0]["res"].T) if want is None else want
        assert torch.allclose(layer(e), want, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_permuting_fields_permutes_the_output(preset):
    torch.manual_seed(0)
    model = AutoInt(fields(6, 8), preset=preset, layers=2).double().eval()
    e = torch.randn(3, 6, 8, dtype=torch.float64)
    order = torch.randperm(6)
    out = model(e).view(3, 6, -1)
    assert torch.allclose(model(e[:, order]).view(3, 6, -1), out[:, order], atol=1e-12)


def test_numeric_fields_enter_linearly():
    table = Table(EncodedSchema((Field("x", 2, numeric=True), Field("c", 5))), dim=4, init_std=1.0)
    ids, values = torch.tensor([[1, 3]]), torch.tensor([[1.5, 1.0]])
    e, doubled = table(ids, values), table(ids, values * torch.tensor([2.0, 1.0]))
    assert torch.equal(doubled[0, 0], 2 * e[0, 0])
    assert torch.equal(table(ids, torch.tensor([[0.0, 1.0]]))[0, 0], torch.zeros(4))


def test_plus_adds_the_two_logits_and_teaches_the_embedding_from_both():
    torch.manual_seed(0)
    schema = EncodedSchema(tuple(Field(f"f{i}", 9) for i in range(4)))
    model = AutoIntPlus(fields(4, 6), layers=2, heads=2, width=8, hidden=(7, 5)).double().eval()
    head = Head(schema, [model]).double()
    e = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(3, 4, dtype=torch.int64)
    logit = head([model(e)], ids, None)["label"]
    w = head.weight[0]
    attention = model.attention(e) @ w[: 4 * 8]
    network = model.network(e.flatten(1)) @ w[4 * 8 :]
    assert torch.allclose(logit, attention + network + head.bias)
    whole, one, two = (torch.autograd.grad(x.sum(), e, retain_graph=True)[0] for x in (logit, attention, network))
    assert torch.allclose(whole, one + two)
    assert one.abs().max() > 1e-4
    assert two.abs().max() > 1e-4


def xor_auc(layers):
    """Train on every combination of two six-valued fields and a noise field; label: parity of the first two."""
    torch.manual_seed(3)
    ids = torch.cartesian_prod(torch.arange(6), torch.arange(6), torch.arange(6))
    y = ((ids[:, 0] + ids[:, 1]) % 2).float()
    schema = EncodedSchema(tuple(Field(n, 6) for n in "abc"))
    table = Table(schema, dim=8, init_std=0.5)
    model = AutoInt(table.fields, layers=layers, heads=2, width=16)
    head = Head(schema, [model])
    modules = torch.nn.ModuleList([table, model, head])
    optimizer = torch.optim.Adam(modules.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        logit = head([model(table(ids))], ids, None)["label"]
        torch.nn.functional.binary_cross_entropy_with_logits(logit, y).backward()
        optimizer.step()
    return roc_auc_score(y.numpy(), logit.detach().double().numpy())


def test_attention_alone_solves_xor_and_a_linear_model_does_not():
    assert xor_auc(layers=2) > 0.99
    assert xor_auc(layers=0) < 0.6


def test_explanation_is_the_attention_that_mixed_the_values():
    torch.manual_seed(0)
    model = AutoInt(fields(5, 6), layers=2, heads=2, width=8, residual="none").double().eval()
    e = torch.randn(3, 5, 6, dtype=torch.float64)
    shares = model.explain(e)
    assert list(shares) == ["attention.0", "attention.1"]
    for layer, share in zip(model.layers, shares.values(), strict=True):
        assert torch.allclose(share.sum(-1), torch.ones(3, 2, 5, dtype=torch.float64))
        values = (e @ projections(layer)[0]["v"].T).view(3, 5, 2, 4)
        mixed = torch.einsum("bhmk,bkhd->bmhd", share, values).flatten(2).relu()
        assert torch.allclose(mixed, layer(e))
        e = layer(e)


def test_presets_differ_as_the_table_says():
    widths = {p: AutoInt(fields(3, 10), preset=p).width // 3 for p in PRESETS}
    assert widths == {"paper": 64, "official": 64, "fuxictr": 64, "deepctr": 10}
    same = {p: AutoInt(fields(3, 16), preset=p, width=16).layers[0] for p in PRESETS}
    assert {p: layer.parts for p, layer in same.items()} == {"paper": 4, "official": 4, "fuxictr": 3, "deepctr": 4}
    assert [p for p, layer in same.items() if layer.bias is not None] == ["official"]
    assert [p for p, layer in same.items() if layer.norm is not None] == ["official"]
    assert {p: layer.scale for p, layer in same.items()} == {
        "paper": 1.0, "official": 8**-0.5, "fuxictr": 1.0, "deepctr": 1.0
    }  # fmt: skip


def test_dropout_works_on_attention_in_training_only():
    torch.manual_seed(0)
    model = AutoInt(fields(5, 8), dropout=0.5)
    e = torch.randn(4, 5, 8)
    assert not torch.equal(model(e), model(e))
    assert torch.equal(model.eval()(e), model(e))


def test_width_must_divide_into_heads():
    with pytest.raises(RecipeError, match="width 10 cannot be split over 3 heads"):
        AutoInt(fields(2, 4), heads=3, width=10)


@pytest.mark.parametrize("preset", PRESETS)
def test_few_and_many_fields_take_different_ways_to_the_same_result(preset, monkeypatch):
    torch.manual_seed(0)
    model = AutoInt(fields(6, 8), preset=preset, layers=2, width=8).double()
    e = torch.randn(5, 6, 8, dtype=torch.float64)
    above = torch.randn(5, model.width, dtype=torch.float64)

    def both_ways():
        x = e.clone().requires_grad_()
        out = model(x)
        return out, *torch.autograd.grad(out, [x, *model.parameters()], above, allow_unused=True)

    few = both_ways()
    monkeypatch.setattr("recsys.nn.attention.SMALL", 0)
    kernel = torch.nn.functional.scaled_dot_product_attention
    calls = []
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    many = both_ways()
    assert len(calls) == 2
    for ours, theirs in zip(few, many, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [3, 17])
@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_of_gradients_are_those_of_the_formula(preset, count, monkeypatch):
    torch.manual_seed(0)
    layer = AutoInt(fields(count, 2), preset=preset, layers=1, width=4).double().layers[0]
    monkeypatch.setattr("recsys.nn.attention.ROOM", 1)  # one row at a time
    e = torch.randn(2, count, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, e)
    assert torch.autograd.gradgradcheck(layer, e)
    # The gradient of a penalty on the gradient reaches every parameter.
    (above,) = torch.autograd.grad(layer(e).square().sum(), e, create_graph=True)
    assert all(g.abs().max() > 1e-12 for g in torch.autograd.grad(above.square().sum(), [e, layer.weight]))


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_are_the_same_however_many_are_worked_on_at_a_time(preset, monkeypatch):
    torch.manual_seed(0)
    model = AutoInt(fields(5, 8), preset=preset, layers=2, width=8).double()
    e = torch.randn(13, 5, 8, dtype=torch.float64, requires_grad=True)
    above = torch.randn(13, model.width, dtype=torch.float64)
    seen = []
    for scores in (2**17, 2 * 25 * 5):  # all rows, five
        monkeypatch.setattr("recsys.nn.attention.ROOM", scores)
        out = model(e)
        seen.append([out, *torch.autograd.grad(out, [e, *model.parameters()], above)])
    for whole, parts in zip(*seen, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)


def test_a_layer_used_twice_has_the_same_gradients_of_gradients_either_way(monkeypatch):
    torch.manual_seed(0)
    layer = InteractingLayer(4, 4, 2, Variant()).double()
    e = torch.randn(6, 5, 4, dtype=torch.float64, requires_grad=True)
    seen = []
    for small in (64, 0):
        monkeypatch.setattr("recsys.nn.attention.SMALL", small)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            inner = torch.autograd.grad(layer(layer(e)).square().sum(), [e, layer.weight], create_graph=True)
            seen.append([*inner, *torch.autograd.grad(sum(g.square().sum() for g in inner), [e, layer.weight])])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_inputs_in_another_order_of_memory():
    torch.manual_seed(0)
    model = AutoInt(fields(5, 8), layers=2, width=8).double()
    e = torch.randn(5, 8, 13, dtype=torch.float64).permute(2, 0, 1).requires_grad_()
    found, want = (
        torch.autograd.grad(model(x).square().sum(), x)[0] for x in (e, e.detach().contiguous().requires_grad_())
    )
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3])
def test_attention_is_exact_for_scores_of_any_size(size):
    torch.manual_seed(0)
    layer = InteractingLayer(6, 6, 2, Variant(residual="none"))
    e = size * torch.randn(9, 7, 6)
    shares = layer.double().attention(e.double())
    values = (e.double() @ projections(layer)[0]["v"].T).view(9, 7, 2, 3)
    want = torch.einsum("bhmk,bkhd->bmhd", shares, values).flatten(2).relu()
    torch.testing.assert_close(layer(e.double()), want, rtol=1e-10, atol=1e-10 * size)
    if size < 100:  # beyond, single precision cannot tell the scores
        torch.testing.assert_close(layer.float()(e), want.float(), rtol=1e-2, atol=1e-3 * size)


def test_large_embeddings_stay_finite():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1, 6, 30):
            model = AutoInt(fields(count, 8), layers=2, width=8).to(dtype)
            e = (50 * torch.randn(4, count, 8)).to(dtype).requires_grad_()
            out = model(e)
            assert out.isfinite().all()
            assert torch.autograd.grad(out.sum(), e)[0].isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("count", [1, 5, 20])
def test_a_batch_without_rows_gives_none(preset, count):
    model = AutoInt(fields(count, 8), preset=preset, layers=2, width=8)
    assert model(torch.zeros(0, count, 8)).shape == (0, model.width)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("options", [{}, {"residual": "none"}, {"activated": True}])
def test_without_gradients_the_same_comes_out(rows, options):
    layer = InteractingLayer(5, 6, 2, Variant(**options)).double()
    e = torch.randn(rows, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    with torch.no_grad():
        alone = layer(e)
    torch.testing.assert_close(alone, layer(e), rtol=1e-12, atol=1e-12)
    assert not alone.requires_grad
