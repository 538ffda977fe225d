"""OptEmbed against loops over rows and fields: what the step passes on, what a threshold takes, what pruning leaves."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.api import EncodedSchema, Field, History, Selection, Table
from recsys.nn.head import Head
from recsys.nn.interaction import FM, MLP
from recsys.nn.model import Model
from recsys.nn.selection import KeepAll
from recsys.testing import contract, samples
from recsys_optembed import LongTail, OptEmbed

SCHEMA = EncodedSchema(
    (Field("item", 9), Field("price", 2, numeric=True), Field("city", 5), Field("twin", 5, shares="city")),
    (History("past", (Field("seen", 9, shares="item"), Field("shop", 4)), 3, ("item", "city")),),
)
STARTS = {"item": 0, "price": 9, "city": 11, "twin": 11, "past.seen": 0, "past.shop": 16}
BLOCK = {"item": 0, "price": 1, "city": 2, "twin": 2, "past.seen": 0, "past.shop": 3}
DIM = 4


def table(seed=0, **options):
    torch.manual_seed(seed)
    made = OptEmbed(SCHEMA, **{"dim": DIM, "init_std": 0.15} | options).double()
    if made.threshold is not None:
        torch.nn.init.normal_(made.threshold, mean=0.45, std=0.2)
    return made


def batch(rows=7, seed=0):
    return samples.batch(rows, SCHEMA, seed)


def look_up(module, b):
    """`[B, F, D]` and `[B, L, K, D]`."""
    return module(b.ids, b.values.double()), module.history("past", b.history["past"][0])


def readings(b):
    """(row of the batch, column, row of the table, factor) of all that the batch reads, in the outputs' order."""
    found = []
    for i in range(len(b)):
        for f, name in enumerate(("item", "price", "city", "twin")):
            identity, value = int(b.ids[i, f]), float(b.values[i, f].double())
            found.append((i, name, STARTS[name] + identity, value if name == "price" and identity else 1.0))
    for i, events in enumerate(b.history["past"][0].tolist()):
        for event in events:
            found += [(i, n, STARTS[n] + e, 1.0) for n, e in zip(("past.seen", "past.shop"), event, strict=True)]
    return found


def slope(u):
    size = abs(u)
    return 2 - 4 * size if size <= 0.4 else 0.4 if size <= 1 else 0.0


@pytest.mark.parametrize("options", [{}, {"rows": False}, {"dims": False}, {"init_std": 0.1}])
def test_contract(options):
    contract("embedding", OptEmbed, **options)


def test_the_step_passes_on_the_long_tail():
    u = torch.tensor([0.0, 0.1, -0.1, 0.4, 0.7, -1.0, 1.0, 1.001, -2.0], dtype=torch.float64, requires_grad=True)
    y = LongTail.apply(u)
    assert y.tolist() == [0, 1, 0, 1, 1, 0, 1, 1, 0]
    y.sum().backward()
    torch.testing.assert_close(
        u.grad, torch.tensor([2, 1.6, 1.6, 0.4, 0.4, 0.4, 0.4, 0, 0]).double(), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("seed", range(4))
def test_training_is_the_formula_and_its_gradients_are_the_closed_form(seed):
    module, b = table(seed), batch(seed=seed)
    e, events = look_up(module, b)
    drawn = module._drawn
    torch.manual_seed(seed + 50)
    g, g_events = torch.randn_like(e), torch.randn_like(events)
    ((e * g).sum() + (events * g_events).sum() + module.penalty()).backward()

    w, t = module.weight.detach(), module.threshold.detach()
    flat = torch.cat([g.flatten(0, 1), g_events.flatten(0, 2)])
    want_w, want_t, outputs = torch.zeros_like(w), -module.pressure * (-t).exp(), []
    for (i, name, row, factor), slot in zip(readings(b), flat, strict=True):
        v, d = w[row], int(drawn[i, BLOCK[name]])
        u = float(v.abs().sum() - t[BLOCK[name]])
        masked = torch.stack([v[k] if k < d else torch.tensor(0.0).double() for k in range(DIM)])
        outputs.append(factor * masked if u > 0 else torch.zeros(DIM).double())
        inner = float((factor * slot * masked).sum())
        want_t[BLOCK[name]] -= slope(u) * inner
        for k in range(DIM):
            want_w[row, k] += (factor * slot[k] if u > 0 and k < d else 0.0) + slope(u) * inner * v[k].sign()
    got = torch.cat([e.flatten(0, 1), events.flatten(0, 2)])
    assert 0.1 < float((got == 0).double().mean()) < 0.9, "the test should see both kept and dropped"
    assert (got - torch.stack(outputs)).abs().max() <= 1e-12
    assert (module.weight.grad - want_w).abs().max() <= 1e-9
    assert (module.threshold.grad - want_t).abs().max() <= 1e-9
    dropped = [row for _, name, row, _ in readings(b) if w[row].abs().sum() <= t[BLOCK[name]]]
    assert module.weight.grad[dropped].abs().sum() > 0, "a dropped row can come back"


def test_far_from_every_row_only_the_pressure_moves_a_threshold():
    module, b = table(init_std=5.0, pressure=0.03), batch()
    e, events = look_up(module, b)
    (e.square().sum() + events.sum() + module.penalty()).backward()
    far = module.weight.abs().sum(1).min() - module.threshold.max()
    assert far > 1
    assert torch.equal(module.threshold.grad, -0.03 * (-module.threshold.detach()).exp())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"rows": False, "dims": False}, {"dims": False}])
def test_without_thresholds_and_widths_it_is_the_table_to_the_last_bit(training, options):
    module, b = table(**options).train(training), batch()
    if module.threshold is not None:
        torch.nn.init.constant_(module.threshold, -torch.inf)
    base = Table(SCHEMA, dim=DIM).double().train(training)
    base.load_state_dict({"weight": module.weight})
    outputs, wanted = look_up(module, b), look_up(base, b)
    assert all(torch.equal(x, y) for x, y in zip(outputs, wanted, strict=True))
    for part in (outputs, wanted):
        sum(x.square().sum() for x in part).backward()
    assert torch.equal(module.weight.grad, base.weight.grad)


def test_a_width_uses_exactly_the_first_dimensions():
    module, b = table().eval(), batch()
    torch.nn.init.constant_(module.threshold, -1.0)
    for d in range(1, DIM + 1):
        decided = copy.deepcopy(module)
        decided.decide([d] * 4)
        before = look_up(decided, b)
        for k in range(DIM):
            changed = copy.deepcopy(decided)
            with torch.no_grad():
                changed.weight[:, k] += 1.0
            same = all(torch.equal(x, y) for x, y in zip(before, look_up(changed, b), strict=True))
            assert same == (k >= d), (d, k)


def test_widths_are_uniform_and_independent_over_rows_and_vocabularies():
    torch.manual_seed(3)
    schema = EncodedSchema(tuple(Field(f"f{i}", 3) for i in range(6)))
    module = OptEmbed(schema, dim=8, init_std=1.0, rows=False)
    n = 8000
    d = (module(torch.zeros(n, 6, dtype=torch.int64)) != 0).sum(2)  # [n, 6]
    assert int(d.min()) == 1
    expected = n / 8
    for f in range(6):
        counts = torch.bincount(d[:, f], minlength=9)[1:].double()
        assert float(((counts - expected) ** 2 / expected).sum()) < 29.9, "chi-squared with 7 degrees, p = 1e-4"
    pairs = [(d[:, 0], d[:, 1]), (d[:, 2], d[:, 5]), (d[:-1, 3], d[1:, 3])]  # fields, fields, rows one after the other
    for one, other in pairs:
        cells = torch.bincount((one - 1) * 8 + other - 1, minlength=64).double()
        assert float(((cells - len(one) / 64) ** 2 / (len(one) / 64)).sum()) < 117, "63 degrees, p = 4e-5"
    module.eval()
    assert bool((module(torch.zeros(n, 6, dtype=torch.int64)) != 0).all())


def test_what_shares_a_vocabulary_shares_the_width_of_the_row():
    module, b = table(rows=False, init_std=1.0), batch(64)
    e, events = look_up(module, b)
    widths, seen = (e != 0).sum(2), (events != 0).sum(3)
    assert torch.equal(widths[:, 2], widths[:, 3])
    assert torch.equal(seen[:, :, 0], widths[:, :1].expand(-1, samples.LENGTH))
    assert not torch.equal(widths[:, 0], widths[:, 2])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["item", "price", "city", "past.shop"]), st.floats(0.01, 1.0))
def test_raising_one_threshold_takes_rows_of_its_own_vocabulary_alone(seed, name, more):
    module = table(seed).eval()
    before = module.kept().rows
    sums = [sum(abs(x) for x in row) for row in module.weight.tolist()]
    for column, start in STARTS.items():
        t = module.threshold[BLOCK[column]].item()
        assert before[column].tolist() == [sums[start + i] > t for i in range(len(before[column]))]
    with torch.no_grad():
        module.threshold[BLOCK[name]] += more
    after = module.kept().rows
    for column in STARTS:
        if BLOCK[column] == BLOCK[name]:
            assert bool((after[column] <= before[column]).all())
        else:
            assert torch.equal(after[column], before[column])


@pytest.mark.parametrize("decided", [False, True])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), widths=st.lists(st.integers(1, DIM), min_size=4, max_size=4))
def test_the_pruned_table_gives_the_same_bits_and_holds_what_is_left(decided, seed, widths):
    module, b = table(seed).eval(), batch(40, seed)
    if decided:
        module.decide(widths)
    smaller = module.prune(module.kept()).eval()
    assert all(torch.equal(x, y) for x, y in zip(look_up(module, b), look_up(smaller, b), strict=True))
    k = list(module.sizes().values())
    numbers = sum(n * d for n, d in zip(k, widths if decided else [DIM] * 4, strict=True))
    assert sum(p.numel() for p in smaller.parameters()) == DIM + numbers  # and the zeros that dropped ones point to
    assert smaller.flat.nbytes < module.weight.nbytes + 8 * DIM


def test_pruning_by_another_selection_keeps_dropped_rows_at_zero():
    module = table().eval()
    ids = torch.arange(9)
    smaller = module.prune(Selection(module.fields.names))
    b = samples.batch(9, SCHEMA)
    rows = smaller(torch.cat([ids[:, None], b.ids[:, 1:]], 1), b.values.double())[:, 0]
    assert torch.equal(rows.any(1), module.kept().rows["item"])
    assert not bool(rows.any(1).all())


def test_a_decision_is_part_of_the_state_and_outlives_the_weights():
    module = table().eval()
    want = module.kept().rows
    fresh = table(seed=9).eval()
    assert not all(torch.equal(want[c], fresh.kept().rows[c]) for c in want)
    fresh.load_state_dict({**fresh.state_dict(), **module.decision()})
    assert all(torch.equal(want[c], fresh.kept().rows[c]) for c in want)
    fresh.decide([1, 2, 3, 4])
    again = table(seed=5)
    again.load_state_dict(fresh.state_dict())
    assert all(torch.equal(m, again.kept().dims[c]) for c, m in fresh.kept().dims.items())
    assert [int(again.kept().dims[c].sum()) for c in ("item", "price", "twin", "past.shop")] == [1, 2, 3, 4]
    assert not again.threshold.requires_grad
    again.load_state_dict(module.state_dict())
    assert again.row_kept is None
    assert again.threshold.requires_grad


def test_a_decided_table_trains_what_is_left_and_nothing_else():
    module, b = table(), batch(30)
    module.decide([2, 1, 3, 4])
    sum(x.square().sum() for x in look_up(module, b)).backward()
    kept, widths = module.rows_kept(), torch.tensor([2] * 9 + [1] * 2 + [3] * 5 + [4] * 4)
    inside = kept.unsqueeze(1) & (torch.arange(DIM) < widths.unsqueeze(1))
    assert not bool(module.weight.grad[~inside].any())
    assert bool(module.weight.grad[inside].any())
    assert module.penalty() == 0


def test_no_threshold_takes_all_rows():
    module = table(threshold_rate=1.0)
    for _ in range(3):
        module.threshold.grad = torch.full((4,), -1e6, dtype=torch.float64)
        module.after_step()
        assert all(n >= 1 for n in module.sizes().values())
    few = list(module.sizes().values())
    assert few == [1, 1, 1, 1]
    torch.nn.init.ones_(module.weight)  # all norms equal
    module.threshold.grad = torch.full((4,), -1e6, dtype=torch.float64)
    module.after_step()
    assert list(module.sizes().values()) == [9, 2, 5, 4]
    large = OptEmbed(EncodedSchema((Field("f", 50_000),)), dim=2, init_std=1.0, threshold_rate=1.0)
    large.threshold.grad = torch.tensor([-1e6])
    large.after_step()
    assert 0.002 < large.sizes()["f"] / 50_000 < 0.04


def test_many_candidates_at_once_are_each_alone():
    torch.manual_seed(1)
    embedding = OptEmbed(SCHEMA, dim=DIM, init_std=0.15)
    torch.nn.init.constant_(embedding.threshold, 0.3)
    fields = Model.consumer_fields(SCHEMA, embedding)
    parts = [FM(fields), MLP(fields, hidden=(8,), batch_norm=True)]
    pools = {"past": _Mean()}
    model = Model(SCHEMA, embedding, KeepAll(embedding.fields), pools, parts, Head(SCHEMA, parts, wide=True)).eval()
    b = batch(11)
    candidates = [(4, 4, 4, 4), (1, 2, 3, 4), (2, 2, 1, 1)]
    masks = (torch.arange(DIM) < torch.tensor(candidates).unsqueeze(2)).float()
    repeated = samples.batch(11, SCHEMA)
    repeated = type(b)(
        b.ids.repeat(3, 1), b.values.repeat(3, 1), {"past": tuple(_thrice(x) for x in b.history["past"])}
    )
    embedding.try_out(masks)
    together = model(repeated)["label"].view(3, -1)
    embedding.try_out(None)
    for candidate, got in zip(candidates, together, strict=True):
        alone = copy.deepcopy(model)
        alone.embedding.decide(candidate)
        torch.testing.assert_close(got, alone(b)["label"], rtol=1e-6, atol=1e-7)
    assert torch.equal(model(b)["label"], model.eval()(b)["label"])


class _Mean(torch.nn.Module):
    def forward(self, target, history, length):
        return history.mean(1) + 0.1 * target


def _thrice(x):
    return x.repeat(3, *(1,) * (x.dim() - 1))
