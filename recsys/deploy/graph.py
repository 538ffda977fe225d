"""The model as an ONNX graph: ids, numbers and lists to logits, probabilities, and how many ids were out of range."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from recsys.contracts import EncodedSchema
from recsys.deploy.operators import translations
from recsys.deploy.peephole import simplify
from recsys.errors import RecipeError
from recsys.nn.layout import Guard, Layout
from recsys.nn.model import Model

LARGEST = 1_900_000_000
"""Bytes of the largest graph: more would have to lie in other files, which a bundle does not have."""
_ROWS = 3
OUTPUTS = ("logit", "probability", "clipped")


class Graph(nn.Module):
    """A model whose inputs and outputs are plain tensors, in one order, each id within its own field's range.

    Inputs: ids `[B, F]` int64; values `[B, F]` float32, if the schema has numeric fields; for each history its ids
    `[B, L, K]` int64 and its length `[B]` int64.

    Outputs: logit `[B, T]` float32, probability `[B, T]` float32 (not calibrated), clipped `[B]` int64: how many ids
    (and lengths) of a row were out of range, and were read as unknown (or cut).
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        layout = Layout.of(model.schema)
        self.guard = Guard(layout.fields)
        self.guards: list[Guard] = [Guard(columns) for columns in layout.histories.values()]
        for i, guard in enumerate(self.guards):
            self.add_module(f"guard_{i}", guard)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        schema = self.model.schema
        ids, rest = inputs[0], list(inputs[1:])
        values = rest.pop(0) if schema.has_numeric else None
        clipped = self.guard.outside(ids).sum(1)  # [B]
        histories: dict[str, tuple[Tensor, Tensor]] = {}
        for i, history in enumerate(schema.histories):
            events, length = rest[2 * i], rest[2 * i + 1]
            clipped = clipped + self.guards[i].outside(events).sum((1, 2))
            longest = events.shape[1]
            clipped = clipped + ((length < 0) | (length > longest))
            histories[history.name] = (self.guards[i](events), length.clamp(0, longest))
        logits = self.model.logits(self.guard(ids), values, histories)
        logit = torch.stack([logits[task] for task in schema.tasks], 1)  # [B, T]
        return logit, logit.double().sigmoid().float(), clipped  # runtimes approximate the sigmoid of float32


def input_names(schema: EncodedSchema) -> list[str]:
    """Names of the graph's inputs; lists are numbered, for their names may be of any kind."""
    names = ["ids", "values"] if schema.has_numeric else ["ids"]
    for i in range(len(schema.histories)):
        names += [f"list_{i}", f"length_{i}"]
    return names


def onnx_graph(model: Model) -> bytes:
    """Return the model as ONNX; it stays as it is. Equal models give equal bytes.

    Raises:
        RecipeError: a part cannot be exported, or the graph would be too large.
    """
    program = program_of(model)
    with torch.no_grad(), _quietly():
        return _bytes(program, input_names(model.schema), OUTPUTS)


def program_of(model: Model) -> ExportedProgram:
    """Return the `Graph` of a model on the CPU, traced for any number of rows; the model stays as it is.

    Raises:
        RecipeError: a part cannot be exported.
    """
    device = next(model.parameters()).device
    graph = Graph(model if device.type == "cpu" else copy.deepcopy(model).cpu())
    was_training = graph.model.training
    graph.eval()
    try:
        with torch.no_grad(), _quietly():
            return _exported(graph, model.schema)
    finally:
        graph.model.train(was_training)


def onnx_of(module: nn.Module, schema: EncodedSchema, outputs: Sequence[str]) -> bytes:
    """Return a module that takes the inputs of `Graph`, on the CPU and in eval, as ONNX.

    Raises:
        RecipeError: as `onnx_graph`.
    """
    with torch.no_grad(), _quietly():
        return _bytes(_exported(module, schema), input_names(schema), outputs)


def _exported(graph: nn.Module, schema: EncodedSchema) -> ExportedProgram:
    batch = Dim("batch", min=1)
    ids = torch.zeros(_ROWS, len(schema.fields), dtype=torch.int64)
    inputs: list[Tensor] = [ids, torch.ones(ids.shape)] if schema.has_numeric else [ids]
    dynamic: list[dict[int, Any]] = [{0: batch} for _ in inputs]
    for i, history in enumerate(schema.histories):
        longest = min(2, history.max_length)
        inputs += [
            torch.zeros(_ROWS, longest, len(history.columns), dtype=torch.int64),
            torch.ones(_ROWS, dtype=torch.int64),
        ]
        some = {} if history.max_length < 2 else {1: Dim(f"events_{i}", min=1, max=history.max_length)}
        dynamic += [{0: batch, **some}, {0: batch}]
    try:
        return export(graph, tuple(inputs), dynamic_shapes=(tuple(dynamic),), strict=False)
    except Exception as error:
        raise RecipeError(f"the model cannot be exported as a graph: {_told(error)}") from error


def _bytes(program: ExportedProgram, names: list[str], outputs: Sequence[str]) -> bytes:
    try:
        found = torch.onnx.export(
            program,
            dynamo=True,
            optimize=True,
            verbose=False,
            input_names=names,
            output_names=list(outputs),
            custom_translation_table=translations(),
        )
    except Exception as error:
        raise RecipeError(f"the model cannot be written as ONNX: {_told(error)}") from error
    if found is None:
        raise RecipeError("the model cannot be written as ONNX")
    size = sum(t.nbytes for t in program.state_dict.values())
    if size > LARGEST:
        raise RecipeError(f"the model has {size:,} bytes; a bundle's graph holds at most {LARGEST:,}")
    simplify(found.model)
    # Where a node came from in the source is no business of those who serve it, and names the folders of this machine.
    for node in (found.model, found.model.graph, *found.model.graph.all_nodes()):
        part: Any = node
        part.metadata_props.clear()
        part.doc_string = None
    for value in (*found.model.graph.inputs, *found.model.graph.outputs, *found.model.graph.initializers.values()):
        value.metadata_props.clear()
    return bytes(found.model_proto.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporter's remarks about packages that are not there, and about itself, from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _told(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("- ")]
    told = next((line for line in lines if line.startswith("<class")), lines[0] if lines else "")
    return f"{type(error).__name__}: {told}"
