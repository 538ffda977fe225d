"""What is taken out of a graph changes no bit of what it says, and nothing else is taken out."""

from collections import Counter
from typing import Any

import made
import numpy as np
import onnx
import onnxruntime
import pytest

from recsys.deploy import graph
from recsys.deploy.golden import batch_of
from recsys.nn.model import Model

TASKS: dict[str, Any] = {**made.DATA, **made.LISTS, "label": {"click": "click", "buy": "buy"}}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "first-order weights": (made.DATA, {"head": {"wide": True}}),
    "lists and two tasks": (TASKS, {"head": {"wide": True}, "sequence": "din"}),
}


def inputs_of(encoder: Any, model: Model, names: list[str]) -> dict[str, Any]:
    """Encoded rows, a third of whose ids are out of range."""
    (block,) = encoder.transform(made.LOGS.lazy(), labels=False)
    batch = batch_of(encoder, block)
    arrays = [batch.ids, *([] if batch.values is None else [batch.values])]
    arrays += [part for pair in batch.history.values() for part in pair]
    random = np.random.default_rng(3)
    feeds = {}
    for name, tensor in zip(names, arrays, strict=True):
        array = tensor.numpy().copy()
        if name == "ids" or name.startswith("list"):
            wrong = random.random(array.shape) < 0.3
            array[wrong] = random.choice([-1, -(2**63), 10**6, 2**63 - 1], wrong.sum())
        feeds[name] = array
    return feeds


@pytest.mark.parametrize("case", MODELS)
def test_a_simpler_graph_says_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, options = MODELS[case]
    encoder = made.encoder_of(data)
    model = made.model_of(encoder, data, {**made.MODEL, **options})
    simple = graph.onnx_graph(model)
    monkeypatch.setattr(graph, "simplify", lambda _: None)
    whole = graph.onnx_graph(model)
    sessions = [onnxruntime.InferenceSession(g, providers=["CPUExecutionProvider"]) for g in (simple, whole)]
    names = [[value.name for value in s.get_outputs()] for s in sessions]
    assert names[0] == names[1] == list(graph.OUTPUTS)
    feeds = inputs_of(encoder, model, [value.name for value in sessions[0].get_inputs()])
    for one, other in zip(*(s.run(None, feeds) for s in sessions), strict=True):
        assert np.array_equal(one, other)
    onnx.checker.check_model(onnx.load_from_string(simple), full_check=True)
    found, before = (Counter(n.op_type for n in onnx.load_from_string(g).graph.node) for g in (simple, whole))
    guards = len(model.schema.histories) + 1
    assert before["Less"] >= 2 * guards  # each guard compares once, and lengths are compared too
    assert before["Less"] - found["Less"] >= guards
    one_task = len(model.schema.tasks) == 1
    assert before["Unsqueeze"] - found["Unsqueeze"] == int(one_task)


def written(*nodes: Any, initial: dict[str, Any], outputs: list[str]) -> Any:
    """The IR of a small graph over `x [N, 2]` int64 and `m [N, 1]` float32."""
    from onnx_ir import serde

    made_of = onnx.helper.make_graph(
        list(nodes),
        "small",
        [
            onnx.helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["N", 2]),
            onnx.helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, ["N", 1]),
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        [onnx.numpy_helper.from_array(np.array(value), name) for name, value in initial.items()],
    )
    return serde.deserialize_model(onnx.helper.make_model(made_of))


def guard(source: str, to: str, rows: str = "rows", fallback: str = "one") -> list[Any]:
    node = onnx.helper.make_node
    return [
        node("Less", [source, "zero"], [f"{to}_low"]),
        node("GreaterOrEqual", [source, rows], [f"{to}_high"]),
        node("Or", [f"{to}_low", f"{to}_high"], [f"{to}_out"]),
        node("Where", [f"{to}_out", fallback, source], [to]),
    ]


NUMBERS = {"zero": 0, "one": 1, "rows": [3, 4], "again": [3, 4], "fewer": [3, 3]}


@pytest.mark.parametrize(
    ("second", "left"),
    [
        (guard("a", "b"), 1),
        (guard("a", "b", rows="again"), 1),
        (guard("a", "b", rows="fewer"), 2),
        (guard("a", "b", fallback="zero"), 2),
        (guard("x", "b"), 2),
    ],
    ids=["the same", "an equal one", "another range", "another fallback", "side by side"],
)
def test_only_a_guard_behind_an_equal_one_is_taken_out(second: list[Any], left: int) -> None:
    end = onnx.helper.make_node("Add", ["a", "b"], ["y"])
    model = written(*guard("x", "a"), *second, end, initial=NUMBERS, outputs=["y"])
    graph.simplify(model)
    assert sum(n.op_type == "Where" for n in model.graph) == left


@pytest.mark.parametrize(("source", "left"), [("half", 0), ("m", 1)], ids=["made in the graph", "an input"])
def test_an_output_keeps_its_name(source: str, left: int) -> None:
    node = onnx.helper.make_node
    model = written(
        node("Mul", ["m", "m"], ["half"]),
        node("Gather", [source, "zero"], ["column"], axis=1),
        node("Unsqueeze", ["column", "first"], ["y"]),
        initial={"zero": 0, "first": [1]},
        outputs=["y"],
    )
    values = {v.name: v for n in model.graph for v in n.outputs}
    from onnx_ir import Shape

    values["half"].shape = Shape(["N", 1])
    graph.simplify(model)
    assert [v.name for v in model.graph.outputs] == ["y"]
    assert sum(n.op_type == "Unsqueeze" for n in model.graph) == left
