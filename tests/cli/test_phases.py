"""Which rows teach a method what: validation and test rows change nothing but what a search takes from them."""

import polars as pl
import pytest

from recsys.data.simulate import Simulated
from recsys.data.sources import DataRoot
from recsys.train.checkpoint import sha256

STAGES = {
    "table": ("fit", "export"),
    "frequency": ("count_rows", "fit", "prune", "fit", "export"),
    "magnitude": ("fit", "prune", "fit", "export"),
    "pep": ("fit", "reset", "prune", "fit", "export"),
    "dnis": ("count_rows", "fit", "bilevel_fit", "prune", "fit", "export"),
    "optembed": ("fit", "evolve", "reset", "prune", "fit", "export"),
}
SEARCHES = ("bilevel_fit", "evolve")
"""The stages that are made to look at validation rows."""
OPTIONS = {"optembed": ", threshold_rate: 0.1, pressure: 0.01", "pep": ", threshold_init: -6.0"}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two folders of logs with equal training rows; in one, the other rows have nothing to do with them."""
    source = Simulated(DataRoot(()), rows=3000, seed=7)
    clean, poisoned = (tmp_path_factory.mktemp(name) for name in ("clean", "poisoned"))
    for split in ("train", "valid", "test"):
        frame = source.scan(split).collect()
        frame.write_parquet(clean / f"{split}.parquet")
        if split != "train":
            features = [c for c in frame.columns if c not in ("y", "row_id", "ts")]
            shuffled = [pl.col(c).shuffle(seed=i) for i, c in enumerate(features)]
            frame = frame.with_columns(*shuffled, (1 - pl.col("y")).alias("y"))
        frame.write_parquet(poisoned / f"{split}.parquet")
    return clean, poisoned


@pytest.mark.parametrize("embedding", STAGES)
def test_only_a_search_learns_from_validation_rows_and_nothing_from_test_rows(recsys, logs, tmp_path, embedding):
    stages = STAGES[embedding]
    written = ", ".join(
        f"{{use: {name}, name: fit{i}, epochs: 1}}" if name == "fit" else f"{{use: {name}}}"
        for i, name in enumerate(stages, 1)
    )
    if embedding == "optembed":
        written = written.replace(
            "{use: evolve}", "{use: evolve, population: 4, generations: 2, mutants: 2, crossovers: 2}"
        )
    written = written.replace("{use: bilevel_fit}", "{use: bilevel_fit, epochs: 1}")
    labels = [f"{i}-fit{i}" if name == "fit" else f"{i}-{name}" for i, name in enumerate(stages, 1)]
    digests = []
    for folder in logs:
        files = ", ".join(f"{split}: {folder / split}.parquet" for split in ("train", "valid", "test"))
        run = tmp_path / folder.name
        recsys(
            *("train", "quickstart", f"data.source={{use: files, {files}}}", "data.label=y", f"stages=[{written}]"),
            *(
                f"model.embedding={{use: {embedding}, dim: 4{OPTIONS.get(embedding, '')}}}",
                "train.threads=1",
                "--out",
                run,
            ),
        )
        files_of = [run / label / "model.safetensors" for label in labels]
        digests.append([sha256(path) if path.exists() else None for path in files_of])
    first = next((i for i, name in enumerate(stages) if name in SEARCHES), len(stages))
    assert any(digests[0][:first])
    assert digests[0][:first] == digests[1][:first], "training saw the training rows only"
    if first < len(stages):
        assert digests[0][first] != digests[1][first], "the search listens to the validation rows"
