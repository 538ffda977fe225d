"""Items to retrieve by the largest scores: an index of their vectors, and a graph that makes a row's vector.

recsys export runs/mine --index usearch --items item --out items

index.usearch    vectors of the items under their numbers; inner product
items.json       raw values of the items, in the order of their numbers
user.onnx        the bundle's encoded inputs to the vector of a row
retrieval.json   the bundle's id, hashes of the other files, and what was measured
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.deploy.bundle import parse
from recsys.deploy.graph_check import check_graph
from recsys.deploy.predictor import Predictor
from recsys.errors import BundleError, ExportError

FACTS, ITEMS, USER, INDEX = "retrieval.json", "items.json", "user.onnx", "index.usearch"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """An item that was retrieved.

    Args:
        item: its raw value.
        score: its logit, but for a number that all items of the row share.
    """

    item: Any
    score: float


def write_index(
    folder: Path,
    bundle: str,
    fields: Sequence[str],
    items: Sequence[Any],
    vectors: npt.NDArray[np.float32],
    user: bytes,
    gap: float,
) -> None:
    """Write an index into a new folder.

    Args:
        folder: to be made.
        bundle: id of the bundle whose encoder the graph of rows follows.
        fields: the item's; the first is its id.
        items: their raw ids.
        vectors: `[I, W]`.
        user: the graph of rows.
        gap: what the two sides differ from the model by.

    Raises:
        ExportError: the folder is there, or there is no item.
    """
    from usearch.index import Index

    if folder.exists():
        raise ExportError(f"{folder}: exists; remove it, or choose another --out")
    if not len(items):
        raise ExportError("there is no item to put into the index")
    index = Index(
        ndim=vectors.shape[1], metric="ip", dtype="f32", connectivity=32, expansion_add=200, expansion_search=200
    )
    index.add(np.arange(len(items), dtype=np.uint64), vectors, threads=1)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    index.save(str(draft / INDEX))
    (draft / ITEMS).write_text(json.dumps(list(items), ensure_ascii=False) + "\n", encoding="utf-8")
    (draft / USER).write_bytes(user)
    files = {name: hashlib.sha256((draft / name).read_bytes()).hexdigest() for name in (INDEX, ITEMS, USER)}
    facts = {
        "bundle": bundle,
        "fields": list(fields),
        "items": len(items),
        "width": int(vectors.shape[1]),
        "gap": gap,
        "files": files,
    }
    (draft / FACTS).write_text(json.dumps(facts, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.rename(draft, folder)


class Retriever:
    """Finds the items with the largest scores for raw rows; needs onnxruntime and usearch.

    Args:
        predictor: of the bundle that the index was made with; it encodes rows.
        folder: of the index.

    Raises:
        BundleError: a file is missing or altered, or the index belongs to another bundle.
    """

    def __init__(self, predictor: Predictor, folder: Path) -> None:
        import onnxruntime
        from usearch.index import Index

        path = folder / FACTS
        facts = parse(_content(path), path)
        if not isinstance(facts, dict) or not isinstance(facts.get("files"), dict):
            raise BundleError(f"{path}: not what describes an index")
        if facts.get("bundle") != predictor.id:
            raise BundleError(f"{folder}: an index of bundle {facts.get('bundle')}, not of {predictor.id}")
        content = {name: _content(folder / name) for name in (INDEX, ITEMS, USER)}
        for name, found in content.items():
            if hashlib.sha256(found).hexdigest() != facts["files"].get(name):
                raise BundleError(f"{folder / name}: altered after the index was written")
        check_graph(content[USER], str(folder / USER))
        self._predictor = predictor
        self._items = parse(content[ITEMS], folder / ITEMS)
        self._session = onnxruntime.InferenceSession(content[USER], providers=["CPUExecutionProvider"])
        self._names = {value.name for value in self._session.get_inputs()}
        index = Index.restore(content[INDEX])
        if index is None:
            raise BundleError(f"{folder / INDEX}: not an index")
        self._index = index
        self._own = dict.fromkeys(facts["fields"])

    def vectors(self, rows: Sequence[Row]) -> npt.NDArray[np.float32]:
        """Return the vectors of rows, `[B, W]`; the item's fields need not be there.

        Raises:
            RequestError: another column is missing, or a value cannot be read.
        """
        encoded = self._predictor.encoder.rows([{**self._own, **row} for row in rows])
        feeds = self._predictor.feeds(encoded)
        found: npt.NDArray[np.float32] = self._session.run(
            ["vector"], {name: array for name, array in feeds.items() if name in self._names}
        )[0]
        return found

    def top(self, rows: Sequence[Row], count: int, *, exact: bool = False) -> list[list[Found]]:
        """Return the items with the largest scores of each row, best first.

        Args:
            rows: raw rows.
            count: items for each.
            exact: compare with every item instead of following the index.
        """
        matches = self._index.search(self.vectors(rows), count, exact=exact)
        keys = np.atleast_2d(matches.keys).tolist()
        scores = (1.0 - np.atleast_2d(matches.distances).astype(np.float64)).tolist()
        return [
            [Found(self._items[key], score) for key, score in zip(near, far, strict=True)]
            for near, far in zip(keys, scores, strict=True)
        ]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from None
