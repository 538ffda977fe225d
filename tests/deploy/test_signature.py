"""A key says who made a bundle: only what it signed is taken."""

import hashlib
import hmac
import json
import sys
from pathlib import Path

import made
import pytest

from recsys import cli
from recsys.deploy.bundle import MANIFEST, seal
from recsys.deploy.predictor import load
from recsys.deploy.signature import SIGNATURE, read_key
from recsys.errors import BundleError, RecsysError

KEY = b"k" * 32


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["recsys", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def test_only_what_the_key_signed_is_taken(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY + b"\n")
    with pytest.raises(BundleError, match=r"SIGNATURE: missing; the bundle was not signed"):
        load(copy, key=KEY)
    assert run(monkeypatch, "verify", copy, "--key-file", key) == 1
    assert run(monkeypatch, "export", copy, "--sign", key) in (0, None)
    digest = hmac.new(KEY, (copy / MANIFEST).read_bytes(), hashlib.sha256).hexdigest()
    assert (copy / SIGNATURE).read_text() == f"hmac-sha256 {digest}\n"
    assert run(monkeypatch, "verify", copy, "--key-file", key) in (0, None)
    assert load(copy, key=KEY).id == load(copy).id
    with pytest.raises(BundleError, match="not the signature of this bundle by this key"):
        load(copy, key=b"x" * 32)


def test_a_new_manifest_needs_a_new_signature(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write the folder can make its hashes right, but not sign it."""
    key = tmp_path / "key"
    key.write_bytes(KEY)
    assert run(monkeypatch, "export", copy, "--sign", key) in (0, None)
    body = json.loads((copy / MANIFEST).read_bytes())
    (copy / MANIFEST).write_bytes(seal({**body, "metrics": {"test": {"auc": 0.99}}}))
    load(copy)
    with pytest.raises(BundleError, match="not the signature"):
        load(copy, key=KEY)
    made.write(tmp_path / "other", model={**made.MODEL, "interaction": "fm"})
    (tmp_path / "other" / SIGNATURE).write_bytes((copy / SIGNATURE).read_bytes())
    with pytest.raises(BundleError, match="not the signature"):
        load(tmp_path / "other", key=KEY)
    for wrong in (b"", b"hmac-sha256 \n", b"\xff" * 10_000):
        (copy / SIGNATURE).write_bytes(wrong)
        with pytest.raises(BundleError, match="not the signature"):
            load(copy, key=KEY)


def test_keys_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RecsysError, match="no key can be read"):
        read_key(tmp_path / "nowhere")
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(RecsysError, match="a key of 6 bytes; it has at least 32"):
        read_key(tmp_path / "short")
