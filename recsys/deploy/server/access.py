"""Who may ask: tokens, compared in a time that tells nothing of them."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from recsys.deploy.server.limits import Refused
from recsys.errors import RecsysError

_SHORTEST = 16


class Token:
    """A secret that a client sends as `Authorization: Bearer TOKEN`.

    Only a digest of it is kept, so that no message, log or dump can show it.

    Args:
        secret: as the client sends it.
    """

    def __init__(self, secret: str) -> None:
        self._digest = hashlib.sha256(secret.encode()).digest()

    def __repr__(self) -> str:
        return "Token(…)"

    @classmethod
    def of_file(cls, path: Path) -> Token:
        """Read a token from the first line of a file.

        Raises:
            RecsysError: there is none, or it is short enough to be guessed.
        """
        try:
            secret = path.read_text(encoding="utf-8").split("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RecsysError(f"{path}: no token can be read from it ({error})") from None
        if len(secret) < _SHORTEST or not secret.isascii() or not secret.isprintable() or " " in secret:
            raise RecsysError(f"{path}: a token is one line of at least {_SHORTEST} ASCII characters without spaces")
        return cls(secret)

    def check(self, header: bytes | None) -> None:
        """Raise `Refused` (401) unless a header `Authorization` holds the token."""
        scheme, _, given = (header or b"").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        same = hmac.compare_digest(digest, self._digest)
        if header is None:
            raise Refused(401, "a token is needed: `Authorization: Bearer TOKEN`")
        if scheme.lower() != b"bearer" or not same:
            raise Refused(401, "the token is not valid")
