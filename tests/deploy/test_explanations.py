"""What a column does to a score: as leaving it out of the raw row says, one by one."""

from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
from serving import ROW, ROWS, Server

from recsys.deploy.explain import names_of
from recsys.deploy.predictor import Predictor, load
from recsys.errors import RequestError

GROUPS = {"tags": ("tags",), "clicks": ("past", "past_shop")}


@pytest.fixture(scope="module")
def predictor(whole: Path) -> Predictor:
    return load(whole)


def test_contributions_are_what_leaving_out_one_by_one_says(predictor: Predictor) -> None:
    rows = ROWS[:30]
    found = predictor.explain(rows)
    assert found.names == ("user", "item", "shop", "city", "price", "age", "tags", "clicks") == names_of(predictor.spec)
    assert len(found) == 30
    moved = 0
    for at, row in enumerate(rows):
        logit = predictor.predict(row).logit["click"][0]
        assert found.logit["click"][at] == pytest.approx(logit, abs=1e-5)
        for c, name in enumerate(found.names):
            without: dict[str, Any] = {**row, **dict.fromkeys(GROUPS.get(name, (name,)))}
            wanted = logit - predictor.predict(without).logit["click"][0]
            assert found.contribution["click"][at, c] == pytest.approx(wanted, abs=1e-5), (at, name)
            moved += abs(wanted) > 1e-3
            if row[GROUPS.get(name, (name,))[0]] in (None, []):
                assert found.contribution["click"][at, c] == 0
    assert moved > 100
    nothing = predictor.predict(dict.fromkeys(predictor.columns)).logit["click"][0]
    assert found.base["click"] == pytest.approx(nothing, abs=1e-5)


def test_without_interactions_they_add_up(tmp_path: Path) -> None:
    """A logit of first-order weights alone, and two tasks."""
    data = {**made.DATA, "label": {"click": "click", "buy": "buy"}}
    block = {**made.MODEL, "head": {"wide": True}}
    encoder = made.encoder_of(data)
    model = made.model_of(encoder, data, block)
    for parameter in model.embedding.parameters():
        torch.nn.init.zeros_(parameter)
    made.write_model(tmp_path / "bundle", encoder, model, data, block)
    predictor = load(tmp_path / "bundle")
    found = predictor.explain(ROWS[:20])
    for task in ("click", "buy"):
        assert found.contribution[task].shape == (20, 6)
        assert np.abs(found.contribution[task]).max() > 1e-2
        np.testing.assert_allclose(found.contribution[task].sum(1), found.logit[task] - found.base[task], atol=1e-5)
    one = predictor.explain(ROWS[3])
    np.testing.assert_allclose(one.contribution["buy"][0], found.contribution["buy"][3], atol=1e-6)


def test_rows_in_chunks_and_bad_rows(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    import recsys.deploy.explain as module

    whole = predictor.explain(ROWS[:11])
    monkeypatch.setattr(module, "_ROWS", 20)
    found = predictor.explain(ROWS[:11])
    np.testing.assert_allclose(found.contribution["click"], whole.contribution["click"], atol=1e-6)
    with pytest.raises(RequestError, match="row 2"):
        predictor.explain([ROW, {**ROW, "price": "much"}])


def test_over_http(server: Server, predictor: Predictor) -> None:
    reply = server.ask("POST", "/v1/explain", ROWS[:3])
    assert reply.status == 200, reply.body
    wanted = predictor.explain(ROWS[:3])
    assert reply.json["bundle"] == predictor.id
    assert reply.json["base"]["click"] == pytest.approx(wanted.base["click"], abs=1e-6)
    for at, row in enumerate(reply.json["explanations"]):
        told = wanted.contribution["click"][at]
        assert row["contributions"]["click"] == pytest.approx(dict(zip(wanted.names, told, strict=True)), abs=1e-5)
    assert "at most 64" in server.ask("POST", "/v1/explain", ROWS[:65]).error
    assert server.ask("POST", "/v1/explain", ROWS[:65]).status == 413
    assert server.ask("POST", "/v1/explain", [{"user": 1}]).status == 422
    assert server.ask("POST", "/v1/explain", b"{").status == 400
    assert "/v1/explain" in server.ask("GET", "/openapi.json").json["paths"]
    assert server.metric('recsys_requests_total{endpoint="explain",status="200"}') >= 1
