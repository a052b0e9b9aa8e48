"""Payloads: what is refused in the producer, what survives the way there and back, what a reader loads."""

from __future__ import annotations

import dataclasses
import enum
import pickle
import uuid
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from durable.errors import ConfigError, CorruptRowError, PayloadError, PayloadTooLargeError, ValidationError
from durable.serialization import Codec


class Colour(enum.Enum):
    RED = 1


class Flavour(enum.StrEnum):
    SWEET = "sweet"


@dataclasses.dataclass
class Point:
    x: int = 1


class Model:
    """Stands for an object of somebody's ORM."""


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


BAD_PAYLOADS = [
    ("a NaN", float("nan"), r"^arguments is nan"),
    ("a NaN inside", {"args": [{"x": float("nan")}]}, r"^arguments\.args\[0\]\.x is nan; JSON can't carry it"),
    ("infinity", [float("inf")], r"^arguments\[0\] is inf"),
    ("minus infinity", [-float("inf")], r"arguments\[0\] is -inf"),
    ("NUL in a value", {"kwargs": {"name": "a\0b"}}, r"^arguments\.kwargs\.name holds a NUL"),
    ("NUL in a key", {"a\0b": 1}, r"a key of arguments holds a NUL"),
    ("a lone surrogate", ["\ud800"], r"arguments\[0\] is not valid Unicode \(a lone surrogate"),
    ("a lone surrogate in a key", {"\udcff": 1}, r"a key of arguments is not valid Unicode"),
    ("a set", {1, 2}, r"set is not JSON serializable.*pass plain data"),
    ("an enum", Colour.RED, r"Colour"),
    ("a dataclass", [Point()], r"Point"),
    ("a generator", (n for n in ()), r"generator"),
    ("an ORM object", {"user": Model()}, r"Model.*primary key"),
    ("a class", Model, r"type is not JSON serializable"),
    ("an exception", ValueError("x"), r"ValueError"),
    ("an int as a key", {1: "a"}, r"arguments has the key 1, which is not text"),
    ("keys that JSON would merge", {1: "a", "1": "b"}, r"key 1"),
    ("None as a key", {None: 1}, r"key None"),
    ("a tuple as a key", {"a": {(1, 2): 3}}, r"arguments\.a has the key \(1, 2\)"),
    ("nesting", nested(200), r"nested deeper than 100"),
    ("a circle", circular(), r"nested deeper than 100, or contains itself"),
    ("a huge integer", 10**5000, r"4300 digits"),
    ("what kombu would take for a date", {"__type__": "datetime", "__value__": "2020-01-01"}, r"__type__"),
    ("what kombu would choke on", [{"__type__": "nothing", "__value__": 1}], r"arguments\[0\].*__type__"),
]


@pytest.mark.parametrize(("value", "message"), [row[1:] for row in BAD_PAYLOADS], ids=[row[0] for row in BAD_PAYLOADS])
def test_json_refuses_what_it_cannot_carry_unchanged(value: Any, message: str) -> None:
    with pytest.raises(PayloadError, match=message) as caught:
        Codec().encode(value, "arguments")
    assert isinstance(caught.value, ValidationError)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**63),
        2**70,
        -0.0,
        1e22,
        "",
        "ünïcödé \u2028 😀",
        [],
        {},
        {"a": [1, {"b": None}]},
        b"plain",
        b"\xff\x00",
        b"a\0b",
        Decimal("1.10"),
        Decimal("-1E+400"),
        date(2026, 2, 28),
        time(1, 2, 3, 4),
        datetime(2026, 2, 28, 1, 2, 3, 456789),
        datetime(2026, 2, 28, tzinfo=UTC),
        uuid.UUID(int=5),
        {"when": datetime(2026, 1, 1, tzinfo=UTC), "many": [Decimal("0.1"), uuid.UUID(int=1), b"\x80"]},
        {"__type__": "alone"},
        {"__bytes__": "x"},
        "__type__",
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_value_comes_back_from_json_as_it_was(value: Any) -> None:
    codec = Codec()
    payload = codec.encode(value)
    back = codec.decode(*payload)
    assert payload.type == "json"
    assert back == value
    assert type(back) is type(value)
    assert b"\\u0000" not in payload.body, "jsonb would refuse it"


def test_tuples_become_lists_and_subclasses_of_text_their_text() -> None:
    codec = Codec()
    assert codec.decode(*codec.encode({"a": (1, (2,))})) == {"a": [1, [2]]}
    assert codec.decode(*codec.encode([Flavour.SWEET])) == ["sweet"]


def test_a_float_subclass_is_checked_like_a_float() -> None:
    class Scalar(float):
        """As numpy's float64 is."""

    with pytest.raises(PayloadError, match="nan"):
        Codec().encode([Scalar("nan")])
    assert Codec().encode(Scalar(1.5)).body == b"1.5"


def test_a_payload_over_the_limit_is_refused_with_both_sizes() -> None:
    codec = Codec(max_bytes=1000)
    assert len(codec.encode("x" * 998).body) == 1000
    with pytest.raises(PayloadTooLargeError, match=r"1,001 bytes, more than max_payload_bytes = 1,000.*reference"):
        codec.encode("x" * 999)


def test_the_limit_counts_before_compression() -> None:
    with pytest.raises(PayloadTooLargeError):
        Codec(compression="gzip", max_bytes=1000).encode("x" * 2000)


def test_msgpack_carries_bytes_and_what_json_refuses() -> None:
    codec = Codec("msgpack")
    for value in (b"\xff\0", ["a\0b"], {"k": [1, 2.5, None, True]}, float("inf")):
        payload = codec.encode(value)
        assert payload.type == "msgpack"
        assert codec.decode(*payload) == value


@pytest.mark.parametrize(
    "value", [{1, 2}, object(), "\ud800", 2**70, nested(1200), circular(), {"a": [{1: 2}]}], ids=lambda v: str(type(v))
)
def test_msgpack_refuses_in_the_producer_what_a_worker_could_not_read(value: Any) -> None:
    with pytest.raises(PayloadError, match="arguments"):
        Codec("msgpack").encode(value, "arguments")


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "lzma"])
def test_long_payloads_are_compressed_and_short_ones_are_not(compression: str) -> None:
    codec = Codec(compression=compression)
    assert codec.encode("short").type == "json"
    payload = codec.encode("long " * 1000)
    assert payload.type == f"json+{compression}"
    assert len(payload.body) < 500
    assert Codec().decode(*payload) == "long " * 1000


def test_one_task_may_use_another_serializer_than_the_app() -> None:
    assert Codec().encode(1, "x", "msgpack").type == "msgpack"


@pytest.mark.parametrize("serializer", ["pickle", "yaml", "nonsense"])
def test_a_serializer_that_workers_would_refuse_is_refused_in_the_producer(serializer: str) -> None:
    with pytest.raises(PayloadError, match=f"{serializer}.*accept_content"):
        Codec().encode(1, "arguments", serializer)


def test_pickle_is_refused_without_being_loaded(tmp_path: Path) -> None:
    trap = tmp_path / "loaded"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (trap,)

    body = pickle.dumps(Trap())
    for name in ("pickle", "pickle+gzip", "application/x-python-serialize"):
        with pytest.raises(CorruptRowError, match=r"accept_content = \['json', 'msgpack'\].*not loaded"):
            Codec().decode(name, body, "state of instance 5")
    with pytest.raises(CorruptRowError):
        Codec().decode("json", body)
    with pytest.raises(CorruptRowError):
        Codec().decode("msgpack", body)
    assert not trap.exists()


def test_pickle_works_for_those_who_list_it() -> None:
    codec = Codec("pickle", ("json", "pickle"))
    assert codec.decode(*codec.encode({1, 2})) == {1, 2}


@pytest.mark.parametrize(
    ("type_name", "body"),
    [
        ("json", b""),
        ("json", b"{"),
        ("json", b"\xff"),
        ("json", b'{"__type__":"datetime","__value__":"yesterday"}'),
        ("json", b'{"__type__":"nothing","__value__":1}'),
        ("json+gzip", b"not gzip"),
        ("json+nothing", b"1"),
        ("msgpack", b"\xc1"),
        ("", b"1"),
    ],
)
def test_bytes_that_are_not_what_they_say_are_a_corrupt_row(type_name: str, body: bytes) -> None:
    with pytest.raises(CorruptRowError, match="state of instance 7"):
        Codec().decode(type_name, body, "state of instance 7")


def test_a_compressed_payload_may_not_grow_without_bound() -> None:
    bomb = Codec(compression="gzip", max_bytes=10_000_000).encode("0" * 200_000)
    with pytest.raises(CorruptRowError, match="after decompression"):
        Codec(max_bytes=1000).decode(*bomb)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"serializer": "jsno"}, "unknown serializer 'jsno'; did you mean 'json'"),
        ({"accept_content": ["json", "pickel"]}, "unknown serializer 'pickel'; did you mean 'pickle'"),
        ({"serializer": "pickle"}, "'pickle' is not in accept_content"),
        ({"compression": "rar"}, "unknown compression 'rar'"),
    ],
)
def test_a_codec_that_could_not_read_its_own_payloads_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Codec(**arguments)
