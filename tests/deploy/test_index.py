"""An index finds the items that the trainer scores highest, for models that are two sides; others are refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import made
import numpy as np
import polars as pl
import pytest

from recsys.deploy.golden import training_logits
from recsys.deploy.graph import onnx_of
from recsys.deploy.index import Retriever, write_index
from recsys.deploy.predictor import load
from recsys.deploy.sides import Sides, two_sides
from recsys.errors import BundleError, ExportError
from recsys.nn.model import Model
from recsys.recipe.items import catalogue_rows, encoded

pytest.importorskip("usearch", reason="usearch is not installed (the extra `index`)")

DATA: dict[str, Any] = {**made.DATA, **made.LISTS}
FACTORS: dict[str, Any] = {
    "embedding": {"use": "table", "dim": 4, "init_std": 0.3},
    "interaction": "fm",
    "sequence": "mean_pool",
    "head": {"wide": True},
}
TOWERS: dict[str, Any] = {
    "embedding": {"use": "table", "dim": 4, "init_std": 0.3},
    "interaction": {"use": "two_tower", "item": ["item", "shop"], "hidden": [8], "dim": 5},
    "sequence": "mean_pool",
}
BOTH: dict[str, Any] = {**FACTORS, "interaction": [TOWERS["interaction"], "fm"]}
LISTS: dict[str, Any] = {**BOTH, "interaction": [{**TOWERS["interaction"], "item": ["item", "tags"]}, "fm"]}
CATALOGUE = pl.DataFrame(
    {
        "item": [f"i{n}" for n in range(30)],
        "shop": [f"s{n % 9}" for n in range(30)],
        "tags": [[f"t{k}" for k in range(n % 4)] for n in range(30)],
    }
)
LOGS = made.LOGS.drop("click", "buy")


@pytest.fixture(
    scope="module",
    params=[(FACTORS, "shop"), (TOWERS, "shop"), (LISTS, "tags")],
    ids=["fm", "two_tower", "both, and lists"],
)
def parts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Model, Path, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("index")
    description, second = request.param
    encoder, model = made.write(folder / "bundle", DATA, description)
    sides = two_sides(model, ["item", second], encoded(encoder, CATALOGUE), "click")
    user = onnx_of(sides.user, model.schema, ["vector"])
    predictor = load(folder / "bundle")
    items = CATALOGUE["item"].to_list()
    write_index(folder / "items", predictor.id, ["item", second], items, sides.items.numpy(), user, sides.gap)
    return encoder, model, folder, ("item", second)


def brute_force(encoder: Any, model: Model, logs: pl.DataFrame, of: tuple[str, str]) -> list[list[float]]:
    """The trainer's score of each row with each item in it."""
    found = []
    for item in CATALOGUE.select(of).iter_slices(1):
        asked = logs.drop(of).join(item, how="cross").select(logs.columns)
        found.append(training_logits(encoder, model, asked)["click"].tolist())
    return [list(scores) for scores in zip(*found, strict=True)]


def test_the_top_of_the_index_is_that_of_the_trainers_scores(
    parts: tuple[Any, Model, Path, tuple[str, str]],
) -> None:
    encoder, model, folder, of = parts
    logs = LOGS.with_columns(pl.when(pl.int_range(pl.len()) % 5 == 0).then(10**6).otherwise("user").alias("user"))[:80]
    retriever = Retriever(load(folder / "bundle"), folder / "items")
    rows = [{name: value for name, value in row.items() if name not in of} for row in logs.to_dicts()]
    wanted = brute_force(encoder, model, logs, of)
    items = CATALOGUE["item"].to_list()
    exact, approximate = retriever.top(rows, 7, exact=True), retriever.top(rows, 7)
    same = 0
    for scores, best, near in zip(wanted, exact, approximate, strict=True):
        order = sorted(range(30), key=lambda i: -scores[i])
        for rank, found in enumerate(best):
            real = scores[items.index(found.item)]
            assert real >= scores[order[rank]] - 1e-5  # but for ties, the very item
            assert abs((real - found.score) - (scores[order[0]] - best[0].score)) <= 1e-5  # the same number for all
        assert len({found.item for found in best}) == 7
        same += len({f.item for f in near} & {f.item for f in best})
    assert same >= 0.95 * 7 * len(rows)
    assert len({best[0].item for best in exact}) > 2  # rows differ in what they want


def sides_of(model: dict[str, Any], item: str = "item", task: str = "click") -> Sides:
    encoder = made.encoder_of(DATA)
    built = made.model_of(encoder, DATA, {"embedding": FACTORS["embedding"], **model})
    return two_sides(built, [item], encoded(encoder, CATALOGUE), task)


@pytest.mark.parametrize(
    ("model", "width"),
    [(FACTORS, 4 + 1), ({**TOWERS, "interaction": {**TOWERS["interaction"], "item": ["item"]}}, 5 + 1)],
    ids=["fm", "two_tower"],
)
def test_vectors_are_as_short_as_the_model_allows(model: dict[str, Any], width: int) -> None:
    sides = sides_of(model)
    assert sides.items.shape == (30, width)
    assert sides.gap <= 1e-5


def test_first_order_weights_alone_are_two_sides() -> None:
    sides = sides_of({"interaction": "logistic_regression", "head": {"wide": True}})
    assert sides.items.shape[1] == 1 or bool((sides.items[:, :-1].std(0) < 1e-6).all())
    assert float(sides.items[:, -1].std()) > 1e-3


@pytest.mark.parametrize(
    "model",
    [
        {"interaction": {"use": "mlp", "hidden": [8]}},
        {"interaction": ["fm", {"use": "mlp", "hidden": [8]}]},
        {"interaction": "cross"},
        {"interaction": "fm", "sequence": "din"},
        {**TOWERS, "interaction": {**TOWERS["interaction"], "item": ["item"]}, "sequence": "din"},
        {**TOWERS, "interaction": {**TOWERS["interaction"], "item": ["shop"]}},
        {"interaction": [TOWERS["interaction"], {"use": "mlp", "hidden": [8]}]},
    ],
    ids=["mlp", "deepfm", "cross", "din", "towers with din", "towers of another field", "towers and mlp"],
)
def test_models_that_are_no_dot_product_are_refused(model: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=r"no dot product of item with the rest: its scores differ by [0-9.e-]+ "):
        sides_of(model)


def test_names_that_are_none() -> None:
    with pytest.raises(ExportError, match=r"--items: no field 'itm'. Did you mean 'item'\?"):
        sides_of(FACTORS, item="itm")
    with pytest.raises(ExportError, match=r"--task: no task 'buy'. Tasks: click"):
        sides_of(FACTORS, task="buy")


def test_a_catalogue_whose_columns_are_of_another_kind(tmp_path: Path) -> None:
    encoder = made.encoder_of(DATA)
    file = tmp_path / "catalogue.parquet"
    CATALOGUE.with_columns(pl.col("tags").list.join("|")).write_parquet(file)
    with pytest.raises(ExportError, match=r"catalogue.parquet: column 'tags' is String, not List\(String\) as in"):
        catalogue_rows(encoder, ["item", "tags"], file)
    with pytest.raises(ExportError, match=r"--items: tags is a list; the first field is the item's id"):
        catalogue_rows(encoder, ["tags", "item"], file)
    pl.DataFrame({"user": [1.0, 2.5]}).write_parquet(file)
    with pytest.raises(
        ExportError, match=r"column 'user' is Float64, not Int64 as in the logs, and some of its numbers"
    ):
        catalogue_rows(encoder, ["user"], file)
    pl.DataFrame({"user": ["7", "07"]}).write_parquet(file)
    with pytest.raises(ExportError, match=r"1 rows have the user of another row"):
        catalogue_rows(encoder, ["user"], file)
    pl.DataFrame({"user": [1.0, 2.0]}).write_parquet(file)
    assert catalogue_rows(encoder, ["user"], file)["user"].to_list() == [1, 2]
    CATALOGUE.write_parquet(file)
    assert catalogue_rows(encoder, ["item", "tags"], file).equals(CATALOGUE.select("item", "tags"))


def test_an_index_of_another_bundle_or_altered_is_refused(
    parts: tuple[Any, Model, Path, tuple[str, str]], whole: Path, tmp_path: Path
) -> None:
    _, _, folder, _ = parts
    with pytest.raises(BundleError, match=r"items: an index of bundle [0-9a-f]{64}, not of [0-9a-f]{64}"):
        Retriever(load(whole), folder / "items")
    copy = tmp_path / "items"
    copy.mkdir()
    for path in (folder / "items").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    predictor = load(folder / "bundle")
    Retriever(predictor, copy)
    for name in ("items.json", "user.onnx", "index.usearch"):
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + b"!")
        with pytest.raises(BundleError, match=f"{name}: altered after the index was written"):
            Retriever(predictor, copy)
        (copy / name).unlink()
        with pytest.raises(BundleError, match=f"{name}: cannot be read"):
            Retriever(predictor, copy)
        (copy / name).write_bytes(content)


RECIPE = """
data:
  source: {use: files, path: logs.parquet}
  label: click
  categorical: [user, item, shop]
  split: {by: hash, valid: 0.1, test: 0.1}
model: {embedding: {use: table, dim: 4}, interaction: fm, head: {wide: true}}
stages: [{use: fit, epochs: 1}, export]
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "recsys.cli", *arguments], capture_output=True, text=True, cwd=folder)


@pytest.mark.slow
def test_the_command_writes_an_index_of_a_run(tmp_path: Path) -> None:
    made.LOGS.select("user", "item", "shop", "click").write_parquet(tmp_path / "logs.parquet")
    CATALOGUE.drop("tags").write_csv(tmp_path / "catalogue.csv")
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = run(tmp_path, "train", "r.yaml", "--out", "mine")
    assert done.returncode == 0, done.stderr
    call = ("export", "mine", "--index", "usearch", "--items", "item")
    done = run(tmp_path, *call, "--out", "items")
    assert done.returncode == 0, done.stderr
    assert "30 items with 5 numbers each" in done.stdout
    retriever = Retriever(load(tmp_path / "mine" / "bundle"), tmp_path / "items")
    predictor = load(tmp_path / "mine" / "bundle")
    (found,) = retriever.top([{"user": 4, "shop": "s3"}], 30, exact=True)
    scores = predictor.predict([{"user": 4, "shop": "s3", "item": f.item} for f in found]).logit["label"]
    assert (np.diff(scores) <= 1e-6).all()
    assert len({f.item for f in found}) == 30
    refused = run(tmp_path, *call, "--items", "shop", "--out", "more")
    assert refused.returncode == 1
    assert "which of them belong together? Give --catalogue FILE" in refused.stderr
    assert run(tmp_path, *call, "--items", "shop", "--catalogue", "catalogue.csv", "--out", "more").returncode == 0
    refused = run(tmp_path, *call, "--out", "items")
    assert refused.stderr == "error: items: exists; remove it, or choose another --out\n"
