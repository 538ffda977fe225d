"""Two towers: logits against loops, towers that see their own fields alone, and a planted taste that they learn."""

import pytest
import torch
from interactions import assert_equal_to_loop, assert_small_graph, fields, mlp_loop, randomised, vectors, xor_auc

from recsys.api import Fields
from recsys.errors import RecipeError
from recsys.testing import contract
from recsys_two_tower import TwoTower


def made(count=5, dim=4, **options):
    return randomised(TwoTower(fields(count, dim), **{"item": ("f1", "f3"), "hidden": (7,), "dim": 3} | options))


def loop(module, item, normalize, temperature):
    """One row, `[F, D] -> [1]`, from the weights."""

    def tower(part, row):
        block, last = part
        v = last.weight @ mlp_loop(block, torch.cat([row[f] for f in places[part]])) + last.bias
        return v / sum(x * x for x in v).sqrt() if normalize else v

    user, offer = module.towers
    places = {offer: item, user: [f for f in range(5) if f not in item]}
    return lambda row: (tower(user, row) @ tower(offer, row) / temperature).unsqueeze(0)


@pytest.mark.parametrize("hidden", [(), (7,), (6, 5)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_logits_and_gradients_are_those_of_the_loops(normalize, hidden):
    module = made(normalize=normalize, hidden=hidden, temperature=0.3, batch_norm=bool(hidden))
    assert_equal_to_loop(module, loop(module, [1, 3], normalize, 0.3), vectors(6, 5, 4))


def test_no_tower_sees_a_field_of_the_other():
    module, e = made(), vectors(6, 5, 4).detach()
    p, q = module.sides(e)
    for f in range(5):
        moved = e.clone()
        moved[:, f] += 1.0
        other_p, other_q = module.sides(moved)
        assert torch.equal(other_p, p) == (f in (1, 3))
        assert torch.equal(other_q, q) == (f not in (1, 3))
    shown = module.explain(e)
    assert torch.equal((shown["user"] * shown["item"]).sum(1, keepdim=True), module(e))


def test_a_name_stands_for_all_columns_of_a_sequence_or_a_multi_valued_field():
    of = Fields(("user", "film", "genres.genres", "seen.film", "seen.genres", "genres_liked"), (10,) * 6, 4)
    for item, places in ((("film", "genres"), [1, 2]), (("film", "genres.genres"), [1, 2]), (("seen",), [3, 4])):
        module = TwoTower(of, item=item)
        assert module.item.tolist() == places
        assert module.user.tolist() == [f for f in range(6) if f not in places]


def test_vectors_have_length_one_and_the_logit_lies_between_the_inverse_temperatures():
    module, e = made(temperature=0.05), 10 * vectors(50, 5, 4).detach()
    p, q = module.sides(e)
    assert torch.allclose(q.norm(dim=1), torch.ones(50).double())
    assert torch.allclose(p.norm(dim=1), torch.full((50,), 20.0).double())
    assert float(module(e).detach().abs().max()) <= 20.0 + 1e-9
    free = made(normalize=False, temperature=1.0)
    assert torch.allclose(free(e), (free.sides(e)[0] * free.sides(e)[1]).sum(1, keepdim=True))
    assert float(free.sides(e)[1].detach().norm(dim=1).std()) > 0.1


def test_it_learns_a_taste_that_no_side_tells_alone():
    assert xor_auc(lambda f: TwoTower(f, item=("b",), hidden=(16,), dim=8)) > 0.99


def test_the_graph_is_small_whatever_the_number_of_fields():
    assert_small_graph(lambda f: TwoTower(f, item=("f1", "f2")))


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (("ff1",), r"item: no field 'ff1'; did you mean 'f1'\? Fields: f0, f1, f2, f3, f4"),
        (("zz",), r"item: no field 'zz'\. Fields: "),
        (("f0", "f1", "f2", "f3", "f4"), "two towers need a field each, and none of 5 is the user's"),
        ((), "two towers need a field each, and none of 5 is the item's"),
    ],
)
def test_fields_that_cannot_be_divided(item, told):
    with pytest.raises(RecipeError, match=told) as caught:
        TwoTower(fields(5, 4), item=item)
    assert caught.value.path == ("model", "interaction", "item")


@pytest.mark.parametrize("options", [{}, {"normalize": False, "batch_norm": True, "dropout": 0.2}], ids=str)
def test_the_contract(options):
    contract("interaction", TwoTower, item=("f0",), **options)
