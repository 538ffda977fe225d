"""The fixed 64-bit hash of raw values: the same on every machine, in every version, for ever.

Anything that depends on a hash and outlives a process (hash buckets, hashed splits, group ids) uses these
functions; Polars' and Python's own hashes change between versions or processes.

Integers (and booleans as 0 and 1) hash as `mix(x)`, x being the two's complement in 64 bits and `mix` the
finaliser of splitmix64 after its increment:

    z = x + 0x9E3779B97F4A7C15
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ^ z >> 27) * 0x94D049BB133111EB
    mix(x) = z ^ z >> 31                            (all modulo 2^64)

Text hashes by its UTF-8 bytes, padded with zero bytes to little-endian 64-bit words w_0 … w_{k-1}:

    hash = mix(number of bytes + sum_i mix(w_i ^ mix(i)))

The words may be summed in any order, which is what makes the hash quick on whole columns. The integer 12 and
the text "12" hash differently: a column must keep its type between training and serving, or be cast first.

Source of the mixer: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from recsys.data.splitmix import U64, hash_text, mix, mix_array

__all__ = ["U64", "hash_series", "hash_text", "mix", "mix_array"]

_CHUNK = 65_536
"""Texts hashed at once; bounds the temporary arrays."""


def hash_series(values: pl.Series) -> U64:
    """Return the hash of every value, `[n]` uint64. Nulls hash to 0; other types hash as their text.

    Args:
        values: any column; integers and booleans hash as integers, everything else by its Polars cast to text.
    """
    present = values.is_not_null().to_numpy()
    if values.dtype.is_integer() or values.dtype == pl.Boolean:
        whole = values.cast(pl.UInt8) if values.dtype == pl.Boolean else values
        hashed = mix_array(whole.fill_null(0).to_numpy())
    else:
        texts = values.cast(pl.String).fill_null("")
        parts = [_hash_texts(texts.slice(at, _CHUNK)) for at in range(0, len(texts), _CHUNK)]
        hashed = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    return np.where(present, hashed, np.uint64(0))


def _hash_texts(texts: pl.Series) -> U64:
    """Hash texts without nulls: scatter their bytes into zero-padded words, mix the words, sum them per text."""
    size = texts.str.len_bytes().to_numpy().astype(np.int64)  # [n]
    raw = np.frombuffer("".join(texts.to_list()).encode(), np.uint8)  # [total bytes]
    count = (size + 7) // 8  # [n] words per text
    first = np.cumsum(count) - count
    shift = first * 8 - (np.cumsum(size) - size)  # where a text's bytes move to, relative to where they are
    padded = np.zeros(int(count.sum()) * 8, np.uint8)
    padded[np.arange(len(raw)) + np.repeat(shift, size)] = raw
    position = np.arange(int(count.sum())) - np.repeat(first, count)
    mixed = mix_array(padded.view("<u8") ^ mix_array(position))
    total = np.zeros(len(size), np.uint64)
    full = count > 0
    if len(mixed):
        total[full] = np.add.reduceat(mixed, first[full])
    return mix_array(total + size.astype(np.uint64))
