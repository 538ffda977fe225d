"""Raw rows, values among them that training never saw, get the trainer's scores from the graph of every component."""

from typing import Any

import made
import parity
import polars as pl
import pytest

from recsys.data.encode import Encoder
from recsys.errors import RecipeError
from recsys.nn.model import Model

QUICK = ("embedding table", "embedding unified", "interaction autoint", "selector optfs", "sequence din")


@pytest.fixture(scope="module")
def encoders() -> dict[bool, Encoder]:
    return {lists: made.encoder_of(parity.LISTS if lists else parity.DATA) for lists in (False, True)}


def agree(encoder: Encoder, model: Model, tolerance: float = parity.TOLERANCE) -> None:
    gap, spread = parity.difference(encoder, model, parity.rows_with_unseen_values())
    assert spread > 1e-2, "the scores are too near to each other for a difference to be seen"
    assert gap <= tolerance


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in parity.CASES]
)
def test_every_component_scores_in_its_graph_as_in_training(case: str, encoders: dict[bool, Encoder]) -> None:
    kind, name = case.split()
    lists = kind == "sequence" or case == "embedding table"
    data = parity.LISTS if lists else parity.DATA
    model = parity.trained(encoders[lists], data, parity.recipe(kind, name))
    agree(encoders[lists], model)
    if kind in ("embedding", "selector"):
        small = parity.pruned(model)
        agree(encoders[lists], small)
        if kind == "embedding":
            try:
                small = small.quantized("int8").eval()
            except RecipeError:  # it stores its numbers in fewer bits already
                return
            agree(encoders[lists], small)


@pytest.mark.parametrize("stored", [pytest.param("float16", marks=pytest.mark.slow), "int8"])
def test_a_pruned_and_quantised_table_with_lists(encoders: dict[bool, Encoder], stored: Any) -> None:
    model = parity.trained(encoders[True], parity.LISTS, parity.recipe("embedding", "magnitude"))
    agree(encoders[True], parity.pruned(model).quantized(stored).eval())


def test_tasks_members_hashed_fields_and_first_order_weights() -> None:
    data = {
        **made.DATA,
        "label": {"click": "click", "buy": "buy"},
        "categorical": {**made.DATA["categorical"], "user": {"hash_buckets": 20}, "city": {"share": "shop"}},
    }
    encoder = made.encoder_of(data)
    block = {"embedding": parity.TABLE, "interaction": ["fm", parity.PERCEPTRON], "head": {"ensemble": 2, "wide": True}}
    model = parity.trained(encoder, data, block)
    agree(encoder, model)
    agree(encoder, parity.pruned(model))


@pytest.mark.slow
def test_ten_thousand_rows_of_a_bundle(tmp_path: Any) -> None:
    """All columns, through the files of a bundle."""
    from recsys.deploy.golden import training_logits
    from recsys.deploy.predictor import load

    encoder, model = made.write(tmp_path / "bundle", model={**made.MODEL, "sequence": "din"})
    rows = pl.concat([parity.rows_with_unseen_values(400)] * 26)
    rows = rows.with_columns((pl.col("price") + pl.int_range(pl.len()) / 1000).alias("price"))
    wanted = training_logits(encoder, model, rows)["click"]
    scores = load(tmp_path / "bundle").predict(rows)
    assert len(scores) == len(rows) >= 10_000
    p = 1 / (1 + 2.718281828459045**-wanted)
    assert abs(scores.probability["click"] - p).max() <= 1e-6
