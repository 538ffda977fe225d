"""The proof that a bundle comes from who has the key: HMAC-SHA256 over its manifest, which has the hash of all else.

Hashes say that a bundle is whole, not who made it: whoever can write the folder can write a new manifest. A key that
only writers and servers of bundles have closes that gap.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from recsys.errors import BundleError, RecsysError

SIGNATURE = "SIGNATURE"
"""The file beside the manifest, which does not list it."""
_SCHEME = "hmac-sha256"
_SHORTEST = 32


def read_key(path: Path) -> bytes:
    """Return the key in a file: all of its bytes, without white space at the end.

    Raises:
        RecsysError: there is none, or it is too short.
    """
    try:
        key = path.read_bytes().rstrip()
    except OSError as error:
        raise RecsysError(f"{path}: no key can be read from it ({error.strerror})") from None
    if len(key) < _SHORTEST:
        raise RecsysError(
            f"{path}: a key of {len(key)} bytes; it has at least {_SHORTEST}: openssl rand -hex 32 > {path.name}"
        )
    return key


def text_of(manifest: bytes, key: bytes) -> str:
    """Return what the file holds for a manifest."""
    return f"{_SCHEME} {hmac.new(key, manifest, hashlib.sha256).hexdigest()}\n"


def check_signature(path: Path, manifest: bytes, key: bytes) -> None:
    """Raise a `BundleError` unless the file is the key's signature of the manifest."""
    try:
        with path.open("rb") as file:
            found = file.read(200)
    except OSError:
        raise BundleError(f"{path}: missing; the bundle was not signed, and the key asks for it") from None
    if not hmac.compare_digest(found, text_of(manifest, key).encode()):
        raise BundleError(f"{path}: not the signature of this bundle by this key")
