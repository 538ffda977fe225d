"""Scores raw rows with a bundle; needs onnxruntime and NumPy, and nothing that training needs.

    from recsys.deploy.predictor import load

    predictor = load("runs/mine/bundle")
    predictor.predict({"user": "u17", "item": 4, "price": 9.5}).probability

`load` compares every file with its hash, refuses what is unsafe, and scores the bundle's golden rows; only a model that
gives the answers it was exported with is returned.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from recsys.contracts import FIRST_ID
from recsys.deploy.bundle import (
    CALIBRATION,
    COLUMNS,
    ENCODER,
    GRAPH,
    REQUESTS,
    RESPONSES,
    WARMUP,
    Bundle,
    open_bundle,
)
from recsys.deploy.calibration import Calibration
from recsys.deploy.encode import Encoded, Row, RowEncoder
from recsys.deploy.explain import Explanation, explain
from recsys.deploy.spec import EncoderSpec, Vocabulary
from recsys.errors import BundleError, RecsysError, RequestError

if TYPE_CHECKING:
    import polars as pl

Floats = npt.NDArray[np.float64]
OUTPUTS = ("logit", "clipped")
"""What is asked of the graph: probabilities are computed from logits in double precision."""
Run = Callable[[Mapping[str, npt.NDArray[Any]]], Sequence[npt.NDArray[Any]]]
"""Name of an input → array, to logit `[B, T]` float32 and clipped `[B]` int64."""
_CHUNK = 4096
"""Rows scored at once, at most; bounds the memory of a large frame."""
_RUN = 128
"""Rows of one run of the graph, for each of its threads: what lies between its operators then stays in the cache."""
_SINGLY_CHECKED = 16


@dataclass(frozen=True)
class Scores:
    """What the model says of `B` rows.

    Args:
        logit: task → `[B]` float64.
        probability: task → `[B]` float64 in [0, 1]; calibrated, where the bundle says so.
        clipped: `[B]` int64, ids that were outside of their field's range; none, unless inputs were made elsewhere.
    """

    logit: Mapping[str, Floats]
    probability: Mapping[str, Floats]
    clipped: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.clipped)


class Predictor:
    """A loaded bundle; `load` makes one. Safe to use from several threads at once.

    Args:
        bundle: whose files were verified.
        threads: that one request may use.
    """

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        self.bundle = bundle
        self.spec = EncoderSpec.of_json(bundle.read(ENCODER).decode(), str(bundle.folder / ENCODER))
        self.encoder = RowEncoder(self.spec, tables_of(bundle, self.spec))
        self.calibration = Calibration.of_json(bundle.json(CALIBRATION), self.tasks)
        self._session = _session(bundle.read(GRAPH), threads, bundle.folder / GRAPH)
        self._inputs = self._graph_inputs()
        self._rows = _RUN * max(threads, 1)
        self._logits: Run = lambda feeds: self._session.run(OUTPUTS, feeds)

    def through(self, run: Run) -> Predictor:
        """Return a predictor of the same bundle that asks something else than its graph for logits."""
        other = copy.copy(self)
        other._logits = run
        return other

    @property
    def id(self) -> str:
        """The bundle's id."""
        return self.bundle.id

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of what is predicted."""
        return self.spec.tasks

    @property
    def columns(self) -> tuple[str, ...]:
        """Names that every row must have; a value may be null."""
        return self.spec.columns

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in the order of what is encoded."""
        return tuple(self._inputs)

    @property
    def schema(self) -> Mapping[str, Any]:
        """The content of `schema.json`: types, limits, and what the columns looked like in training."""
        return dict(self.bundle.json(COLUMNS))

    def predict(self, rows: Row | Sequence[Row] | pl.DataFrame) -> Scores:
        """Score raw rows: one mapping of column and value, a list of them, or a Polars frame.

        Columns that the model does not read are ignored. Values that training never saw count as unknown.

        Raises:
            RequestError: a column is missing, a value cannot be read, or a score is not finite.
        """
        if isinstance(rows, Mapping):
            return self.score(self.encoder.rows([rows]))
        table: Any = rows
        encode: Callable[[Any], Encoded]
        if isinstance(rows, list | tuple):
            encode = self.encoder.rows
        elif type(rows).__module__.split(".")[0] == "polars":
            encode = self.encoder.frame
        else:
            raise RequestError(f"rows are {type(rows).__name__}; expected a mapping, a list of them, or a Polars frame")
        parts = []
        for first in range(0, max(len(table), 1), _CHUNK):
            try:
                parts.append(self.score(encode(table[first : first + _CHUNK])))
            except RequestError as error:
                raise error.after(first) from None
        return parts[0] if len(parts) == 1 else together(parts)

    def explain(self, rows: Row | Sequence[Row]) -> Explanation:
        """Tell what each column of raw rows does to its score, by leaving it out.

        Raises:
            RequestError: as `predict`.
        """
        given = [rows] if isinstance(rows, Mapping) else rows
        return explain(self.spec, self.encoder.rows(given), lambda encoded: self.score(encoded).logit)

    def feeds(self, encoded: Encoded) -> dict[str, npt.NDArray[Any]]:
        """Return encoded rows under the names of the graph's inputs."""
        arrays: list[npt.NDArray[Any]] = [encoded.ids]
        arrays += [] if encoded.values is None else [encoded.values]
        arrays += [array for pair in encoded.lists for array in pair]
        return dict(zip(self._inputs, arrays, strict=True))

    def score(self, encoded: Encoded) -> Scores:
        """Score encoded rows, as `encoder.rows` and `encoder.frame` give them.

        Raises:
            RequestError: a score is not finite.
        """
        logits, clipped = self._run(self.feeds(encoded), len(encoded.ids))
        logits = logits.astype(np.float64)
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0]) + 1
            raise RequestError("the score is not finite; are its numbers far too large?", row=row)
        logit = {task: logits[:, t] for t, task in enumerate(self.tasks)}
        return Scores(logit, self.calibration.probabilities(logit), clipped)

    def _run(self, feeds: Mapping[str, npt.NDArray[Any]], rows: int) -> Sequence[npt.NDArray[Any]]:
        """Logits and clipped ids of all rows, some at a time."""
        if rows <= self._rows:
            return self._logits(feeds)
        starts = range(0, rows, self._rows)
        runs = [self._logits({n: v[at : at + self._rows] for n, v in feeds.items()}) for at in starts]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]

    def warm_up(self) -> None:
        """Score the rows that the bundle brings for this, so that the first request is as quick as the others."""
        rows = self.bundle.lines(WARMUP)
        for size in (1, len(rows)):
            self.predict(rows[:size])

    def check_golden(self) -> float:
        """Score the golden rows, together and one by one, and return the largest difference to the golden scores.

        Raises:
            BundleError: a difference is above the bundle's tolerance.
        """
        rows, wanted = self.bundle.lines(REQUESTS), self.bundle.lines(RESPONSES)
        tolerance = float(self.bundle.manifest["tolerance"])
        if len(rows) != len(wanted) or not rows:
            raise BundleError(f"{self.bundle.folder}: {len(rows)} golden requests, but {len(wanted)} responses")
        try:
            whole = self.predict(rows)
            worst = self._compared(whole, wanted, tolerance)
            for at in np.linspace(0, len(rows) - 1, min(_SINGLY_CHECKED, len(rows)), dtype=int).tolist():
                worst = max(worst, self._compared(self.predict(rows[at]), wanted[at : at + 1], tolerance, at))
        except RequestError as error:
            raise BundleError(f"{self.bundle.folder / REQUESTS}: {error}") from None
        return worst

    def _compared(self, scores: Scores, wanted: Sequence[Any], tolerance: float, first: int = 0) -> float:
        worst = 0.0
        for task in self.tasks:
            for got, key in ((scores.probability, "probability"), (_sigmoids(scores.logit), "uncalibrated")):
                expected = np.array([float(w[key][task]) for w in wanted])
                gap = np.abs(got[task] - expected)
                at = int(gap.argmax())
                worst = max(worst, float(gap[at]))
                if not gap[at] <= tolerance:
                    raise BundleError(
                        f"{self.bundle.folder}: golden row {first + at + 1} gets the {key} {got[task][at]:.9f} for "
                        f"{task!r}, its answer is {expected[at]:.9f} (tolerance {tolerance:g})"
                    )
        return worst

    def _graph_inputs(self) -> list[str]:
        """Names of the graph's inputs, in the order of what is encoded."""
        names = [i.name for i in self._session.get_inputs()]
        expected = 1 + self.spec.has_values + 2 * len(self.spec.lists)
        known = {output.name for output in self._session.get_outputs()}
        if len(names) != expected or not set(OUTPUTS) <= known:
            raise BundleError(f"{self.bundle.folder / GRAPH}: its inputs or outputs are not those of {ENCODER}")
        return names


def load(
    bundle: str | os.PathLike[str], *, threads: int = 1, check: bool = True, key: bytes | None = None
) -> Predictor:
    """Return a predictor that has proven itself.

    Args:
        bundle: folder that the stage `export` wrote.
        threads: that one request may use.
        check: score the golden rows first; leave this on.
        key: that must have signed the bundle; None asks for no signature.

    Raises:
        BundleError: a file is missing, altered or unsafe, or a golden row does not get its score.
    """
    predictor = Predictor(open_bundle(Path(bundle), key=key), threads=threads)
    if check:
        predictor.check_golden()
    return predictor


def tables_of(bundle: Bundle, spec: EncoderSpec) -> dict[str, dict[Any, int] | None]:
    """Return vocabulary → value → id; None for hash buckets.

    Raises:
        BundleError: a vocabulary is not that of the encoder.
    """
    largest = max((v.size for v in spec.vocabularies.values() if v.file is not None), default=0)
    ids = list(range(FIRST_ID, FIRST_ID + largest))  # one object for each id: less memory, and more of it in the cache
    return {name: _table(bundle, name, vocabulary, ids) for name, vocabulary in spec.vocabularies.items()}


def _table(bundle: Bundle, name: str, vocabulary: Vocabulary, ids: Sequence[int]) -> dict[Any, int] | None:
    """Value → id, or None for hash buckets."""
    if vocabulary.file is None:
        return None
    values = bundle.json(vocabulary.file)
    table: dict[Any, int] = dict(zip(values, ids, strict=False)) if isinstance(values, list) else {}
    if len(table) != vocabulary.size or len(values) != vocabulary.size:
        raise BundleError(f"{bundle.folder / vocabulary.file}: not the {vocabulary.size:,} values of {name!r}")
    return table


def _session(content: bytes, threads: int, path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has no common class of errors
        raise BundleError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it: {error}") from None


def together(parts: Sequence[Scores]) -> Scores:
    """Return the scores of all parts, one after the other."""
    tasks = tuple(parts[0].logit)
    return Scores(
        {task: np.concatenate([p.logit[task] for p in parts]) for task in tasks},
        {task: np.concatenate([p.probability[task] for p in parts]) for task in tasks},
        np.concatenate([p.clipped for p in parts]),
    )


def _sigmoids(logit: Mapping[str, Floats]) -> dict[str, Floats]:
    return Calibration.none(tuple(logit)).probabilities(logit)


__all__ = ["BundleError", "Predictor", "RecsysError", "RequestError", "Scores", "load"]
