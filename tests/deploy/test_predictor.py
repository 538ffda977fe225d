"""A predictor gives the trainer's scores for raw rows, alone or many, as mappings or as a frame."""

import threading
from pathlib import Path
from typing import Any

import made
import numpy as np
import polars as pl
import pytest
import torch

from recsys.deploy.golden import golden_rows, training_logits
from recsys.deploy.predictor import Predictor, Scores, load
from recsys.errors import RequestError


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    data = {**made.DATA, **made.LISTS}
    encoder = made.encoder_of(data)
    return encoder, made.model_of(encoder, data, made.MODEL)


@pytest.fixture(scope="module")
def predictor(whole: Path) -> Predictor:
    return load(whole)


def close(scores: Scores, logits: dict[str, Any]) -> None:
    assert set(scores.logit) == set(logits)
    for task, z in logits.items():
        p = torch.sigmoid(torch.from_numpy(z)).numpy()
        assert np.abs(scores.probability[task] - p).max() <= 1e-6
        assert np.abs(scores.logit[task] - z).max() <= 1e-5


def test_logs_with_unseen_values_get_the_trainers_scores(parts: tuple[Any, Any], predictor: Predictor) -> None:
    encoder, model = parts
    unseen = pl.col("shop").map_elements(lambda s: s + "!" if s == "s3" else s, return_dtype=pl.String)
    logs = made.LOGS.with_columns(pl.col("user") * 2, unseen, pl.col("price") * 3).drop("click", "buy")
    logits = training_logits(encoder, model, logs)
    rows = logs.to_dicts()
    close(predictor.predict(logs), logits)
    close(predictor.predict(rows), logits)
    one = [predictor.predict(row) for row in rows[:40]]
    assert all(len(scores) == 1 for scores in one)
    alone = np.array([scores.logit["click"][0] for scores in one])
    assert np.abs(alone - predictor.predict(rows[:40]).logit["click"]).max() <= 2e-6
    assert np.ptp(logits["click"]) > 0.1
    for field in ("user", "item", "shop", "city", "price", "age", "tags", "past"):  # each input has a say
        changed = [{**row, field: rows[(at + 1) % 400][field]} for at, row in enumerate(rows)]
        if field == "past":
            changed = [{**row, "past_shop": rows[(at + 1) % 400]["past_shop"]} for at, row in enumerate(changed)]
        assert np.abs(predictor.predict(changed).logit["click"] - logits["click"]).max() > 1e-3, field


def test_more_rows_than_are_scored_at_once(parts: tuple[Any, Any], predictor: Predictor) -> None:
    logs = pl.concat([made.LOGS] * 12)
    scores = predictor.predict(logs)
    assert len(scores) == 4800
    np.testing.assert_allclose(scores.logit["click"][4400:], scores.logit["click"][:400], atol=2e-6)
    rows = logs.to_dicts()
    np.testing.assert_array_equal(predictor.predict(rows).logit["click"], scores.logit["click"])
    rows[4500]["price"] = "cheap"
    with pytest.raises(RequestError, match=r"^row 4501, column 'price'") as refused:
        predictor.predict(rows)
    assert refused.value.row == 4501
    assert len(predictor.predict([])) == 0


def test_ids_out_of_range_are_counted_and_read_as_unknown(predictor: Predictor) -> None:
    row = made.LOGS.row(5, named=True)
    unknown = {**row, "user": 10**9}
    encoded = predictor.encoder.rows([unknown])
    good = predictor.score(encoded)
    assert good.clipped.tolist() == [0]
    for wrong in (-1, -(2**40), 2**40, 43):
        encoded.ids[0, 0] = wrong
        scores = predictor.score(encoded)
        assert scores.clipped.tolist() == [1], wrong
        assert scores.logit["click"].tolist() == good.logit["click"].tolist()
    encoded.ids[0, 0] = 1
    events, length = encoded.lists[1]
    events[0, 0, 1] = 99
    length[0] = events.shape[1] + 7
    assert predictor.score(encoded).clipped.tolist() == [2]


def test_what_cannot_be_scored_is_refused(predictor: Predictor) -> None:
    row = made.LOGS.row(0, named=True)
    with pytest.raises(RequestError, match=r"^rows are str; expected a mapping, a list of them, or a Polars frame"):
        predictor.predict("row")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^row 1, column 'user': there is no such column"):
        predictor.predict({})
    with pytest.raises(RequestError, match=r"^row 2: None is no object"):
        predictor.predict([row, None])  # type: ignore[list-item]


def test_a_predictor_tells_what_it_needs(predictor: Predictor) -> None:
    assert predictor.tasks == ("click",)
    assert predictor.columns == ("user", "item", "shop", "city", "price", "age", "tags", "past", "past_shop")
    columns = {column["name"]: column for column in predictor.schema["columns"]}
    assert set(columns) == set(predictor.columns)
    shops = made.LOGS["shop"]
    assert columns["shop"]["baseline"]["missing"] == pytest.approx(shops.null_count() / len(shops))
    assert columns["price"]["baseline"]["quantiles"]["0.5"] == pytest.approx(made.LOGS["price"].median(), abs=0.5)
    assert columns["past"]["baseline"]["mean_length"] == pytest.approx(
        made.LOGS["past"].list.len().clip(0, 5).mean(), abs=1e-9
    )
    signature = predictor.bundle.manifest["signature"]
    assert list(signature["inputs"]) == ["ids", "values", "list_0", "length_0", "list_1", "length_1"] or set(
        signature["inputs"]
    ) == {"ids", "values", "list_0", "length_0", "list_1", "length_1"}
    predictor.warm_up()


def test_threads_share_a_predictor(predictor: Predictor) -> None:
    rows = made.LOGS.to_dicts()
    wanted = [float(predictor.predict(row).logit["click"][0]) for row in rows]
    found: dict[int, list[float]] = {}

    def work(part: int) -> None:
        found[part] = [float(predictor.predict(row).logit["click"][0]) for row in rows[part::4]]

    workers = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(found[part] == wanted[part::4] for part in range(4))


def test_golden_rows_have_every_kind_of_value(parts: tuple[Any, Any]) -> None:
    encoder, _ = parts
    rows = golden_rows(encoder)
    assert rows == golden_rows(encoder)
    assert len(rows) >= 256
    assert all(value in (None, []) for value in rows[0].values())
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for strange in (None, "", "never seen", "\U0001f600", "x" * 2000):
        assert strange in columns["shop"]
    assert {2**62, 2**63 - 1, -1, None} <= set(columns["user"])
    assert {1e300, None} <= set(columns["price"])
    lengths = {len(past or []) for past in columns["past"]}
    assert {0, 1, 5} <= lengths
    assert max(lengths) == 11
    assert {len(row["past"] or []) - len(row["past_shop"] or []) for row in rows} == {0}
