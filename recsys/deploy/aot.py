"""Scores raw rows with the native code of a bundle, where there is some; needs torch, onnxruntime and your trust.

    from recsys.deploy import aot

    predictor = aot.load("runs/mine/bundle", allow_executable=True)
    predictor.predict({"user": "u17", "item": 4, "price": 9.5}).probability

Such a package is a program: whoever wrote it can do what you can do. Hashes tell that it is the one that was written,
a signature by a key tells by whom. Nothing else in this package loads it.
"""

from __future__ import annotations

import io
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from recsys.deploy import predictor as graphs
from recsys.deploy.bundle import COMPILED, REQUESTS, Bundle
from recsys.deploy.predictor import Predictor
from recsys.deploy.spec import EncoderSpec
from recsys.errors import BundleError, RequestError

Array = npt.NDArray[Any]


def load(bundle: str | os.PathLike[str], *, allow_executable: bool = False, key: bytes | None = None) -> Predictor:
    """Return a predictor that scores with native code, and has proven itself.

    The code is loaded only after every file was compared with its hash and the graph has given its golden answers. It
    must then give the same. Its threads are those of torch (`torch.set_num_threads`).

    Args:
        bundle: folder that the stage `export` wrote with `aot: true`.
        allow_executable: that code from this folder may run in this process.
        key: that must have signed the bundle; None asks for no signature.

    Raises:
        BundleError: as `recsys.deploy.predictor.load`; or running code is not allowed, there is none, it is for another
            kind of machine, or its scores are not those of the graph.
    """
    if not allow_executable:
        raise BundleError(
            f"{bundle}: {COMPILED} is a program that would run with all of your rights; `allow_executable=True` if you "
            "trust whoever wrote it, `recsys.deploy.predictor.load` otherwise"
        )
    plain = graphs.load(bundle, key=key)
    folder = plain.bundle.folder
    marked = plain.bundle.manifest["executable"] or {}
    if COMPILED not in marked:
        raise BundleError(f"{folder}: has no {COMPILED}; the stage `export` writes it with `aot: true`")
    _check_machine(marked[COMPILED], f"{folder / COMPILED}")
    fast = plain.through(Compiled(_package(plain.bundle), inputs_of(plain.spec, plain.inputs), len(plain.tasks)))
    fast.check_golden()
    _compare(plain, fast)
    return fast


@dataclass(frozen=True)
class Input:
    """What native code takes under a name.

    Args:
        kind: type of its numbers.
        rest: sizes of its dimensions after the rows, each with the smallest and the largest.
    """

    kind: npt.DTypeLike
    rest: tuple[tuple[int, int], ...] = ()

    def takes(self, array: Array) -> bool:
        """Whether an array is of this type and of such sizes."""
        sizes = zip(self.rest, array.shape[1:], strict=False)
        known = array.dtype == self.kind and array.ndim == 1 + len(self.rest)
        return known and all(least <= size <= most for (least, most), size in sizes)

    def __str__(self) -> str:
        sizes = [str(most) if least == most else f"{least} to {most}" for least, most in self.rest]
        return f"{np.dtype(self.kind)} [{', '.join(['B', *sizes])}]"


@dataclass(frozen=True)
class Compiled:
    """Native code behind a check of what it is given: itself, it reads any memory as the type and size it expects.

    Args:
        package: tensors in the order of `inputs`, to logit, probability and clipped.
        inputs: by name.
        tasks: T.
    """

    package: Callable[..., Sequence[Any]]
    inputs: Mapping[str, Input]
    tasks: int

    def __call__(self, feeds: Mapping[str, Array]) -> tuple[Array, Array]:
        """Name of an input → array, to logit `[B, T]` float32 and clipped `[B]` int64.

        Raises:
            RequestError: an input is missing, or not of its type or shape.
        """
        import torch

        arrays = self._checked(feeds)
        if not len(arrays[0]):
            return np.empty((0, self.tasks), np.float32), np.empty(0, np.int64)
        logit, _, clipped = self.package(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
        return logit.numpy(), clipped.numpy()

    def _checked(self, feeds: Mapping[str, Array]) -> list[Array]:
        arrays: list[Array] = []
        for name, wanted in self.inputs.items():
            array = feeds.get(name)
            if not isinstance(array, np.ndarray):
                raise RequestError(f"the input {name!r} is {type(array).__name__}; it must be an array {wanted}")
            if not wanted.takes(array):
                raise RequestError(f"the input {name!r} is {array.dtype} {list(array.shape)}; it must be {wanted}")
            arrays.append(array)
            if len(array) != len(arrays[0]):
                first = next(iter(self.inputs))
                raise RequestError(f"the input {name!r} has {len(array)} rows, but {first!r} has {len(arrays[0])}")
        return arrays


def inputs_of(spec: EncoderSpec, names: Sequence[str]) -> dict[str, Input]:
    """Return what a graph takes: ids, numbers, and for each group of lists its ids and lengths."""
    fields = len(spec.ids) + len(spec.numbers)
    kinds = [Input(np.int64, ((fields, fields),))]
    kinds += [Input(np.float32, ((fields, fields),))] if spec.has_values else []
    for group in spec.lists:
        columns = len(group.columns)
        kinds += [Input(np.int64, ((1, group.max_length), (columns, columns))), Input(np.int64)]
    return dict(zip(names, kinds, strict=True))


def _check_machine(about: Mapping[str, Any], where: str) -> None:
    """Refuse code that this machine cannot run, before it ends the process."""
    try:
        import torch
    except ImportError:
        raise BundleError(
            f"{where}: needs torch {about['torch']}, which is not installed; the graph does not"
        ) from None
    here = {"torch": torch.__version__, "platform": sys.platform, "machine": platform.machine()}
    for name, value in here.items():
        if about[name].split("+")[0] != value.split("+")[0]:
            raise BundleError(f"{where}: was compiled for {name} {about[name]}; this is {value}. Export it here")
    able = torch.cpu.get_capabilities()
    short = {"avx512": "avx512_f"}
    missing = [n for n in about["processor"] if able.get(short.get(n, n), True) is False]
    if missing:
        raise BundleError(
            f"{where}: was compiled for processors with {', '.join(missing)}; this has none. Export it here"
        )


def _package(bundle: Bundle) -> Callable[..., Sequence[Any]]:
    from torch._inductor import aoti_load_package

    content = bundle.read(COMPILED)  # compared with its hash again: what is loaded is what was compared
    try:
        found: Callable[..., Sequence[Any]] = aoti_load_package(io.BytesIO(content))
    except Exception as error:  # the loader has no common class of errors
        raise BundleError(f"{bundle.folder / COMPILED}: torch cannot load it: {error}") from None
    return found


def _compare(plain: Predictor, fast: Predictor) -> None:
    """Refuse code that does not give the scores of the graph for the golden rows."""
    rows = plain.bundle.lines(REQUESTS)
    tolerance = float(plain.bundle.manifest["tolerance"])
    one, two = plain.predict(rows), fast.predict(rows)
    for task in plain.tasks:
        gap = np.abs(one.probability[task] - two.probability[task])
        at = int(gap.argmax())
        if not gap[at] <= tolerance or (one.clipped != two.clipped).any():
            raise BundleError(
                f"{plain.bundle.folder / COMPILED}: golden row {at + 1} gets the probability "
                f"{two.probability[task][at]:.9f} for {task!r}, the graph says {one.probability[task][at]:.9f}"
            )
