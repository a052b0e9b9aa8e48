"""Payloads that nobody without a key can write, or read: signing (HMAC-SHA256) and encryption (AES-256-GCM).

A key is a name and a secret. The first key writes, all of them read, which is how keys are rotated. A sealed payload's
type ends in `;sig=NAME` or `;enc=NAME`, and that type is sealed with the bytes: a signed pickle can't be passed off as
JSON. Each purpose has a key of its own, derived from the secret; each encrypted payload has one too, from a random
salt, so that no number of payloads wears a key out.
"""

from __future__ import annotations

import hmac
import importlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from durable.errors import ConfigError, PayloadSignatureError
from durable.instance import Payload

MIN_SECRET = 32
"""Characters that a secret has at least."""
_KEY = re.compile(r"([a-z0-9_-]{1,32}):(.+)", re.DOTALL)
_TAG = 32
_SALT = 16
_NONCE = bytes(12)  # each payload's key is used once


def parse_keys(name: str, entries: Sequence[str]) -> dict[str, str]:
    """Return key name -> secret, in order, of `name:secret` entries. Raises ConfigError, which never shows a secret."""
    keys: dict[str, str] = {}
    for index, entry in enumerate(entries, 1):
        match = _KEY.fullmatch(entry)
        if match is None:
            raise ConfigError(f"{name}: key {index} must be NAME:SECRET, its name 1 to 32 of a-z, 0-9, '_', '-'")
        if len(match[2]) < MIN_SECRET:
            raise ConfigError(
                f"{name}: the secret of key {match[1]!r} must be at least {MIN_SECRET} characters; "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one"
            )
        if match[1] in keys:
            raise ConfigError(f"{name}: there are two keys {match[1]!r}")
        keys[match[1]] = match[2]
    return keys


class Sealer:
    """Seals payloads with the first key, opens those of any.

    keys             key name -> secret
    encrypt          whether payloads are encrypted, too; needs the extra `encryption`
    accept_unsigned  whether payloads that nobody sealed are opened as they are
    Raises ConfigError when the library for encryption is missing.
    """

    def __init__(self, keys: Mapping[str, str], *, encrypt: bool = False, accept_unsigned: bool = False) -> None:
        if encrypt and not keys:
            raise ConfigError("payload_encryption needs a key in payload_keys")
        self._sign = {name: _derived(secret, b"durable sign 1") for name, secret in keys.items()}
        self._encrypt = {name: _derived(secret, b"durable encrypt 1") for name, secret in keys.items()}
        self._writer = next(iter(keys), None)
        self._encrypting = encrypt
        self.accepts_unsigned = accept_unsigned or not keys
        self._aes: Any
        self._invalid: type[Exception]
        self._aes, self._invalid = _aes() if encrypt else (None, ValueError)

    @classmethod
    def of(cls, keys: Sequence[str], encrypt: bool, accept_unsigned: bool) -> Sealer:
        """Return the one of an app's settings. Raises ConfigError."""
        return cls(parse_keys("payload_keys", keys), encrypt=encrypt, accept_unsigned=accept_unsigned)

    def seal(self, payload: Payload) -> Payload:
        """Return a payload as it is stored."""
        if self._writer is None:
            return payload
        if not self._encrypting:
            kind = f"{payload.type};sig={self._writer}"
            return Payload(kind, _tag(self._sign[self._writer], kind, payload.body) + payload.body)
        kind, salt = f"{payload.type};enc={self._writer}", os.urandom(_SALT)
        cipher = self._aes(hmac.digest(self._encrypt[self._writer], salt, "sha256"))
        return Payload(kind, salt + cipher.encrypt(_NONCE, payload.body, kind.encode()))

    def open(self, kind: str, body: bytes, what: str) -> Payload:
        """Return a payload as it was before it was sealed.

        Raises PayloadSignatureError, with nothing of it decoded, when it is not what somebody with a key wrote.
        """
        plain, separator, seal = kind.partition(";")
        if not separator:
            if not self.accepts_unsigned:
                raise PayloadSignatureError(
                    f"{what} is not signed, and payload_keys is set; it was not loaded (accept_unsigned=True loads it)"
                )
            return Payload(kind, body)
        how, _, name = seal.partition("=")
        keys = {"sig": self._sign, "enc": self._encrypt}.get(how, {})
        if name not in keys:
            raise PayloadSignatureError(f"{what} is sealed with {seal!r}, a key that payload_keys doesn't hold")
        opened = self._verified(keys[name], kind, body) if how == "sig" else self._decrypted(keys[name], kind, body)
        if opened is None:
            raise PayloadSignatureError(f"{what} has a wrong signature ({seal!r}); it was not loaded")
        return Payload(plain, opened)

    def _verified(self, key: bytes, kind: str, body: bytes) -> bytes | None:
        tag, data = body[:_TAG], body[_TAG:]
        return data if hmac.compare_digest(tag, _tag(key, kind, data)) else None

    def _decrypted(self, key: bytes, kind: str, body: bytes) -> bytes | None:
        if self._aes is None:
            self._aes, self._invalid = _aes()
        salt, data = body[:_SALT], body[_SALT:]
        try:
            opened: bytes = self._aes(hmac.digest(key, salt, "sha256")).decrypt(_NONCE, data, kind.encode())
        except self._invalid:
            return None
        return opened


def _derived(secret: str, purpose: bytes) -> bytes:
    return hmac.digest(secret.encode(), purpose, "sha256")


def _tag(key: bytes, kind: str, data: bytes) -> bytes:
    # The type holds no NUL, so that no other pair of type and bytes gives the same text.
    return hmac.digest(key, kind.encode() + b"\0" + data, "sha256")


def _aes() -> tuple[Any, type[Exception]]:
    """Return the cipher, and what it raises for bytes that were changed."""
    try:
        cipher = importlib.import_module("cryptography.hazmat.primitives.ciphers.aead").AESGCM
        return cipher, importlib.import_module("cryptography.exceptions").InvalidTag
    except ImportError as error:
        raise ConfigError("encrypted payloads need cryptography; pip install 'durable-pg[encryption]'") from error
