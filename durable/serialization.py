"""Payloads: Python values to bytes and back, through kombu's serializer and compression registries, JSON by msgspec.

The only importer of kombu. A payload's type is a serializer's name, or `serializer+compression`; the reader's
`accept_content` decides what may be loaded, never the writer. JSON is checked before it is written, since
`json.dumps` would quietly write NaN, lone surrogates, NUL and merged keys that Postgres or a reader then refuses.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from kombu import compression as kombu_compression
from kombu import serialization as kombu_serialization
from kombu.utils import json as kombu_json

from durable import interruption
from durable.errors import ConfigError, CorruptRowError, PayloadError, PayloadTooLargeError
from durable.instance import Payload
from durable.outcomes import SoftTimeLimitExceeded
from durable.sealing import Sealer
from durable.validation import near, shown

_MARK = frozenset({"__type__", "__value__"})
"""The keys of the dict that stands for a value of a type JSON lacks, when kombu writes it."""


class _JSONEncoder(kombu_json.JSONEncoder):  # type: ignore[misc]
    def default(self, value: Any) -> Any:
        # kombu writes bytes as text where it can, and so a NUL that jsonb refuses.
        if isinstance(value, bytes):
            return {"__type__": "base64", "__value__": base64.b64encode(value).decode()}
        return super().default(value)


# kombu builds a JSON encoder and a decoder per call; made once, the same two are four times faster. What has no types
# but JSON's own goes through msgspec, which is faster by as much again.
_json_encode: Callable[[Any], str] = _JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_json_decode = json.JSONDecoder(object_hook=kombu_json.object_hook).decode
_plain_json_encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode
_plain_json_decode = msgspec.json.Decoder().decode

MAX_DEPTH = 100
COMPRESS_FROM = 1024
"""Payloads shorter than this many bytes are never compressed: they would not get smaller."""


class Codec:
    """Encodes with one serializer, decodes what `accept_content` lists."""

    def __init__(
        self,
        serializer: str = "json",
        accept_content: Iterable[str] = ("json", "msgpack"),
        compression: str | None = None,
        max_bytes: int = 1024 * 1024,
        sealer: Sealer | None = None,
    ) -> None:
        registry = kombu_serialization.registry
        for name in (serializer, *accept_content):
            if name not in registry.name_to_type:
                where = "serializer" if name == serializer else "accept_content"
                raise ConfigError(f"{where}: unknown serializer {name!r}{near(name, registry.name_to_type)}")
        if serializer not in set(accept_content):
            raise ConfigError(f"serializer {serializer!r} is not in accept_content: workers would refuse its payloads")
        if compression is not None:
            try:
                kombu_compression.get_encoder(compression)
            except KeyError as error:
                raise ConfigError(f"unknown compression {compression!r}; kombu has gzip, bzip2, lzma, zstd") from error
        self.serializer = serializer
        self.accept = frozenset(accept_content)
        self.compression = compression
        self.max_bytes = max_bytes
        self._sealer = sealer or Sealer({})
        self._reads_plain_json = "json" in self.accept and self._sealer.accepts_unsigned
        self._loaders = {name: registry.name_to_type[name] for name in self.accept}

    def encode(self, value: Any, what: str = "payload", serializer: str | None = None) -> Payload:
        """Return `value` as a payload.

        Raises PayloadError naming the path of what can't be written, PayloadTooLargeError beyond `max_bytes`.
        """
        name = serializer or self.serializer
        if name not in self.accept:
            raise PayloadError(f"serializer {name!r} is not in accept_content: workers would refuse {what}")
        try:
            if name == "json":
                body = _json(value, what)
            else:
                if name == "msgpack":
                    _check_msgpack_keys(value, what, 0)
                _, _, body = kombu_serialization.dumps(value, serializer=name)
        except (PayloadError, SoftTimeLimitExceeded):
            raise
        except Exception as error:
            raise PayloadError(
                f"{what} can't be written as {name}: {_cause(error)}; pass plain data (for an ORM object its primary "
                f"key), or register a codec with kombu"
            ) from error
        data = body.encode() if isinstance(body, str) else body
        if len(data) > self.max_bytes:
            raise PayloadTooLargeError(
                f"{what} takes {len(data):,} bytes, more than max_payload_bytes = {self.max_bytes:,}; "
                "store it elsewhere and pass a reference"
            )
        if self.compression is not None and len(data) >= COMPRESS_FROM:
            packed, _ = kombu_compression.compress(data, self.compression)
            return self._sealer.seal(Payload(f"{name}+{self.compression}", packed))
        if interruption.late:
            interruption.raise_late()
        return self._sealer.seal(Payload(name, data))

    def decode(self, type_name: str, body: bytes, what: str = "payload") -> Any:
        """Return the value of a payload.

        Raises CorruptRowError when its type is not accepted (it is then not loaded at all) or its bytes are not of it,
        PayloadSignatureError when nobody with a key of this app wrote it.
        """
        if type_name == "json" and self._reads_plain_json and len(body) <= self.max_bytes and b'"__' not in body:
            try:  # what nearly every payload is; whatever is wrong with it is said below
                return _plain_json_decode(body)
            except (ValueError, RecursionError):
                pass
        type_name, body = self._sealer.open(type_name, body, what)
        name, _, packing = type_name.partition("+")
        content_type = self._loaders.get(name)
        if content_type is None:
            raise CorruptRowError(
                f"{what} is {type_name!r}, which accept_content = {sorted(self.accept)} doesn't list; it was not loaded"
            )
        try:
            data = kombu_compression.decompress(body, packing) if packing else body
            if len(data) > self.max_bytes * 64:
                raise ValueError(f"{len(data):,} bytes after decompression")
            if name != "json":
                return kombu_serialization.loads(data, content_type, "binary", accept={content_type})
            # kombu marks the types JSON lacks with these two keys; without them nothing is to be restored.
            typed = b'"__type__"' in data or b'"__bytes__"' in data
            return _json_decode(data.decode()) if typed else _plain_json_decode(data)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            raise CorruptRowError(f"{what} is not valid {type_name}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """Return the innermost message: kombu wraps what a serializer raises."""
    return f"{type(error).__name__}: {error}"[:300]


def _json(value: Any, path: str) -> bytes | str:
    """Return `value` as JSON. Raises PayloadError, naming the path, for what JSON or Postgres can't carry unchanged."""
    if _is_plain(value, 0):
        try:
            return _plain_json_encode(value)
        except UnicodeEncodeError:
            pass  # a lone surrogate: the check finds where
    _check(value, path, 0)
    return _json_encode(value)


def _is_plain(value: Any, depth: int) -> bool:
    """Whether a value has nothing to complain of and only JSON's own types; where it has, `_check` tells."""
    kind = type(value)
    if kind is str:
        return "\0" not in value
    if value is None or kind is int or kind is bool:
        return True
    if kind is float:
        return math.isfinite(value)
    if depth >= MAX_DEPTH:
        return False
    if kind is dict:
        if value.keys() == _MARK:
            return False
        for key, item in value.items():
            if type(key) is not str or "\0" in key or not _is_plain(item, depth + 1):
                return False
        return True
    if kind is list or kind is tuple:
        return all(_is_plain(item, depth + 1) for item in value)
    return False


def _check(value: Any, path: str, depth: int) -> None:
    kind = type(value)
    if kind is str:
        _check_text(value, path)
    elif value is None or kind is bool or kind is int:
        pass
    elif kind is float:
        if not math.isfinite(value):
            raise PayloadError(f"{path} is {value!r}; JSON can't carry it")
    elif isinstance(value, dict):
        if depth >= MAX_DEPTH:
            raise PayloadError(f"{path[:80]}... is nested deeper than {MAX_DEPTH}, or contains itself")
        if value.keys() == _MARK:
            raise PayloadError(
                f"{path} has the keys __type__ and __value__ and no others; kombu keeps those for itself"
            )
        for key, item in value.items():
            if not isinstance(key, str):
                raise PayloadError(f"{path} has the key {shown(key)}, which is not text; JSON would change it")
            _check_text(key, f"a key of {path}")
            _check(item, f"{path}.{key}", depth + 1)
    elif isinstance(value, list | tuple):
        if depth >= MAX_DEPTH:
            raise PayloadError(f"{path[:80]}... is nested deeper than {MAX_DEPTH}, or contains itself")
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise PayloadError(f"{path} is {value!r}; JSON can't carry it")
    elif isinstance(value, str):
        _check_text(value, path)


def _check_msgpack_keys(value: Any, path: str, depth: int) -> None:
    """Raise PayloadError for keys that msgpack writes and then refuses to read; it checks the rest as it writes."""
    if depth > MAX_DEPTH:
        raise PayloadError(f"{path[:80]}... is nested deeper than {MAX_DEPTH}, or contains itself")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str | bytes):
                raise PayloadError(f"{path} has the key {shown(key)}, which is neither text nor bytes")
            _check_msgpack_keys(item, f"{path}.{key!s}", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_msgpack_keys(item, f"{path}[{index}]", depth + 1)


def _check_text(value: str, path: str) -> None:
    if "\0" in value:
        raise PayloadError(f"{path} holds a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise PayloadError(f"{path} is not valid Unicode (a lone surrogate; surrogateescape?)") from error
