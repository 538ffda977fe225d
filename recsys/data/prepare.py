"""From a recipe's data block to encoded splits on disk, made once per content of the recipe and of the files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from recsys.contracts import Source
from recsys.data import encoder_files
from recsys.data.encode import Encoder
from recsys.data.encode_pass import EncodePass, groups, write_quarantine
from recsys.data.reading import RawRows
from recsys.data.report import EncodeReport
from recsys.data.schema import DataConfig
from recsys.data.shard_files import VERSION, sync_folder
from recsys.data.shards import Shards
from recsys.data.sources import Digested, Identified, Requiring
from recsys.data.split import split_rows
from recsys.errors import DataError

_PARTIAL = ".partial-"
_KEEP_SECONDS = 7 * 24 * 3600
_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:12]

Progress = Callable[[str, int], None]
"""Called with what is being done and the raw rows of the source done so far."""


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
    config: DataConfig,
    source: Source,
    cache: Path,
    *,
    verify: bool = True,
    strict: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Fit the encoder and encode every split, or reuse what the cache has for the same recipe, files and code.

    Encoding that was broken off goes on where it was. Safe when several processes do it at once: one encodes, the
    others wait for it.

    Args:
        config: the recipe's data block.
        source: the rows; one without `identity()` is encoded anew every time.
        cache: folder for encoded data.
        verify: compare checksums when reusing.
        strict: tell files apart by all of their bytes, not by size, time and samples; later calls without it then
            find what this one did.
        progress: told about every block.

    Raises:
        DataError: the data cannot be used as the recipe says.
    """
    cache.mkdir(parents=True, exist_ok=True)
    _sweep(cache)
    key = _key(config, source, strict)
    plain = _key(config, source, strict=False) if strict else None
    if key is None:
        folder = Path(tempfile.mkdtemp(prefix=f"uncached-{_MACHINE}-{os.getpid()}-", dir=cache))
        _build(config, source, folder, progress)
        return _load(folder)
    folder = cache / key
    if not folder.is_dir():
        with _alone(cache / f".{key}.lock"):
            if not folder.is_dir():
                _build_whole(config, source, cache / f"{_PARTIAL}{key}", folder, progress)
                verify = False  # it was written just now
    prepared = _load(folder)
    if verify:
        for shards in prepared.splits.values():
            shards.verify()
    if plain is not None and plain != key:
        _point(cache / plain, folder)
    return prepared


def _point(entry: Path, folder: Path) -> None:
    """Let what was told apart by every byte be found by size, time and samples too, in place of what was there."""
    if entry.is_dir() and entry.resolve() == folder.resolve():
        return
    link = entry.with_name(f".link-{_MACHINE}-{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    if entry.is_dir() and not entry.is_symlink():
        stale = entry.with_name(f"{_PARTIAL}stale-{_MACHINE}-{os.getpid()}")
        entry.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)
    link.replace(entry)


def _build_whole(config: DataConfig, source: Source, partial: Path, folder: Path, progress: Progress | None) -> None:
    partial.mkdir(exist_ok=True)
    try:
        _build(config, source, partial, progress)
    except _Unusable:
        shutil.rmtree(partial)
        partial.mkdir()
        _build(config, source, partial, progress)
    except DataError as error:
        if not isinstance(error.__cause__, OSError):  # the same again next time, if nothing is changed
            shutil.rmtree(partial)
        raise
    except OSError as error:
        raise DataError(
            f"{partial}: cannot be written: {error.strerror or error}; what is encoded stays, encoding again goes on"
        ) from error
    partial.rename(folder)
    sync_folder(folder.parent)


class _Unusable(Exception):
    """What an earlier process left cannot be gone on with."""


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process of this machine holds the lock; the system frees it when its holder dies."""
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
            except FileNotFoundError:
                held = False
            if not held:  # the holder before us has removed the file that we waited for
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _sweep(cache: Path) -> None:
    """Remove what can be of no more use: encoded data of processes that are gone, and old broken-off encoding."""
    for left in cache.glob(f"uncached-{_MACHINE}-*-*"):
        process = left.name.split("-")[2]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    for left in cache.glob(f"{_PARTIAL}*"):
        if time.time() - left.stat().st_mtime > _KEEP_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def _key(config: DataConfig, source: Source, strict: bool) -> str | None:
    """Return the name of the cache entry, or None for a source that cannot say what its rows are."""
    if not isinstance(source, Identified):
        return None
    body = config.model_dump(mode="json", exclude={"dataset"})
    identity = source.content() if strict and isinstance(source, Digested) else source.identity()
    # In the recipe's order: it is that of the fields, and so of the model's weights.
    text = json.dumps([body, encoder_files.VERSION, VERSION, identity], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _build(config: DataConfig, source: Source, folder: Path, progress: Progress | None) -> None:
    splits = split_rows(source, config.split, rows=config.batch_rows)
    if isinstance(source, Requiring):
        for name in dict.fromkeys(rows.scanned for rows in splits.values()):
            source.require(name, config.columns())
    encoder = _encoder(config, splits["train"], folder / "encoder", progress)
    report = EncodeReport(ignored=tuple(c for c in splits["train"].schema.names() if c not in config.columns()))
    passes = []
    for members in groups(splits):
        try:
            work = EncodePass(encoder, members, folder)
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            raise _Unusable from error
        told = None if progress is None else partial(progress, f"encode {', '.join(members)}")
        report.splits |= work.run(told)
        passes.append(work)
    report.splits = {name: report.splits[name] for name in splits}
    write_quarantine(folder, passes)
    report.warnings += _warnings(report)
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text, encoding="utf-8")
    for left in folder.glob(".pass-*"):
        shutil.rmtree(left)


def _encoder(config: DataConfig, train: RawRows, folder: Path, progress: Progress | None) -> Encoder:
    """Return the encoder that an earlier process has fitted, or fit it."""
    if folder.is_dir():
        try:
            return Encoder.load(folder)
        except DataError as error:
            raise _Unusable from error
    encoder = Encoder.fit(train, config, progress=None if progress is None else partial(progress, "learn vocabularies"))
    temporary = folder.with_name(".encoder")
    shutil.rmtree(temporary, ignore_errors=True)
    encoder.save(temporary)
    temporary.rename(folder)
    return encoder


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
