"""A bundle as a Triton model: the configuration is one that the server reads, and the wiring gives the same scores."""

import subprocess
import sys
from pathlib import Path

import made
import numpy as np
import pytest
import triton_server
from google.protobuf import text_format

from recsys.deploy.bundle import open_bundle
from recsys.deploy.calibration import Calibration, Curve
from recsys.deploy.predictor import Predictor, load
from recsys.deploy.raw_graph import RawGraphs
from recsys.deploy.raw_rows import RawRows
from recsys.deploy.text_proto import Word, entries, text_proto
from recsys.deploy.triton import Batching, write_triton
from recsys.errors import ExportError


@pytest.fixture(scope="module")
def predictor(whole: Path) -> Predictor:
    return load(whole)


def same(model: triton_server.Model, predictor: Predictor) -> None:
    rows = predictor.bundle.lines("golden/requests.jsonl")
    wanted = predictor.predict(rows)
    for first, last in ((0, len(rows)), (3, 4)):
        found = model.run(RawRows(predictor.spec).tensors(rows[first:last]))
        assert set(found) == {"logit", "probability", "clipped"}
        for t, task in enumerate(predictor.tasks):
            assert np.abs(found["probability"][:, t] - wanted.probability[task][first:last]).max() <= 1e-6
            assert np.abs(found["logit"][:, t] - wanted.logit[task][first:last]).max() <= 1e-5
        assert not found["clipped"].any()
        assert found["clipped"].shape == (last - first, 1)


@pytest.mark.parametrize("ensemble", [False, True])
def test_a_model_gives_the_predictors_scores(predictor: Predictor, tmp_path: Path, ensemble: bool) -> None:
    graphs = RawGraphs(predictor.bundle, normalized=True)
    written = write_triton(graphs, tmp_path, "ctr", ensemble=ensemble, batching=Batching(rows=512, instances=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert written[-1] == tmp_path / "ctr"
    models = [triton_server.Model(path) for path in written]
    assert [m.config.max_batch_size for m in models] == [512] * (3 if ensemble else 1)
    same(models[-1], predictor)
    for model in models[: 2 if ensemble else 1]:
        sizes = [len(next(iter(feeds.values()))) for feeds in model.warm_up()]
        assert sizes == [1, 8]
        assert model.config.instance_group[0].count == 2
    warm = models[0].warm_up()[0]
    assert warm["item"][0, 0] in [f"i{n}" for n in range(30)] + ["never seen"]
    assert warm["past"].shape[1] >= 1
    if ensemble:
        content = (tmp_path / "ctr_scorer" / "1" / "model.onnx").read_bytes()
        assert content == predictor.bundle.read("model.onnx")
    files = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {".pbtxt", ".onnx", ""}  # no code


def test_a_calibrated_model_with_two_tasks_and_without_numbers_or_lists(tmp_path: Path) -> None:
    data = {**made.DATA, "label": {"click": "click", "buy": "buy"}, "numeric": {}}
    calibration = Calibration({"click": Curve("temperature", 2.0, -0.5), "buy": Curve()})
    made.write(tmp_path / "bundle", data, {**made.MODEL, "interaction": "fm"}, calibration)
    predictor = load(tmp_path / "bundle")
    graphs = RawGraphs(predictor.bundle, normalized=True)
    for ensemble, name in ((False, "one"), (True, "two")):
        write_triton(graphs, tmp_path / "models", name, ensemble=ensemble, batching=Batching())
        same(triton_server.Model(tmp_path / "models" / name), predictor)


def test_what_is_there_is_not_overwritten(predictor: Predictor, tmp_path: Path) -> None:
    graphs = RawGraphs(predictor.bundle, normalized=True)
    (tmp_path / "ctr_scorer").mkdir()
    with pytest.raises(ExportError, match=r"ctr_scorer: exists; remove it, or choose another --name"):
        write_triton(graphs, tmp_path, "ctr", ensemble=True, batching=Batching())
    for name in ("", "a/b", "../x", ".hidden", "a b"):
        with pytest.raises(ExportError, match=r"a model's name has letters"):
            write_triton(graphs, tmp_path, name, ensemble=False, batching=Batching())
    assert [path.name for path in tmp_path.iterdir()] == ["ctr_scorer"]


def test_the_checker_finds_wrong_configurations(predictor: Predictor, tmp_path: Path) -> None:
    """A schema that accepted anything would prove nothing."""
    graphs = RawGraphs(predictor.bundle, normalized=True)
    (folder,) = write_triton(graphs, tmp_path, "ctr", ensemble=False, batching=Batching())
    good = (folder / "config.pbtxt").read_text()
    for old, new in (
        ("max_batch_size: 1024", "max_batch: 1024"),
        ("TYPE_STRING", "TYPE_TEXT"),
        ("dims: [ 1 ]", "dims: [ one ]"),
        ("kind: KIND_CPU", "kind: CPU"),
        ('name: "ctr"', "name: ctr"),
    ):
        assert old in good
        (folder / "config.pbtxt").write_text(good.replace(old, new, 1))
        with pytest.raises(text_format.ParseError):
            triton_server.Model(folder)
    (folder / "config.pbtxt").write_text(good.replace("TYPE_FP64", "TYPE_FP32", 1))
    with pytest.raises(AssertionError):
        triton_server.Model(folder)


def test_text_of_any_characters_is_read_back() -> None:
    texts = ["", 'a"b', "a\\b", "a\nb\t", "é😀", "\x01", "it's"]
    for text in texts:
        message = {"name": text, "max_batch_size": 3, "parameters": entries({text: {"string_value": text}})}
        read = text_format.Parse(text_proto(message), triton_server.CONFIG())
        assert read.name == text
        assert read.parameters[text].string_value == text
    kind = text_proto({"instance_group": [{"kind": Word("KIND_CPU")}, {"count": 2}], "input": []})
    assert [g.kind for g in text_format.Parse(kind.replace("input: [ ]", ""), triton_server.CONFIG()).instance_group]


def test_the_command_writes_a_repository(whole: Path, tmp_path: Path) -> None:
    options = ["--normalized", "--ensemble", "--name", "m", "--max-batch", "64", "--triton", str(tmp_path / "models")]
    done = subprocess.run(
        [sys.executable, "-m", "recsys.cli", "export", str(whole), *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "models" / name) for name in ("m_encoder", "m_scorer", "m")]
    assert triton_server.Model(tmp_path / "models" / "m").config.max_batch_size == 64
    assert open_bundle(whole).id.encode() in (tmp_path / "models" / "m_encoder" / "1" / "model.onnx").read_bytes()
