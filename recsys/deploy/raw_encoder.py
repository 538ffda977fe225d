"""The encoder of a bundle as an ONNX graph: raw columns to the inputs of the model's graph, as `RowEncoder` reads them.

A tensor has no null. A text is missing where it is the text agreed on, a whole number where it is the least of its
type (the largest, if it has no sign), and a number where it is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx import ModelProto

from recsys.contracts import FIRST_ID, NULL_ID, NUMERIC_VALUE_ID, UNKNOWN_ID
from recsys.data.limits import LARGEST
from recsys.deploy.nodes import DOUBLE, FLOAT, INT64, ML, STRING, UINT64, Nodes
from recsys.deploy.raw_rows import MISSING_INT, MISSING_UINT, NULL, length_input
from recsys.deploy.spec import EncoderSpec, IdColumn, ListGroup, NumberColumn
from recsys.deploy.values import Tokens
from recsys.errors import ExportError, listing

Tables = Mapping[str, Mapping[Any, int] | None]
_TYPES = {"int": INT64, "uint": UINT64, "text": STRING}
_GAMMA, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_NOT_SMALLER = 2**53


class RawEncoder:
    """Writes the graph of an encoder.

    Args:
        spec: of the bundle.
        tables: vocabulary → value → id; None for hash buckets.
        names: of the inputs of the model's graph, in its order.
        null: the text that means missing.
        normalized: whether texts come already normalised, where the recipe normalises them.

    Raises:
        ExportError: ONNX has no operators for what a column needs, or a missing value could be mistaken for a value.
    """

    def __init__(
        self, spec: EncoderSpec, tables: Tables, names: list[str], *, null: str = NULL, normalized: bool = False
    ) -> None:
        self._spec = spec
        self._tables = tables
        self._names = names
        self._null = null
        self._nodes = Nodes("encoder/")
        _check(spec, normalized)
        _check_missing(spec, tables, null)

    def model(self, like: ModelProto) -> ModelProto:
        """Return the graph, of the versions of the model's graph."""
        names = list(self._names)
        fields = len(self._spec.ids) + len(self._spec.numbers)
        ids = [self._ids(c, self._nodes.input(c.column, self._type(c), ["B", 1])) for c in self._spec.ids]
        number_ids, values = self._numbers()
        ids += [number_ids] if number_ids else []
        self._nodes.output(names.pop(0), INT64, ["B", fields], self._joined(ids, 1))
        if self._spec.has_values:
            self._nodes.output(names.pop(0), FLOAT, ["B", fields], self._values(values))
        for g, group in enumerate(self._spec.lists):
            events, length = self._group(group, f"L{g}")
            self._nodes.output(names.pop(0), INT64, ["B", f"M{g}", len(group.columns)], events)
            self._nodes.output(names.pop(0), INT64, ["B"], length)
        return self._nodes.model("encoder", like)

    def _type(self, column: IdColumn) -> int:
        return _TYPES[self._spec.vocabularies[column.vocabulary].kind]

    def _joined(self, values: list[str], axis: int) -> str:
        return values[0] if len(values) == 1 else self._nodes.add("Concat", values, {"axis": axis})

    def _ids(self, column: IdColumn, value: str) -> str:
        """Raw values of any shape to ids of the same shape."""
        vocabulary, table = self._spec.vocabularies[column.vocabulary], self._tables[column.vocabulary]
        tokens = Tokens(column.null_values)
        if vocabulary.kind == "text":
            texts = dict.fromkeys([*sorted(tokens.texts), self._null], NULL_ID)
            return self._encoded(value, "keys_strings", {**(table or {}), **texts}, UNKNOWN_ID)
        if vocabulary.kind == "uint":
            value = self._nodes.cast(value, INT64)  # the same 64 bits
        lost = MISSING_UINT if vocabulary.kind == "uint" else MISSING_INT
        missing = {_signed(int(n)): NULL_ID for n in sorted(tokens.numbers) if n == n // 1} | {_signed(lost): NULL_ID}
        if table is not None:
            known = {_signed(key): at for key, at in table.items()} | missing
            return self._encoded(value, "keys_int64s", known, UNKNOWN_ID)
        found = self._encoded(value, "keys_int64s", missing, UNKNOWN_ID)
        is_missing = self._nodes.add("Equal", [found, self._nodes.int64(NULL_ID)])
        return self._nodes.add("Where", [is_missing, found, self._bucket(value, vocabulary.size)])

    def _encoded(self, value: str, keys: str, known: Mapping[Any, int], default: int) -> str:
        attributes = {keys: list(known), "values_int64s": list(known.values()), "default_int64": default}
        return self._nodes.add("LabelEncoder", [value], attributes, ML)

    def _bucket(self, value: str, buckets: int) -> str:
        """Splitmix64, as `recsys.data.splitmix` has it."""
        nodes = self._nodes

        def number(n: int) -> str:
            return nodes.constant(n, "uint64")

        def folded(z: str, bits: int) -> str:
            return nodes.add("BitwiseXor", [z, nodes.add("BitShift", [z, number(bits)], {"direction": "RIGHT"})])

        z = nodes.add("Add", [nodes.cast(value, UINT64), number(_GAMMA)])
        z = nodes.add("Mul", [folded(z, 30), number(_MUL1)])
        z = nodes.add("Mul", [folded(z, 27), number(_MUL2)])
        rest = nodes.cast(nodes.add("Mod", [folded(z, 31), number(buckets)]), INT64)
        return nodes.add("Add", [rest, nodes.int64(FIRST_ID)])

    def _numbers(self) -> tuple[str, list[str]]:
        """The ids of all numbers `[B, N]`, empty if there are none, and the values of each `[B, 1]`."""
        ids: list[str] = []
        values: list[str] = []
        nodes = self._nodes
        null, one = nodes.int64(NULL_ID), nodes.double(1.0)
        for column in self._spec.numbers:
            x = nodes.input(column.column, DOUBLE, ["B", 1])
            present = self._present(column, x)
            at = self._bucket_of(column, x) if column.transform == "quantile" else nodes.int64(NUMERIC_VALUE_ID)
            ids.append(nodes.add("Where", [present, at, null]))
            y = one if column.transform == "quantile" else self._scaled(column, x)
            values.append(nodes.cast(nodes.add("Where", [present, y, one]), FLOAT))
        return (self._joined(ids, 1) if ids else ""), values

    def _present(self, column: NumberColumn, x: str) -> str:
        nodes = self._nodes
        present = nodes.add("LessOrEqual", [nodes.add("Abs", [x]), nodes.double(LARGEST)])  # NaN is not
        tokens = sorted(Tokens(column.null_values).numbers)
        if tokens:
            lost = nodes.any_of([nodes.add("Equal", [x, nodes.double(n)]) for n in tokens])
            present = nodes.add("And", [present, nodes.add("Not", [lost])])
        return present

    def _bucket_of(self, column: NumberColumn, x: str) -> str:
        """The number of bounds that are not above, `[B, 1] -> [B, 1]`."""
        nodes = self._nodes
        if not column.bounds:
            return nodes.int64(FIRST_ID)
        passed = nodes.cast(nodes.add("GreaterOrEqual", [x, nodes.double(column.bounds)]), INT64)  # [B, bounds]
        total = nodes.add("ReduceSum", [passed, nodes.int64([1])], {"keepdims": 1})
        return nodes.add("Add", [total, nodes.int64(FIRST_ID)])

    def _scaled(self, column: NumberColumn, x: str) -> str:
        nodes = self._nodes
        if column.transform == "log":
            x = nodes.add("Mul", [nodes.add("Sign", [x]), self._log1p(nodes.add("Abs", [x]))])
        x = nodes.add("Div", [nodes.add("Sub", [x, nodes.double(column.mean)]), nodes.double(column.scale)])
        return nodes.add("Clip", [x, nodes.double(-LARGEST), nodes.double(LARGEST)])

    def _log1p(self, x: str) -> str:
        """log(1 + x), exact for small x too: with u = 1 + x as rounded, log(u) · x / (u - 1), or x where u is 1."""
        nodes = self._nodes
        u = nodes.add("Add", [x, nodes.double(1.0)])
        rounded = nodes.add("Sub", [u, nodes.double(1.0)])
        grown = nodes.add("Mul", [nodes.add("Log", [u]), nodes.add("Div", [x, rounded])])
        return nodes.add("Where", [nodes.add("Equal", [rounded, nodes.double(0.0)]), x, grown])

    def _values(self, values: list[str]) -> str:
        """A one for every id, then the numbers, `[B, F]`."""
        if not self._spec.ids:
            return self._joined(values, 1)
        nodes = self._nodes
        rows = nodes.add("Shape", [values[0]], {"start": 0, "end": 1})
        shape = nodes.add("Concat", [rows, nodes.int64([len(self._spec.ids)])], {"axis": 0})
        ones = nodes.add("Expand", [nodes.constant([1.0], "float32"), shape])
        return self._joined([ones, *values], 1)

    def _group(self, group: ListGroup, longest: str) -> tuple[str, str]:
        """`(ids [B, M, K], length [B])` with M = min(L, max_length): the last events of each row, from the left."""
        nodes = self._nodes
        columns = [nodes.input(c.column, self._type(c), ["B", longest]) for c in group.columns]
        length = nodes.input(length_input(group), INT64, ["B", 1])
        given = nodes.add("Shape", [columns[0]], {"start": 1, "end": 2})  # [1]
        most = nodes.int64([group.max_length])
        kept = nodes.add("Min", [given, most])
        inside = nodes.add("Min", [length, kept])  # [B, 1]
        wrong = nodes.add("Greater", [length, given])
        # A length beyond the list stays one, for the model's graph counts those.
        told = nodes.add("Where", [wrong, nodes.add("Add", [kept, nodes.int64([1])]), inside])
        dropped = nodes.add("Max", [nodes.add("Sub", [nodes.add("Min", [length, given]), most]), nodes.int64([0])])
        squeeze = nodes.int64([0])
        scalar = nodes.add("Squeeze", [kept, squeeze])
        steps = nodes.add("Range", [nodes.int64(0), scalar, nodes.int64(1)])  # [M]
        last = nodes.add("Sub", [given, nodes.int64([1])])
        at = nodes.add("Min", [nodes.add("Add", [dropped, steps]), last])  # [B, M]
        live = nodes.add("Less", [steps, inside])  # [B, M]
        parts = []
        for column, value in zip(group.columns, columns, strict=True):
            ids = nodes.add("GatherElements", [self._ids(column, value), at], {"axis": 1})
            ids = nodes.add("Where", [live, ids, nodes.int64(NULL_ID)])
            parts.append(nodes.add("Unsqueeze", [ids, nodes.int64([2])]))
        return self._joined(parts, 2), nodes.add("Squeeze", [told, nodes.int64([1])])


def _check(spec: EncoderSpec, normalized: bool) -> None:
    columns = [*spec.ids, *(c for group in spec.lists for c in group.columns)]
    hashed = [
        c.column
        for c in columns
        if spec.vocabularies[c.vocabulary].kind == "text" and spec.vocabularies[c.vocabulary].file is None
    ]
    if hashed:
        raise ExportError(
            f"{listing(hashed)}: hashed text, for which ONNX has no operators; use a vocabulary, "
            "or serve the bundle itself, which hashes"
        )
    changed = [c.column for c in columns if c.normalize and spec.vocabularies[c.vocabulary].kind == "text"]
    if changed and not normalized:
        raise ExportError(
            f"{listing(changed)}: `normalize`, for which ONNX has no operators; "
            "say --normalized if those who ask send such texts normalised"
        )
    for column in columns:
        vague = [n for n in Tokens(column.null_values).numbers if abs(n) >= _NOT_SMALLER]
        if vague and spec.vocabularies[column.vocabulary].kind != "text":
            raise ExportError(f"{column.column}: the missing value {vague[0]:g} is too large to be told from others")
    names = [*spec.columns, *(length_input(group) for group in spec.lists)]
    taken = {"logit", "probability", "clipped"} & set(names)
    if taken:
        raise ExportError(f"the column {min(taken)!r} has the name of an output; rename it")
    if len(set(names)) != len(names):
        raise ExportError(f"two inputs would have one name: {listing(n for n in names if names.count(n) > 1)}")


def _check_missing(spec: EncoderSpec, tables: Tables, null: str) -> None:
    """Refuse a mark for missing values that is itself a value."""
    marks: dict[str, Any] = {"text": null, "int": MISSING_INT, "uint": MISSING_UINT}
    for name, vocabulary in spec.vocabularies.items():
        mark = marks[vocabulary.kind]
        if mark in (tables[name] or {}):
            hint = "; choose another text with --null" if vocabulary.kind == "text" else ""
            raise ExportError(f"{name}: {mark!r}, which shall mean missing, is a value of the vocabulary{hint}")


def _signed(number: int) -> int:
    """The int64 of the same 64 bits."""
    return number - 2**64 if number >= 2**63 else number
