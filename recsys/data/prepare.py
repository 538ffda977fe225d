"""From a recipe's data block to encoded splits on disk, made once per content of the recipe and of the files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from recsys.contracts import Source
from recsys.data import encoder_files
from recsys.data.encode import Encoder
from recsys.data.report import EncodeReport, SplitReport
from recsys.data.schema import DataConfig
from recsys.data.shard_files import VERSION
from recsys.data.shards import Shards, sync_folder, write_shards
from recsys.data.sources import Identified, Traceable, naming_file
from recsys.data.split import row_finder, scanned_as, split_frames
from recsys.errors import DataError

_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:12]

Progress = Callable[[str, int], None]
"""Called with what is being done and the rows done so far."""


@dataclass(frozen=True)
class Prepared:
    """Encoded data, ready to train on.

    Args:
        encoder: fitted on the train split.
        splits: `train` and, where there are any, `valid` and `test`.
        report: what encoding met.
        fingerprint: sha256 over the encoder and every encoded row; equal for equal data, wherever it lies.
        folder: where it is kept.
    """

    encoder: Encoder
    splits: Mapping[str, Shards]
    report: EncodeReport
    fingerprint: str
    folder: Path


def prepare(
    config: DataConfig, source: Source, cache: Path, *, verify: bool = True, progress: Progress | None = None
) -> Prepared:
    """Fit the encoder and encode every split, or reuse what the cache has for the same recipe, files and code.

    Safe when several processes do it at once: the first to finish provides the result.

    Args:
        config: the recipe's data block.
        source: the rows; one without `identity()` is encoded anew every time.
        cache: folder for encoded data.
        verify: compare checksums when reusing.
        progress: told about every block.

    Raises:
        DataError: the data cannot be used as the recipe says.
    """
    cache.mkdir(parents=True, exist_ok=True)
    key = _key(config, source)
    if key is None:
        folder = Path(tempfile.mkdtemp(prefix="uncached-", dir=cache))
        _build(config, source, folder, progress)
        return _load(folder)
    folder = cache / key
    if folder.is_dir():
        prepared = _load(folder)
        if verify:
            for shards in prepared.splits.values():
                shards.verify()
        return prepared
    _sweep(cache)
    temporary = Path(tempfile.mkdtemp(prefix=f".{_MACHINE}-{os.getpid()}-", dir=cache))
    try:
        _build(config, source, temporary, progress)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        sync_folder(cache)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _load(folder)


def _sweep(cache: Path) -> None:
    """Remove what processes of this machine left half written when they were killed."""
    for left in cache.glob(f".{_MACHINE}-*-*"):
        process = left.name.split("-")[1]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _key(config: DataConfig, source: Source) -> str | None:
    """Return the name of the cache entry, or None for a source that cannot say what its rows are."""
    if not isinstance(source, Identified):
        return None
    body = config.model_dump(mode="json", exclude={"dataset"})
    # In the recipe's order: it is that of the fields, and so of the model's weights.
    text = json.dumps([body, encoder_files.VERSION, VERSION, source.identity()], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _build(config: DataConfig, source: Source, folder: Path, progress: Progress | None) -> None:
    frames = split_frames(source, config.split)
    for name in frames:
        if isinstance(source, Traceable):
            source.require(scanned_as(source, config.split, name), config.columns())
    wheres = {name: row_finder(source, config.split, name, frame) for name, frame in frames.items()}
    known = frames["train"].collect_schema().names()
    report = EncodeReport(ignored=tuple(c for c in known if c not in config.columns()))
    if progress is not None:
        progress("learn vocabularies", 0)
    columns = config.columns()
    with naming_file(source, scanned_as(source, config.split, "train"), columns):
        encoder = Encoder.fit(frames["train"], config, where=wheres["train"])
    encoder.save(folder / "encoder")
    for name, frame in frames.items():
        counts = report.splits[name] = SplitReport()
        told = None if progress is None else partial(progress, f"encode {name}")
        what = f"the {name} split"
        with naming_file(source, scanned_as(source, config.split, name), columns):
            write_shards(encoder, frame, folder / name, report=counts, where=wheres[name], what=what, progress=told)
    report.warnings += _warnings(report)
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text, encoding="utf-8")


def _warnings(report: EncodeReport) -> list[str]:
    found = []
    for name, split in report.splits.items():
        for task, ones in split.positives.items():
            if ones in (0, split.rows):
                found.append(
                    f"{name}: label {task!r} is {int(ones > 0)} in all {split.rows} rows; "
                    "AUC and other rank metrics are undefined there"
                )
    return found


def _load(folder: Path) -> Prepared:
    encoder = Encoder.load(folder / "encoder")
    try:
        report = EncodeReport.from_json(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'report.json'}: not readable: {error}; delete {folder} to encode again") from error
    splits = {name: Shards.open(folder / name) for name in report.splits}
    digest = hashlib.sha256((folder / "encoder" / "encoder.json").read_bytes())
    for name, shards in splits.items():
        digest.update("\n".join([name, *shards.digests()]).encode())
    return Prepared(encoder, splits, report, digest.hexdigest(), folder)
