"""FairRec and its encoder against loops, its gradients against each other, and users with a planted attribute."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from recsys.contracts import Batch
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_fairrec import NRMS, RIDGE, FairRec

WIDTH = 8


def inputs(rows=5, longest=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    length = torch.arange(rows) % (longest + 1)
    return (
        torch.randn(rows, WIDTH, generator=g),
        torch.randn(rows, longest, WIDTH, generator=g),
        length,
    )


def labelled(attribute, weight=None):
    context = {"attribute": torch.as_tensor(attribute)}
    if weight is not None:
        context["weight"] = torch.as_tensor(weight)
    rows = len(context["attribute"])
    return Batch(torch.zeros(rows, 1, dtype=torch.int64), label={"label": torch.zeros(rows)}, context=context)


def test_the_encoder_is_the_formula_event_by_event():
    torch.manual_seed(0)
    model = NRMS(WIDTH, heads=2, attention=5).double().eval()
    target, history, length = (x.double() if x.is_floating_point() else x for x in inputs())
    got = model(target, history, length)
    wq, wk, wv = (part.weight.detach().numpy() for part in (model.query, model.key, model.value))
    for row in range(len(length)):
        n = int(length[row])
        if not n:
            assert not got[row].any()
            continue
        events = history[row, :n].numpy()
        q, k, v = events @ wq.T, events @ wk.T, events @ wv.T
        mixed = np.zeros((n, WIDTH))
        for head in (slice(0, 4), slice(4, 8)):
            for t in range(n):
                score = np.array([q[t, head] @ k[s, head] / 2.0 for s in range(n)])
                share = np.exp(score) / np.exp(score).sum()
                mixed[t, head] = sum(share[s] * v[s, head] for s in range(n))
        inner, outer = model.inner, model.outer.weight.detach().numpy()[0]
        a = np.tanh(mixed @ inner.weight.detach().numpy().T + inner.bias.detach().numpy()) @ outer
        share = np.exp(a) / np.exp(a).sum()
        np.testing.assert_allclose(got[row].detach().numpy(), share @ mixed, rtol=1e-9, atol=1e-12)


def test_a_user_is_both_parts_in_training_and_one_of_them_in_use():
    torch.manual_seed(0)
    model = FairRec(WIDTH, dropout=0.0, drop=0.0)
    given = inputs()
    torch.testing.assert_close(model(*given), model.aware(*given) + model.free(*given))
    model.eval()
    served = model(*given)
    assert torch.equal(served, model.free(*given))
    for part in (model.aware, model.classifier, model.discriminator):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter)
    assert torch.equal(model(*given), served)
    traced = torch.export.export(model, given)
    used = {n for n in traced.state_dict if any(n in str(node.target) for node in traced.graph.nodes)}
    assert not any(name.startswith(("aware", "classifier", "discriminator")) for name in used)


def test_without_strengths_it_is_the_base_recommender():
    torch.manual_seed(0)
    model = FairRec(WIDTH, dropout=0.0, predict=0.0, orthogonal=0.0, adversarial=0.0)
    torch.nn.init.zeros_(model.aware.value.weight)
    given = inputs()
    assert torch.equal(model(*given), model.free(*given))
    model.auxiliary(labelled([0, 1, 1, -1, 0])).backward()
    assert all(p.grad is None or not p.grad.any() for part in (model.free, model.aware) for p in part.parameters())


def test_what_reaches_the_encoder_is_the_reversed_gradient_of_the_discriminator():
    torch.manual_seed(0)
    strength = 0.7
    model = FairRec(WIDTH, dropout=0.0, adversarial=strength, discriminator="gradient", hidden=(6,)).double()
    given = tuple(x.double() if x.is_floating_point() else x for x in inputs())
    data = labelled([0, 1, 1, 0, 1])
    for parameter in model.discriminator.parameters():
        torch.nn.init.normal_(parameter)  # an empty history meets no bend of a ReLU
    model(*given)
    model.terms(data)["adversarial"].backward()

    def plain():
        return torch.nn.functional.cross_entropy(model.discriminator(model.free(*given)), data.context["attribute"])

    for part, sign in ((model.discriminator, 1.0), (model.free, -strength)):
        for parameter in part.parameters():
            flat, index = parameter.detach().view(-1), 3 % parameter.numel()
            before, h = flat[index].item(), 1e-6
            flat[index] = before + h
            up = plain().item()
            flat[index] = before - h
            down = plain().item()
            flat[index] = before
            assert parameter.grad.view(-1)[index].item() == pytest.approx(sign * (up - down) / (2 * h), abs=1e-8)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_exact_discriminator_is_the_best_one_and_its_gradient_reaches_the_encoder_reversed(classes):
    torch.manual_seed(0)
    model = FairRec(WIDTH, dropout=0.0, adversarial=0.7, classes=classes).double()
    target, history, length = inputs(rows=60)
    given = (target.double(), history.double(), length)
    attribute = torch.randint(-1, classes, (60,))
    data = labelled(attribute)
    for _ in range(4):
        model.zero_grad()
        model(*given)
        model.terms(data)["adversarial"].backward()
    known = attribute >= 0
    free = model.free(*given).detach()[known]
    x = torch.cat([free - free.mean(0), torch.ones(len(free), 1).double()], 1)
    solution = model.discriminator.solution.clone().requires_grad_()
    value = torch.nn.functional.cross_entropy(x @ solution, attribute[known]) + RIDGE / 2 * solution.square().sum()
    value.backward()
    assert solution.grad.abs().max().item() < 1e-8
    own = torch.nn.functional.cross_entropy(
        model.discriminator(model.free(*given)), attribute, ignore_index=-1, reduction="sum"
    )
    for parameter, gradient in zip(
        model.free.parameters(), torch.autograd.grad(own / 60, list(model.free.parameters())), strict=True
    ):
        torch.testing.assert_close(parameter.grad, -0.7 * gradient)
    assert not list(model.discriminator.parameters())


def test_some_rows_are_ranked_without_what_knows_the_attribute():
    torch.manual_seed(0)
    model = FairRec(WIDTH, dropout=0.0, drop=0.25)
    given = inputs(rows=4000)
    u, (aware, free) = model(*given), model._parts
    full = given[2] > 0
    alone = (u == free).all(1)[full]
    assert torch.equal(u[full][~alone], (aware + free)[full][~alone])
    assert alone.double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_the_parts_share_nothing_where_the_term_is_zero():
    model = FairRec(2, heads=1, orthogonal=1.0)
    x = torch.tensor([[1.0, 0.0], [2.0, 2.0], [0.0, -3.0], [0.0, 0.0]])
    for other, want in (([[0.0, 5.0], [1, -1], [2, 0], [1, 1]], 0.0), ([[3.0, 0.0], [-1, -1], [0, 9], [1, 1]], 0.75)):
        model._parts = (x, torch.tensor(other))
        assert model.terms(labelled([0, 1, 0, 1]))["orthogonal"].item() == pytest.approx(want, abs=1e-6)
        model._parts = (x * 7, torch.tensor(other) / 3)
        assert model.terms(labelled([0, 1, 0, 1]))["orthogonal"].item() == pytest.approx(want, abs=1e-6)


def test_unknown_attributes_add_nothing_to_what_is_about_them_and_all_rows_are_counted():
    torch.manual_seed(0)
    model = FairRec(WIDTH, dropout=0.0)
    given = inputs()
    model(*given)
    aware, free = model._parts
    weight = [1.0, 2.0, 0.5, 1.0, 3.0]
    terms = model.terms(labelled([0, -1, 1, -1, 1], weight))
    for name, logits in (("predict", model.classifier(aware)), ("adversarial", model.discriminator(free))):
        chances = torch.softmax(logits, 1)
        want = -sum(
            w * math.log(chances[i, a].item())
            for i, (a, w) in enumerate(zip([0, -1, 1, -1, 1], weight, strict=True))
            if a >= 0
        )
        assert terms[name].item() == pytest.approx((model.predict if name == "predict" else 1.0) * want / 5, rel=1e-5)
    none = model.terms(labelled([-1] * 5))
    assert none["predict"].item() == none["adversarial"].item() == 0.0
    assert none["orthogonal"].item() > 0


def test_shares_make_classes_count_the_same():
    torch.manual_seed(0)
    model = FairRec(WIDTH, dropout=0.0, discriminator="gradient", shares=(0.8, 0.2))
    torch.nn.init.zeros_(model.discriminator[1].weight)
    torch.nn.init.zeros_(model.discriminator[1].bias)
    given = inputs(rows=5)
    model(*given)
    one, other = (model.terms(labelled(a))["adversarial"].item() for a in ([0, 0, 0, 0, -1], [1, -1, -1, -1, -1]))
    assert one == pytest.approx(other)
    with pytest.raises(RecipeError, match="only a discriminator that learns by `gradient`"):
        FairRec(WIDTH, hidden=(4,))
    with pytest.raises(RecipeError, match="shares has 2 numbers for 3 classes"):
        FairRec(WIDTH, classes=3, shares=(0.5, 0.5))


@pytest.mark.parametrize("discriminator", ["exact", "gradient"])
def test_a_class_that_has_no_output_is_told_with_its_number(discriminator):
    """Catches the index error of a cross-entropy, and a class beyond the last that counts as unknown."""
    model = FairRec(WIDTH, discriminator=discriminator)
    model(*inputs())
    model.auxiliary(labelled([0, 1, -1, 1, 0]))
    with pytest.raises(RecipeError, match="has the class 2, but classes is 2; set classes to 3"):
        model.auxiliary(labelled([0, 1, 2, -1, 0]))


def test_a_recipe_without_the_attribute_is_told():
    model = FairRec(WIDTH)
    model(*inputs())
    with pytest.raises(RecipeError, match="needs the context column 'attribute'"):
        model.auxiliary(Batch(torch.zeros(5, 1, dtype=torch.int64)))


# Users whose events tell the attribute, while what they like does not depend on it


ITEMS, EVENTS, USERS, FRESH, BATCH = 80, 12, 30_000, 12_000, 512


def users(count, seed):
    """Events from items that go by the attribute and by a taste of the user's own; the labels go by the taste alone."""
    generator = torch.Generator().manual_seed(seed)
    attribute = (torch.rand(count, generator=generator) < 0.4).long()
    taste = torch.randint(0, 4, (count,), generator=generator)
    kind = torch.arange(ITEMS) % 8  # the item's attribute side and its taste: 2 · 4
    score = 1.5 * (kind % 2 == attribute[:, None]).float() + 2.0 * (kind // 2 == taste[:, None]).float()
    events = torch.multinomial(torch.softmax(score, 1), EVENTS, replacement=True, generator=generator)
    target = torch.randint(0, ITEMS, (count,), generator=generator)
    chance = torch.where(kind[target] // 2 == taste, 0.8, 0.2)
    return events, target, (torch.rand(count, generator=generator) < chance).float(), attribute


def blind(events, target):
    """The probability that the target is of the user's taste, by the tastes of the events; no side is looked at."""
    taste = torch.arange(ITEMS) % 8 // 2
    told = torch.nn.functional.one_hot(taste[events], 4).sum(1).double()
    return torch.softmax(2.0 * told, 1)[torch.arange(len(target)), taste[target]], told


def trained(seed, steps=500, **options):
    """AUC of the ranking, of a probe of each part, and how far users' served parts are spread; of users not met."""
    torch.manual_seed(seed)
    events, target, label, attribute = users(USERS, seed)
    table = torch.nn.Embedding(ITEMS, 16)
    torch.nn.init.normal_(table.weight, std=0.3)
    model = FairRec(16, dropout=0.0, attention=16, **options)
    bias = torch.nn.Embedding(ITEMS, 1)
    parameters = [p for part in (table, model, bias) for p in part.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def logit(events, target):
        e = table(target)
        u = model(e, table(events), torch.full((len(target),), EVENTS))
        return (u * e).sum(1) + bias(target).squeeze(1)

    for _ in range(steps):
        rows = torch.randint(0, USERS, (BATCH,))
        model.train()
        z = logit(events[rows], target[rows])
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, label[rows])
        optimizer.zero_grad()
        (loss + model.auxiliary(labelled(attribute[rows]))).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    events, target, label, attribute = users(FRESH, 1000 + seed)
    with torch.no_grad():
        auc = roc_auc_score(label, logit(events, target))
        length = torch.full((FRESH,), EVENTS)
        parts = {name: getattr(model, name)(None, table(events), length) for name in ("free", "aware")}
    return (
        auc,
        {name: probe(u.numpy(), attribute.numpy()) for name, u in parts.items()},
        parts["free"].std(0).mean().item(),
    )


def probe(u, attribute):
    """AUC of a logistic regression that is fitted to one half of the users, on the other half."""
    half = len(u) // 2
    u = (u - u[:half].mean(0)) / (u[:half].std(0) + 1e-9)
    model = LogisticRegression(max_iter=1000).fit(u[:half], attribute[:half])
    return roc_auc_score(attribute[half:], model.predict_proba(u[half:])[:, 1])


def test_the_planted_users_can_be_ranked_without_their_attribute():
    """The best scorer that does not look at the attribute: what a fair model is judged by."""
    events, target, label, attribute = users(FRESH, 1000)
    score, told = blind(events, target)
    assert roc_auc_score(label, score) > 0.75
    assert abs(probe(told.double().numpy(), attribute.numpy()) - 0.5) < 0.03


@pytest.mark.slow
def test_the_served_part_forgets_the_attribute_and_ranks_as_before():
    """The mean of two worlds: the probe within .02 of chance, the AUC within .01 of that without a care."""
    plain = [trained(seed, predict=0.0, orthogonal=0.0, adversarial=0.0) for seed in range(2)]
    fair = [trained(seed, predict=0.004, orthogonal=0.004, adversarial=0.6, drop=0.9) for seed in range(2)]
    lost = np.mean([a[0] - b[0] for a, b in zip(plain, fair, strict=True)])
    hidden = {name: np.mean([parts[name] for _, parts, _ in fair]) for name in ("free", "aware")}
    assert min(parts["free"] for _, parts, _ in plain) > 0.8  # or there would be nothing to forget
    assert abs(hidden["free"] - 0.5) < 0.02
    assert hidden["aware"] > 0.85
    assert min(spread for _, _, spread in fair) > 0.1  # forgetting everything is no way to forget one thing
    assert lost < 0.01


def test_contract():
    contract("sequence", NRMS)
    contract("sequence", FairRec)
    contract("sequence", FairRec, discriminator="gradient", hidden=(4,), classes=3, shares=(0.5, 0.3, 0.2))
