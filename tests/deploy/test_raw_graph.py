"""One graph from raw columns to scores encodes as the bundle's encoder does, and scores as its predictor does."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import made
import numpy as np
import onnx
import onnxruntime
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.contracts import FIRST_ID, NULL_ID, UNKNOWN_ID
from recsys.data.encode import Encoder
from recsys.data.schema import DataConfig
from recsys.data.vocabulary import Vocabulary
from recsys.deploy.bundle import open_bundle
from recsys.deploy.calibration import Calibration, Curve
from recsys.deploy.encode import RowEncoder
from recsys.deploy.predictor import Predictor, load
from recsys.deploy.raw_encoder import RawEncoder
from recsys.deploy.raw_graph import RawGraphs
from recsys.deploy.raw_rows import MISSING_INT, MISSING_UINT, NULL, RawRows
from recsys.deploy.write import spec_of
from recsys.errors import ExportError, RequestError

LIKE = onnx.helper.make_model(
    onnx.helper.make_graph([], "none", [], []), opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10
)
WHOLE = [3, 3, -1, 0, 7, 12, 2**40, 2**53, 1 - 2**63, 2**63 - 1, 5, 16_777_215, 1, 2, 9, 10]
WORDS = ["a", "", " ", "12", "é", "e\u0301", "İ", "ß", "\0", "true", "a\0b", "x" * 30, "-1", "a|b", "😀", "NA"]
FRAME = pl.DataFrame(
    {
        "whole": WHOLE,
        "unsigned": pl.Series([abs(n) for n in WHOLE[:8]] + [2**63, 2**64 - 2, *range(20, 26)], dtype=pl.UInt64),
        "word": WORDS,
        "number": [0.5, -1.0, 3.0, 1e6, -2e5, 0.0, 7.25, 1.0, 2.0, 3.5, 8.0, -9.0, 4.0, 11.0, 12.0, 13.0],
        "tiny": [1e-12 * n for n in range(16)],
        "flat": [5.0] * 16,
        "words": [["a", "b"], [], ["c"] * 5, None] * 4,
        "past": [["a", "12"], [], ["ß"] * 5, None] * 4,
        "y": [0, 1] * 8,
    }
)
KINDS: dict[str, dict[str, Any]] = {
    "int": {"categorical": {"whole": {"null_values": [-1, "?", 12]}}},
    "uint": {"categorical": {"unsigned": {"null_values": [22]}}},
    "text": {"categorical": {"word": {"null_values": ["NA", -1, True]}}},
    "normalized": {"categorical": {"word": {"normalize": ["nfc", "strip", "lower"], "null_values": ["NA"]}}},
    "hashed_int": {"categorical": {"whole": {"hash_buckets": 1000, "null_values": [7]}}},
    "hashed_uint": {"categorical": {"unsigned": {"hash_buckets": 77}}},
    "standard": {"numeric": {"number": {"null_values": [-1, "NA"]}}},
    "log": {"numeric": {"number": {"transform": "log"}, "tiny": {"transform": "log"}}},
    "raw": {"numeric": {"number": {"transform": "raw"}, "flat": {}}},
    "quantile": {"numeric": {"number": {"transform": "quantile", "buckets": 5}}},
    "mixed": {
        "categorical": {"whole": {}, "word": {}},
        "numeric": {"number": {"transform": "quantile"}, "tiny": {"null_values": [0]}},
    },
    "lists": {
        "categorical": {"word": {}, "whole": {}},
        "multi_valued": {"words": {"max_length": 3, "null_values": ["b"]}},
        "sequences": {"clicks": {"columns": {"word": "past"}, "max_length": 4}},
    },
    "one_event": {"categorical": {"word": {}}, "multi_valued": {"words": {"max_length": 1, "share": "word"}}},
}


def parts(block: dict[str, Any]) -> tuple[RowEncoder, dict[str, Any]]:
    encoder = Encoder.fit(FRAME.lazy(), DataConfig.model_validate({"source": {}, "label": "y", **block}))
    tables = {
        name: dict(zip(found.values.to_list(), range(FIRST_ID, found.rows), strict=True))
        if isinstance(found, Vocabulary)
        else None
        for name, found in encoder.lookups.items()
    }
    return RowEncoder(spec_of(encoder), tables), tables


def inputs(rows: RowEncoder) -> list[str]:
    spec = rows.spec
    lists = [name for g in range(len(spec.lists)) for name in (f"list_{g}", f"length_{g}")]
    return ["ids", *(["values"] if spec.has_values else []), *lists]


def session(model: onnx.ModelProto | bytes) -> onnxruntime.InferenceSession:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


ENCODERS = {kind: parts(block) for kind, block in KINDS.items()}
GRAPHS = {
    kind: session(RawEncoder(rows.spec, tables, inputs(rows), normalized=True).model(LIKE))
    for kind, (rows, tables) in ENCODERS.items()
}

texts = st.none() | st.sampled_from(WORDS) | st.text(max_size=6).filter(lambda text: text != NULL)
wholes = st.none() | st.sampled_from(WHOLE) | st.integers(MISSING_INT + 1, 2**63 - 1) | st.integers(-20, 20)
unsigned = st.none() | st.sampled_from([0, 3, 22, 2**63, 2**64 - 2]) | st.integers(0, MISSING_UINT - 1)
numbers = st.none() | st.sampled_from(FRAME["number"].to_list()) | st.floats() | st.floats(-20, 20) | st.just(3.5e38)
lists = st.none() | st.lists(st.sampled_from(["a", "b", "c", "ß", "new", "", None]), max_size=7)
COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "whole": wholes,
    "unsigned": unsigned,
    "word": texts,
    "number": numbers,
    "tiny": numbers | st.floats(-1e-10, 1e-10),
    "flat": numbers,
    "words": lists,
    "past": lists,
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_graph_gives_the_encoders_ids_and_numbers(kind: str, data: st.DataObject) -> None:
    rows, _ = ENCODERS[kind]
    row = st.fixed_dictionaries({name: COLUMNS[name] for name in rows.spec.columns})
    given_rows = data.draw(st.lists(row, min_size=1, max_size=6))
    wanted = rows.rows(given_rows)
    found = dict(zip(inputs(rows), GRAPHS[kind].run(None, RawRows(rows.spec).tensors(given_rows)), strict=True))
    np.testing.assert_array_equal(found["ids"], wanted.ids)
    if wanted.values is not None:
        np.testing.assert_allclose(found["values"], wanted.values, rtol=3e-7, atol=2e-7)
    for g, (events, length) in enumerate(wanted.lists):
        np.testing.assert_array_equal(found[f"length_{g}"], length)
        longest = events.shape[1]
        np.testing.assert_array_equal(found[f"list_{g}"][:, :longest], events)
        assert (found[f"list_{g}"][:, longest:] == NULL_ID).all()


@pytest.fixture(scope="module")
def predictor(whole: Path) -> Predictor:
    return load(whole)


@pytest.fixture(scope="module")
def graph(predictor: Predictor) -> onnxruntime.InferenceSession:
    return session(RawGraphs(predictor.bundle, normalized=True).whole())


def scores(graph: onnxruntime.InferenceSession, feeds: dict[str, Any]) -> dict[str, Any]:
    names = ("logit", "probability", "clipped")
    return dict(zip(names, graph.run(names, feeds), strict=True))


def close(found: dict[str, Any], predictor: Predictor, rows: Any) -> None:
    wanted = predictor.predict(rows)
    for t, task in enumerate(predictor.tasks):
        assert np.abs(found["probability"][:, t] - wanted.probability[task]).max() <= 3e-8
        np.testing.assert_array_equal(found["logit"][:, t], wanted.logit[task])
    assert found["clipped"].tolist() == [0] * len(rows)


def test_golden_rows_get_the_predictors_scores(predictor: Predictor, graph: onnxruntime.InferenceSession) -> None:
    rows = predictor.bundle.lines("golden/requests.jsonl")
    tensors = RawRows(predictor.spec).tensors(rows)
    assert {value.name for value in graph.get_inputs()} == set(tensors)
    whole = scores(graph, tensors)
    close(whole, predictor, rows)
    assert np.ptp(whole["logit"]) > 0.1
    for at in (0, 1, 17):
        close(scores(graph, RawRows(predictor.spec).tensors(rows[at : at + 1])), predictor, rows[at : at + 1])


RAW_ROWS = st.fixed_dictionaries(
    {
        "user": wholes,
        "item": st.none() | st.sampled_from([f"i{n}" for n in range(33)]) | st.text(max_size=4),
        "shop": st.none() | st.sampled_from([f"s{n}" for n in range(12)]) | st.text(max_size=4),
        "city": st.none()
        | st.sampled_from(["Köln", " PARIS", "paris\n", "東京", "", "Ko\u0308ln"])
        | st.text(max_size=4),
        "price": st.none() | st.floats(-1e3, 1e3),
        "age": st.none() | st.floats(-10, 80),
        "tags": st.none() | st.lists(st.sampled_from(["t0", "t1", "t4", "t9", None]), max_size=6),
        "past": st.lists(st.tuples(st.sampled_from(["i0", "i3", "i99", None]), st.sampled_from(["s0", "s8", "?"]))),
    }
).map(lambda row: {**row, "past": [i for i, _ in row["past"]], "past_shop": [s for _, s in row["past"]]})


@given(rows=st.lists(RAW_ROWS, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_rows_get_the_predictors_scores(
    predictor: Predictor, graph: onnxruntime.InferenceSession, rows: list[Any]
) -> None:
    close(scores(graph, RawRows(predictor.spec).tensors(rows)), predictor, rows)


def test_only_the_events_within_the_length_count(predictor: Predictor, graph: onnxruntime.InferenceSession) -> None:
    rows = made.LOGS.drop("click", "buy").to_dicts()[:40]
    tensors = RawRows(predictor.spec).tensors(rows)
    wide = dict(tensors)
    for name in ("past", "past_shop"):
        more = np.full((40, 9), "i3" if name == "past" else "s3", dtype=object)
        wide[name] = np.concatenate([tensors[name], more], axis=1)  # [40, 6 + 9]
    lengths = tensors["clicks.length"][:, 0]
    for row, n in enumerate(lengths):
        for name in ("past", "past_shop"):
            wide[name][row, n:] = more[0, 0]
    found = scores(graph, wide)
    close(found, predictor, rows)
    shorter = {**tensors, "clicks.length": np.maximum(tensors["clicks.length"] - 1, 0)}
    assert np.abs(scores(graph, shorter)["logit"] - found["logit"]).max() > 1e-3
    longest = tensors["past"].shape[1]
    for wrong in (-1, longest + 1, 2**62, -(2**62)):
        length = tensors["clicks.length"].copy()
        length[7] = wrong
        assert scores(graph, {**tensors, "clicks.length": length})["clipped"].tolist() == [0] * 7 + [1] + [0] * 32


CURVES = {
    "temperature": Curve("temperature", 1.7),
    "platt": Curve("platt", 1.7, -0.3),
    "isotonic": Curve("isotonic", logits=(-0.5, 0.0, 0.1, 0.7), probabilities=(0.1, 0.2, 0.2, 0.9)),
    "one_point": Curve("isotonic", logits=(0.0,), probabilities=(0.4,)),
}


def test_probabilities_are_calibrated_in_the_graph(tmp_path: Path) -> None:
    labels = {"plain": "click", **dict.fromkeys(CURVES, "buy")}
    calibration = Calibration({"plain": Curve(), **CURVES})
    made.write(tmp_path / "bundle", {**made.DATA, "label": labels}, {**made.MODEL, "interaction": "fm"}, calibration)
    predictor = load(tmp_path / "bundle")
    graphs = RawGraphs(predictor.bundle, normalized=True)
    rows = predictor.bundle.lines("golden/requests.jsonl")
    close(scores(session(graphs.whole()), RawRows(graphs.spec).tensors(rows)), predictor, rows)
    encoded = predictor.feeds(predictor.encoder.rows(rows))
    close(scores(session(graphs.scorer()), encoded), predictor, rows)
    wanted = predictor.predict(rows)
    for task in CURVES:
        assert np.abs(wanted.probability[task] - 1 / (1 + np.exp(-wanted.logit[task]))).max() > 0.05


def test_a_graph_tells_what_it_is(predictor: Predictor) -> None:
    graphs = RawGraphs(predictor.bundle, null="?!", normalized=True)
    model = onnx.load_model_from_string(graphs.whole())
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["bundle"] == predictor.id
    assert '"text": "?!"' in props["missing"]
    assert graphs.whole() == graphs.whole()
    assert graphs.scorer() == predictor.bundle.read("model.onnx")
    row = {**made.LOGS.row(3, named=True), "shop": None}
    sent = RawRows(graphs.spec, "?!").tensors([row])
    assert sent["shop"].tolist() == [["?!"]]
    close(scores(session(model), sent), predictor, [row])


def refusal(block: dict[str, Any], **options: Any) -> str:
    rows, tables = parts(block)
    with pytest.raises(ExportError) as refused:
        RawEncoder(rows.spec, tables, inputs(rows), **options)
    return str(refused.value)


def test_what_no_graph_can_do_is_refused() -> None:
    hashed = {"categorical": {"whole": {}, "word": {"hash_buckets": 8}}}
    assert refusal(hashed).startswith("word: hashed text, for which ONNX has no operators")
    assert refusal(KINDS["normalized"]).startswith("word: `normalize`, for which ONNX has no operators; say --normal")
    large = {"categorical": {"whole": {"null_values": [2**60]}}}
    assert refusal(large).startswith("whole: the missing value 1.15292e+18 is too large")
    assert refusal(KINDS["text"], null="ß") == (
        "word: 'ß', which shall mean missing, is a value of the vocabulary; choose another text with --null"
    )
    rows, tables = parts({"categorical": {"whole": {}}})
    tables["whole"] = {**tables["whole"], MISSING_INT: 99}
    with pytest.raises(ExportError, match=rf"whole: {MISSING_INT}, which shall mean missing, is a value"):
        RawEncoder(rows.spec, tables, inputs(rows))


@pytest.mark.parametrize("name", ["logit", "probability", "clipped"])
def test_a_column_with_the_name_of_an_output_is_refused(name: str) -> None:
    frame = FRAME.rename({"word": name})
    block = {"source": {}, "label": "y", "categorical": {name: {}}}
    spec = spec_of(Encoder.fit(frame.lazy(), DataConfig.model_validate(block)))
    with pytest.raises(ExportError, match=f"the column '{name}' has the name of an output"):
        RawEncoder(spec, {name: {}}, ["ids"])


def test_values_that_no_tensor_holds_are_refused() -> None:
    rows, _ = ENCODERS["int"]
    send = RawRows(rows.spec)
    with pytest.raises(RequestError, match=r"column 'whole': 1.5 is no whole number"):
        send.tensors([{"whole": 1.5}])
    with pytest.raises(RequestError, match=r"column 'whole': 'x' is no whole number"):
        send.tensors([{"whole": "x"}])
    with pytest.raises(RequestError, match=r"column 'whole': a whole number does not fit into int64"):
        send.tensors([{"whole": 2**63}])
    with pytest.raises(RequestError, match=r"column 'whole': there is no such column"):
        send.tensors([{}])
    assert send.tensors([{"whole": "?"}, {"whole": " 7"}])["whole"].tolist() == [[MISSING_INT], [7]]
    assert UNKNOWN_ID != NULL_ID


def test_the_command_needs_no_torch(whole: Path, tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("torch", "lightning", "pluggy", "polars", "onnxscript"):
    sys.modules[name] = None
from recsys.cli import main
sys.argv = ["recsys", "export", {str(whole)!r}, "--normalized", "--onnx", {str(tmp_path / "new" / "raw.onnx")!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bundle = open_bundle(whole)
    assert bundle.id in done.stdout
    assert (tmp_path / "new" / "raw.onnx").read_bytes() == RawGraphs(bundle, normalized=True).whole()
    done = subprocess.run([sys.executable, "-m", "recsys.cli", "export", str(whole)], capture_output=True, text=True)
    assert done.returncode == 1
    forms = "--onnx FILE, --triton DIR, --mlflow DIR, --kserve FILE, --sign FILE or --index LIBRARY"
    assert done.stderr == f"error: say what to write: {forms}\n"
