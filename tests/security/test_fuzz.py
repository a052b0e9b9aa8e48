"""Whatever bytes, values and command lines come: an answer or a named error. Bounded, and the same in each run."""

from __future__ import annotations

import contextlib
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from durable.errors import CorruptRowError, PayloadError
from durable.sealing import Sealer
from durable.serialization import Codec
from durable_cli.main import cli
from tests.cli.conftest import NO_SERVER

CODECS = [
    Codec(),
    Codec("msgpack", compression="gzip"),
    Codec(sealer=Sealer({"k1": "a" * 32})),
    Codec(sealer=Sealer({"k1": "a" * 32}, encrypt=True, accept_unsigned=True)),
]
KINDS = st.sampled_from(
    [f"{name}{packing}{seal}"
     for name in ("json", "msgpack", "pickle", "yaml", "", "é")
     for packing in ("", "+gzip", "+zstd", "+bzip2", "+no", "+")
     for seal in ("", ";sig=k1", ";enc=k1", ";enc=k2", ";", ";=")]
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)
ANY = st.recursive(
    st.none() | st.integers() | st.floats() | st.text() | st.binary() | st.uuids() | st.dates() | st.decimals()
    | st.just(datetime(2026, 1, 1, tzinfo=UTC)) | st.builds(object) | st.characters(categories=["Cs"]),
    lambda children: st.lists(children) | st.tuples(children) | st.frozensets(st.integers())
    | st.dictionaries(st.text() | st.integers() | st.none(), children),
    max_leaves=20,
)  # fmt: skip
BOUNDED = settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@BOUNDED
@given(st.sampled_from(CODECS), KINDS, st.binary(max_size=200))
def test_any_bytes_of_any_type_are_a_value_or_a_corrupt_row(codec: Codec, kind: str, body: bytes) -> None:
    with contextlib.suppress(CorruptRowError):
        codec.decode(kind, body)


@BOUNDED
@given(st.sampled_from(CODECS), JSON, st.data())
def test_a_payload_with_a_few_bytes_changed_is_a_value_or_a_corrupt_row(
    codec: Codec, value: Any, data: st.DataObject
) -> None:
    try:
        payload = codec.encode(value)
    except PayloadError:
        return
    body = bytearray(payload.body)
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(body) - 1))
        body[index] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CorruptRowError):
        codec.decode(payload.type, bytes(body))


@BOUNDED
@given(st.sampled_from(CODECS), ANY)
def test_any_value_is_refused_by_name_or_can_be_read_again(codec: Codec, value: Any) -> None:
    try:
        payload = codec.encode(value, "arguments")
    except PayloadError:
        return
    codec.decode(*payload)


@BOUNDED
@given(st.sampled_from(CODECS), JSON)
def test_json_comes_back_as_it_was(codec: Codec, value: Any) -> None:
    try:
        payload = codec.encode(value)
    except PayloadError:
        return
    back = codec.decode(*payload)
    assert back == value or _has_nan(value)


def _has_nan(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_nan, value.values()))
    if isinstance(value, list):
        return any(map(_has_nan, value))
    return isinstance(value, float) and math.isnan(value)


WORDS = st.sampled_from(
    ["--json", "--help", "--limit", "-1", "0", "9" * 30, "nan", "-Q", "-c", "-n", "--args", "[1", "{}", "--status",
     "--max-age", "1e400", "--grant", "producer=x", "--", "-A", "tasks", "tasks:app", "../x", "--schema", "pg_x",
     "4711", "1,2", "é\ud800", "a b", "", "%s", "{schema}", "\n", "\x1b[31m", "--since", "--queue", "*", "--debug",
     "done", "'; --", "--fix", "--yes", "-", "--grant", "--watch"]
)  # fmt: skip
COMMANDS = sorted(set(cli.commands) - {"worker", "beat", "demo", "server", "status"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DURABLE_DSN", NO_SERVER)
    monkeypatch.setenv("DURABLE_CONNECT_TIMEOUT", "1")
    return tmp_path


@settings(BOUNDED, max_examples=200)
@given(st.sampled_from(COMMANDS), st.lists(WORDS, max_size=5))
def test_any_command_line_ends_with_a_known_code_and_without_a_traceback(
    folder: Path, command: str, words: list[str]
) -> None:
    ran = CliRunner().invoke(cli, [command, *words])
    assert ran.exception is None or isinstance(ran.exception, SystemExit), repr(ran.exception)
    assert ran.exit_code in (0, 1, 2, 3)
    if "--debug" not in words:
        assert "Traceback" not in ran.output
    assert "sesame" not in ran.output
