"""The encoder on disk: `encoder.json` and a Parquet file per vocabulary and copied field, each with its sha256."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ValidationError

from recsys.data.digest import sha256_of
from recsys.data.noise import Marginals
from recsys.data.numeric import NumericSpec
from recsys.data.schema import DataConfig
from recsys.data.values import STORED
from recsys.data.vocabulary import Buckets, Lookup, Vocabulary
from recsys.errors import DataError

VERSION = 2
"""Raised when the same raw rows would be encoded differently, or the files are laid out differently."""
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}")


def write(
    folder: Path,
    config: DataConfig,
    lookups: Mapping[str, Lookup],
    numerics: Mapping[str, NumericSpec],
    marginals: Marginals,
) -> None:
    """Write an encoder into `folder`."""
    vocabulary = folder / "vocabulary"
    vocabulary.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {}
    for number, (field, lookup) in enumerate(lookups.items()):
        if isinstance(lookup, Buckets):
            entries[field] = {"kind": lookup.kind, "buckets": lookup.size}
            continue
        entries[field] = {"kind": lookup.kind, **_store(vocabulary, field, number, lookup.values)}
    noise = folder / "noise"
    if marginals:
        noise.mkdir(exist_ok=True)
    body = {
        "version": VERSION,
        "config": config.model_dump(mode="json", exclude={"source", "dataset"}),
        "lookups": entries,
        "numerics": {name: asdict(spec) for name, spec in numerics.items()},
        "marginals": {
            field: _store(noise, field, number, pl.Series(known))
            for number, (field, known) in enumerate(marginals.items())
        },
    }
    text = json.dumps(body, indent=1, ensure_ascii=False)
    (folder / "encoder.json").write_text(text, encoding="utf-8")


def _store(folder: Path, field: str, number: int, values: pl.Series) -> dict[str, str]:
    """Write the values of a field, and return where they are."""
    path = folder / f"{field if _PLAIN.fullmatch(field) else f'field-{number}'}.parquet"
    values.alias("value").to_frame().write_parquet(path)
    return {"file": path.name, "sha256": sha256_of(path)}


def read(folder: Path) -> tuple[DataConfig, dict[str, Lookup], dict[str, NumericSpec], Marginals]:
    """Read an encoder from `folder`.

    Raises:
        DataError: a file is missing, unreadable, of another version, or altered since it was written.
    """
    path = folder / "encoder.json"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["version"] != VERSION:
            raise DataError(f"{path}: written by version {body['version']} of the encoder; this is version {VERSION}")
        config = DataConfig.model_validate({**body["config"], "source": {}})
        lookups = {field: _lookup(folder / "vocabulary", entry) for field, entry in body["lookups"].items()}
        numerics = {n: NumericSpec(**{**s, "bounds": tuple(s["bounds"])}) for n, s in body["numerics"].items()}
        marginals = {
            f: _stored(folder / "noise", entry, "copied field").to_numpy()
            for f, entry in body.get("marginals", {}).items()
        }
        for planted in config.noise_inputs():
            if planted.kind == "copy" and planted.of not in marginals:
                raise ValueError(f"how often {planted.of!r} has each value is missing")
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{path}: not a readable encoder: {error}") from error
    return config, lookups, numerics, marginals


def _lookup(folder: Path, entry: Mapping[str, Any]) -> Lookup:
    kind = entry["kind"]
    if kind not in STORED:
        raise ValueError(f"unknown kind {kind!r}")
    if entry.get("file") is None:
        return Buckets(kind, int(entry["buckets"]))
    values = _stored(folder, entry, "vocabulary")
    if values.dtype != STORED[kind]:
        raise DataError(f"{folder / entry['file']}: holds {values.dtype}, expected {STORED[kind]}")
    return Vocabulary(kind, values)


def _stored(folder: Path, entry: Mapping[str, Any], what: str) -> pl.Series:
    """Read what `_store` wrote."""
    name = entry["file"]
    path = folder / str(name)
    if path.name != name:
        raise ValueError(f"{name!r} is no plain file name")
    if sha256_of(path) != entry["sha256"]:
        raise DataError(f"{path}: the {what} was altered after it was written (sha256 differs)")
    return pl.read_parquet(path)["value"]
