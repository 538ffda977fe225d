"""LeAP: mixing and its gradients against loops, permutations, prices, what is kept, planted noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import figures, planted, rank_auc, search

from recsys.api import Fields
from recsys.testing import contract
from recsys_leap import LeAP, permuted, shifted

F, D = 4, 3
FIELDS = Fields(tuple(f"f{i}" for i in range(F)), (9,) * F, D)
WEIGH = ("l2", "l1", "l2sq", "uniform")
PER = ("field", "dim")
COPIES = ("shift", "independent")


def leap(seed=0, spread=0.3, fields=FIELDS, **options):
    """Gates in the midst of a search, in float64."""
    torch.manual_seed(seed)
    made = LeAP(fields, **options).double()
    with torch.no_grad():
        made.theta.add_(spread * torch.randn(made.theta.shape) + 0.2 * (spread > 0))
    made.anneal(0.7)
    return made


def vectors(rows, seed=0, fields=F, dim=D):
    return torch.randn(rows, fields, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sources(made, rows, seed):
    """Which row every column of a gate comes from, `[B][G]`, read off a batch in which every number is its row."""
    torch.manual_seed(seed)
    x = torch.arange(rows, dtype=torch.float64).view(-1, 1, 1).expand(-1, made.theta.numel(), 1).contiguous()
    return made.shuffled(x).squeeze(2).long().tolist()


@pytest.mark.parametrize("options", [{}, {"preset": "official", "one_level": 0.01}, {"per": "dim"}])
def test_contract(options):
    contract("selector", LeAP, **options)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(WEIGH), st.sampled_from(PER), st.sampled_from(COPIES), st.integers(2, 7), st.integers(0, 99))
def test_mixing_gradients_divergence_and_price_are_those_of_the_loops(weigh, per, copies, rows, seed):
    made = leap(seed, weigh=weigh, per=per, copies=copies, strength=0.3, floor=0.4)
    x = vectors(rows, seed)
    x[:, 1, 1:] = 0  # a field of one dimension
    order = sources(made, rows, seed)
    e = x.clone().requires_grad_()
    torch.manual_seed(seed)
    mixed = made(e, torch.zeros(rows, F, dtype=torch.int64))

    def gate(f, k):
        return made.theta[f, 0 if per == "field" else k]

    def source(b, f, k):
        return order[b][f if per == "field" else f * D + k]

    # x' = g x + (1 - g) sg(copy), number by number
    slow = x.clone().requires_grad_()
    want = torch.stack(
        [
            torch.sigmoid(5 * gate(f, k)) * slow[b, f, k]
            + (1 - torch.sigmoid(5 * gate(f, k))) * x[source(b, f, k), f, k]
            for b in range(rows)
            for f in range(F)
            for k in range(D)
        ]
    ).view(rows, F, D)
    assert (mixed - want).abs().max() <= 1e-12
    above = vectors(rows, seed + 1)
    ours = torch.autograd.grad((mixed * above).sum(), [e, made.theta])
    theirs = torch.autograd.grad((want * above).sum(), [slow, made.theta])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-12
    # D, the mean over rows of a norm; w, its share of the mean over what varies; the price
    gates = [(f, ks) for f in range(F) for ks in ([range(D)] if per == "field" else [[k] for k in range(D)])]
    size = []
    for f, ks in gates:
        total = 0.0
        for b in range(rows):
            gaps = [float(x[b, f, k] - x[source(b, f, k), f, k]) for k in ks]
            total += {
                "l1": sum(abs(gap) for gap in gaps),
                "l2sq": sum(gap * gap for gap in gaps),
            }.get(weigh, math.sqrt(sum(gap * gap for gap in gaps)))
        size.append(total / rows)
    varying = [s for s in size if s > 0]
    price = 0.0
    for (f, ks), s in zip(gates, size, strict=True):
        g = 1 / (1 + math.exp(-5 * float(gate(f, ks[0]).detach())))
        price += g * (1.0 if weigh == "uniform" or not varying else max(s * len(varying) / sum(varying), 0.4))
    price *= 0.3 / (len(gates) if weigh == "uniform" or not varying else len(varying))
    size = torch.tensor(size, dtype=torch.float64)
    torch.testing.assert_close(made.divergence.flatten(), size, rtol=1e-12, atol=1e-12)
    assert made.penalty().item() == pytest.approx(price, rel=1e-12)


def test_the_copy_carries_no_gradient_and_the_gate_the_published_one():
    """dL/dg_f = Σ_b ⟨dL/dx'_bf, x_bf − copy_bf⟩; dL/dx = g dL/dx'."""
    made, x = leap(3), vectors(6).requires_grad_()
    torch.manual_seed(5)
    copy = made.shuffled(x.detach())
    torch.manual_seed(5)
    slope = vectors(6, 8)
    found = torch.autograd.grad((made(x, x) * slope).sum(), [x, made.theta])
    g = made.gates().detach()
    assert (found[0] - slope * g).abs().max() <= 1e-12
    inner = (slope * (x.detach() - copy)).sum((0, 2)).unsqueeze(1)
    assert (found[1] - inner * 5 * g * (1 - g)).abs().max() <= 1e-12


def order_of(draw, rows, blocks):
    """Source rows `[B, G]`."""
    x = torch.arange(rows * blocks * 2).view(rows, blocks, 2)
    moved = draw(x)
    assert torch.equal(moved[..., 1], moved[..., 0] + 1), "blocks move whole"
    assert torch.equal(moved[..., 0] // 2 % blocks, torch.arange(blocks).expand(rows, -1)), "and stay in their columns"
    return moved[..., 0] // (2 * blocks)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 99))
def test_shifts_are_permutations_without_fixed_rows_and_differ_between_fields(rows, blocks, seed):
    torch.manual_seed(seed)
    for draw in (shifted, permuted):
        order = order_of(draw, rows, blocks)
        assert torch.equal(order.sort(0).values, torch.arange(rows).unsqueeze(1).expand(-1, blocks))
    order = order_of(shifted, rows, blocks)
    if rows > 1:
        assert not (order == torch.arange(rows).unsqueeze(1)).any()
    if blocks < rows:
        assert all(len(set(row)) == blocks for row in order.tolist()), "no two fields come from one row"


@pytest.mark.parametrize("draw", [shifted, permuted])
def test_any_sources_of_two_fields_are_as_likely_as_any_others(draw):
    torch.manual_seed(0)
    rows, draws = 4, 6000
    counts = torch.zeros(rows, rows, rows)
    for _ in range(draws):
        order = order_of(draw, rows, 3)
        counts[torch.arange(rows), order[:, 0], order[:, 2]] += 1
    possible = torch.ones(rows, rows, rows, dtype=torch.bool)
    if draw is shifted:
        b = torch.arange(rows)
        first, second = b.view(1, -1, 1), b.view(1, 1, -1)
        possible = (first != b.view(-1, 1, 1)) & (second != b.view(-1, 1, 1)) & (first != second)
    expected = draws * rows / int(possible.sum())
    assert not counts[~possible].any()
    assert ((counts[possible] - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize("copies", COPIES)
def test_whole_vectors_move_a_new_way_in_every_step_and_fields_apart(copies):
    made, x = leap(copies=copies), vectors(50)
    torch.manual_seed(0)
    first, second = made.shuffled(x), made.shuffled(x)
    assert not torch.equal(first, second)
    where = [[(x[:, f] == row).all(1).nonzero().item() for row in first[:, f]] for f in range(F)]
    assert all(sorted(w) == list(range(50)) for w in where), "a field keeps its vectors, whole"
    assert len({tuple(w) for w in where}) == F


def test_open_gates_pass_on_the_very_bits_and_shut_ones_only_the_copy():
    x = torch.randn(8, F, D)
    for theta, want in ((9.0, x), (-90.0, None)):
        made = LeAP(FIELDS)
        made.anneal(1.0)
        with torch.no_grad():
            made.theta.fill_(theta)
        torch.manual_seed(1)
        copy = made.shuffled(x)
        torch.manual_seed(1)
        assert torch.equal(made(x, x), copy if want is None else want)


def test_without_gates_nothing_is_shuffled_in_evaluation():
    made, x = LeAP(FIELDS).eval(), torch.randn(8, F, D)
    state = torch.get_rng_state()
    assert torch.equal(made(x, x), x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("copies", COPIES)
def test_mean_squared_divergence_is_twice_the_trace_of_the_covariance(copies):
    rows, made, x = 6, leap(weigh="l2sq", copies=copies), vectors(6)
    torch.manual_seed(0)
    sizes = [(x - made.shuffled(x)).square().sum(2).mean(0) for _ in range(4000)]
    mean = torch.stack(sizes).mean(0)
    centred = x - x.mean(0)
    trace = centred.square().sum((0, 2)) / (rows - 1 if copies == "shift" else rows)  # a shifted row never meets itself
    torch.testing.assert_close(mean, 2 * trace, rtol=0.03, atol=0)


@pytest.mark.parametrize(("weigh", "factor"), [("l2", 4.0), ("l2sq", 16.0), ("l1", 16.0)])
def test_sixteen_copies_of_a_column_make_a_field_that_much_dearer(weigh, factor):
    x = torch.zeros(9, 2, 16, dtype=torch.float64)
    x[:, 0, :1] = vectors(9, 1, 1, 1)[:, 0]
    x[:, 1] = x[:, 0, :1]
    made = leap(fields=Fields(("a", "b"), (9, 9), 16), weigh=weigh)
    made.shuffled = lambda t: t.roll(1, 0)  # the same rows for both
    made(x, x)
    assert float(made.divergence[1] / made.divergence[0]) == pytest.approx(factor, rel=1e-12)


def test_a_rarer_value_is_cheaper_by_how_much_rarer_pairs_differ():
    rows = 4000
    x = torch.zeros(rows, 2, 1, dtype=torch.float64)
    x[: rows // 2, 0] = 1.0
    x[: rows // 100, 1] = 1.0
    made = leap(fields=Fields(("even", "rare"), (9, 9), 1))
    for _ in range(300):
        made(x, x)
    pairs = [2 * p * (1 - p) * rows / (rows - 1) for p in (0.5, 0.01)]
    assert float(made.divergence[1] / made.divergence[0]) == pytest.approx(pairs[1] / pairs[0], rel=0.05)
    torch.testing.assert_close(made.changed.flatten(), torch.tensor(pairs).double(), rtol=0.05, atol=0)


def test_the_average_begins_with_the_first_batch_and_forgets_slowly():
    made, want = leap(), None
    for step in range(4):
        x = vectors(7, step)
        torch.manual_seed(step)
        now = (x - made.shuffled(x)).norm(dim=2).mean(0)
        torch.manual_seed(step)
        made(x, x)
        want = now if want is None else 0.98 * want + 0.02 * now
    torch.testing.assert_close(made.divergence.squeeze(1), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("per", PER)
def test_columns_of_zeros_change_no_other_price(per):
    """A field of fewer dimensions comes with zeros; so may a whole field that was left out before."""
    narrow, wide = leap(per=per, spread=0), leap(per=per, spread=0, fields=Fields((*FIELDS.names, "none"), (9,) * 5, 6))
    x = vectors(8)
    padded = torch.zeros(8, 5, 6, dtype=torch.float64)
    padded[:, :F, :D] = x
    for made, e in ((narrow, x), (wide, padded)):
        made.shuffled = lambda t: t.roll(1, 0)
        made(e, e)
    width = 1 if per == "field" else D
    torch.testing.assert_close(wide.weights()[:F, :width], narrow.weights(), rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(made.penalty(), made.theta)[0] for made in (wide, narrow))
    torch.testing.assert_close(ours[:F, :width], theirs, rtol=1e-12, atol=0)


def test_a_constant_field_has_no_gradient_but_the_price_which_shuts_its_gate():
    made, x = leap(spread=0), vectors(16)
    x[:, 2] = 1.5
    for step in range(1500):
        made.anneal(0.6 + step / 4000)
        mixed = made(x, x)
        (slope,) = torch.autograd.grad(mixed.square().sum(), made.theta, retain_graph=True)
        assert float(slope[2].abs()) == 0
        made.theta.grad = torch.autograd.grad(made.penalty(), made.theta)[0]
        made.search_step(1e-2)
    assert float(made.divergence[2]) == 0
    assert float(made.weights()[2]) == made.floor
    assert float(made.gates()[2].detach()) < 0.01


def test_the_price_says_nothing_to_the_vectors():
    made, x = leap(), vectors(6).requires_grad_()
    made(x, x)
    assert torch.autograd.grad(made.penalty(), [x], allow_unused=True) == (None,)


def test_uniform_prices_are_the_public_codes_mean_of_the_gates():
    made = leap(preset="official", strength=0.02)
    made(vectors(6), vectors(6))
    assert torch.equal(made.weights(), torch.ones(F, 1).double())
    assert made.penalty().item() == pytest.approx(0.02 * float(torch.sigmoid(5 * made.theta).mean()), rel=1e-12)
    assert (made.copies, made.warmup) == ("independent", 0)
    assert float(LeAP(FIELDS, preset="official").gates()[0].detach()) == pytest.approx(0.9933, abs=1e-4)
    made.benefit.copy_(-made.theta.detach())
    made.measured.fill_(9)
    assert made.scores() == dict(zip(FIELDS.names, made.gates().detach().squeeze(1), strict=True))
    order = made.theta.detach().flatten().argsort(descending=True).tolist()
    assert set(made.kept().fields) == {FIELDS.names[i] for i in order[:2]}


def test_gates_that_begin_open_are_scores_whatever_was_measured():
    made = LeAP(FIELDS, preset="open")
    assert float(made.gates()[0].detach()) == pytest.approx(0.9933, abs=1e-4)
    assert (made.weigh, made.copies, made.warmup) == ("l2", "shift", 0.1)
    with torch.no_grad():
        made.theta.copy_(torch.tensor([0.1, -0.1, -0.2, 0.05]).unsqueeze(1))
    made.benefit.copy_(torch.tensor([-1.0, 2.0, 1.0, 0.0]).unsqueeze(1))
    made.measured.fill_(5)
    assert made.kept().fields == ("f0", "f3")
    assert made.scores() == dict(zip(FIELDS.names, made.gates().detach().squeeze(1), strict=True))
    with torch.no_grad():
        made.theta.mul_(10)
    assert made.polarisation() > 0.8
    assert made.kept().fields == ("f0", "f3")
    assert LeAP(FIELDS, preset="open", share=0.25).kept().fields == FIELDS.names


@pytest.mark.parametrize("one_level", [None, 0.03])
def test_gates_wait_for_the_end_of_the_warm_up_and_then_move_as_adam_does(one_level):
    made = leap(warmup=0.3, one_level=one_level)
    slow = made.theta.detach().clone().requires_grad_()
    adam = torch.optim.Adam([slow], lr=0.03)
    assert made.reached() is None
    assert made.architecture() == (() if one_level else (made.theta,))
    assert made.own_parameters() == ((made.theta,) if one_level else ())
    for step in range(20):
        made.anneal(step / 20)
        g = vectors(1, step, F, 1).squeeze(0)
        made.theta.grad, slow.grad = g.clone(), g.clone()
        before = made.theta.detach().clone()
        made.after_step() if one_level else made.search_step(0.03)
        if step < 6:
            assert torch.equal(made.theta, before)
            assert made.penalty().item() == 0, "held gates pay nothing"
        else:
            adam.step()
            assert made.penalty().item() > 0
        assert made.reached() is False
        assert (made.theta - slow).abs().max() <= 1e-12
    assert (int(made.measured), int(made.steps)) == (6, 14)
    before = made.theta.detach().clone()
    made.theta.grad = torch.ones_like(made.theta)
    if one_level is None:
        made.after_step()  # the other level leaves them alone
    assert torch.equal(made.theta, before)


def test_the_score_is_the_mean_gain_by_a_wider_gate_with_later_steps_of_more_weight():
    """Σ t² b_t / Σ t², b = −∂L/∂g in the steps of the warm-up, while g = ½."""
    made = leap(warmup=0.4, spread=0)
    x, above = vectors(9), vectors(9, 1)
    found, weight = torch.zeros(F, dtype=torch.float64), 0
    for step in range(20):
        made.anneal(step / 20)
        torch.manual_seed(step)
        copy = made.shuffled(x)
        torch.manual_seed(step)
        loss = (made(x, x) * above).square().sum() + made.penalty()
        (made.theta.grad,) = torch.autograd.grad(loss, made.theta)
        if step < 8:
            mixed = 0.5 * x + 0.5 * copy
            for f in range(F):
                slope = sum(
                    float(2 * mixed[b, f, k] * above[b, f, k] ** 2 * (x[b, f, k] - copy[b, f, k]))
                    for b in range(9)
                    for k in range(D)
                )
                found[f] -= (step + 1) ** 2 * slope
            weight += (step + 1) ** 2
        made.search_step(0.05)
    assert int(made.measured) == 8
    benefit = found / weight
    torch.testing.assert_close(made.benefit.flatten(), benefit, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        made.theta[1:3] = -0.3
    gates = [float(g) for g in made.gates().detach()]
    assert {g > 0.5 for g in gates} == {True, False}
    scores = [float(score) for score in made.scores().values()]
    value = [b * (2 * g - 1) if g > 0.5 else b for g, b in zip(gates, benefit.tolist(), strict=True)]
    assert scores == pytest.approx([float(g > 0.5) + v / (1 + 2 * abs(v)) for g, v in zip(gates, value, strict=True)])
    order = sorted(range(F), key=lambda f: (gates[f] > 0.5, value[f]))
    assert sorted(range(F), key=scores.__getitem__) == order, "open gates first, the more useful before the less"
    told = made.report(x)["fields"]["f2"]
    assert told["benefit"] == pytest.approx(float(found[2] / weight))
    assert told["gate"] == pytest.approx(float(made.gates()[2].detach()))


def test_what_is_measured_goes_on_from_a_checkpoint():
    whole, half = leap(warmup=0.5, spread=0), leap(warmup=0.5, spread=0)
    for step in range(12):
        if step == 4:
            state = {name: t.clone() for name, t in half.state_dict().items()}
            half = leap(seed=9, warmup=0.5, spread=0)
            half.load_state_dict(state)
        for made in (whole, half):
            made.anneal(step / 12)
            made.theta.grad = vectors(1, step, F, 1).squeeze(0)
            made.search_step(0.05)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), half.state_dict().values(), strict=True))
    assert int(half.measured) == 6


@pytest.mark.parametrize("copies", COPIES)
def test_half_open_gates_find_no_gain_in_noise_whatever_the_network_and_wider_ones_a_loss(copies):
    """At ½ a field and its copy can be exchanged, so that noise is worth nothing; above, it adds to the spread."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(F * D, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
    mean = {}
    for theta in (None, 0.4):
        found = []
        for step in range(300):
            made = leap(spread=0, copies=copies)
            if theta is None:
                made.anneal(0.0)  # held at ½, wherever θ is
            else:
                with torch.no_grad():
                    made.theta.fill_(theta)
            x, y = vectors(64, step), torch.rand(64, dtype=torch.float64).round()
            y[x[:, 0, 0] > 0.5] = 1.0  # the first field tells something
            seen = made(x, x)
            logit = 3 * network(seen.flatten(1)).squeeze(1) + 2 * seen[:, 0, 0]
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, y)
            (made.theta.grad,) = torch.autograd.grad(loss, made.theta)
            gates = made.gates().detach()
            by_hand = -made.theta.grad / (5 * gates * (1 - gates))
            made.search_step(0.01)
            found.append((made.benefit if theta is None else by_hand).flatten().clone())
        each = torch.stack(found)
        mean[theta] = each.mean(0) / (each.std(0) / len(found) ** 0.5)
    assert (mean[None][1:].abs() < 4).all(), mean
    assert mean[None][0] > 10, mean
    assert mean[0.4][1:].mean() < -3, mean


def test_polarised_gates_decide_by_themselves_others_by_rank_and_nothing_is_never_kept():
    def kept(theta, measured=None, **options):
        made = LeAP(FIELDS, **options)
        with torch.no_grad():
            made.theta.copy_(torch.tensor(theta).unsqueeze(1))
            if measured is not None:
                made.benefit.copy_(torch.tensor(measured).unsqueeze(1))
                made.measured.fill_(5)
        return made.kept().fields

    assert kept([1.0, -1.0, 0.6, -0.9]) == ("f0", "f2")
    assert kept([1.0, -1.0, -0.6, -0.9]) == ("f0",)
    assert kept([-1.0, -1.1, -1.2, -1.3]) == ("f0",), "the best one stays"
    assert kept([0.1, -0.1, -0.2, 0.05]) == ("f0", "f3")
    assert kept([-0.3, -0.1, -0.2, 0.05], share=0.75) == ("f1", "f2", "f3")
    assert kept([1.0, 0.9, 0.8, 0.7]) == FIELDS.names
    assert kept([1.0, 0.9, 0.8, 0.7], preset="official") == ("f0", "f1")
    assert kept([0.1, -0.1, -0.2, 0.05], measured=[-1.0, 2.0, 1.0, 0.0]) == ("f0", "f3"), "undecided: open ones"
    assert kept([0.1, -0.1, -0.2, -0.05], measured=[-1.0, 0.1, 0.2, 0.0]) == ("f0", "f2"), "then by the benefit"
    assert kept([1.0, -1.0, 0.6, -0.9], measured=[-1.0, 2.0, 1.0, 0.0]) == ("f0", "f2")
    assert kept([-1.0, -1.1, -1.2, -1.3], measured=[-1.0, 2.0, 1.0, 0.0]) == ("f0",)
    assert kept([1.0, 1.0, 1.0, 1.0], preset="official") == FIELDS.names, "before a search nothing is left out"


def test_dimensions_have_gates_of_their_own():
    made = LeAP(FIELDS, per="dim").eval()
    with torch.no_grad():
        made.theta.fill_(1.0)
        made.theta[1] = -1.0
        made.theta[2, 1:] = -1.0
    made.divergence[:, :2] = 1.0
    kept = made.kept()
    assert kept.fields == ("f0", "f2", "f3")
    assert kept.dims["f2"].tolist() == [True, False, False]
    assert float(made.scores()["f2"]) == pytest.approx(0.5), "the mean of those that mix something"
    x = torch.randn(5, F, D)
    assert torch.equal(made(x, x), x * (made.theta > 0))


def test_weights_make_up_for_a_factor_but_not_for_a_mix():
    """With g x a next layer of w / g gives the same logits; with a mix no linear layer does."""
    x, weight = vectors(200).flatten(1), vectors(1, 5).flatten(1)
    logit = x @ weight.T
    factor = 0.3 * x
    assert (factor @ (weight / 0.3).T - logit).abs().max() <= 1e-12
    made = leap(spread=0)
    with torch.no_grad():
        made.theta.fill_(math.log(0.3 / 0.7) / 5)
    mixed = made(x.view(-1, F, D), x).flatten(1).detach()
    best = torch.linalg.lstsq(mixed, logit).solution
    assert float((mixed @ best - logit).square().mean() / logit.square().mean()) > 0.5


def test_rank_auc_is_that_of_the_pairs():
    assert rank_auc(torch.tensor([3.0, 1.0, 2.0, 0.0]), [0, 1], [2, 3]) == 0.75
    assert rank_auc(torch.tensor([1.0, 1.0]), [0], [1]) == 0.5


def test_planted_noise_is_told_from_rare_signal():
    data = planted(0, rows=16_000, widths=(1, 16), noise=2)
    found = figures(data, search(data, 0, 600, batch=256))
    assert found["rank AUC"] >= 0.95
    assert found["sparse 16-wide signal kept"] == 1
    assert found["largest g of wide noise"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_noise_on_more_fields(seed):
    data = planted(seed)
    found = figures(data, search(data, seed, 3000))
    assert found["rank AUC"] >= 0.95
    assert found["sparse 8-wide signal kept"] == 1
    assert found["largest g of wide noise"] < 0.5
