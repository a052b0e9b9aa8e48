"""Signed and encrypted payloads: what nobody with a key wrote is refused undecoded; keys are rotated one by one."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from durable import Await, Done, Durable, Machine, ScheduleChildren, step
from durable.config import Config
from durable.errors import ConfigError, DrainError, PayloadSignatureError, TaskFailed
from durable.instance import Payload
from durable.sealing import Sealer
from durable.serialization import Codec
from durable.testing import drain
from tests.fix_db import wait_until
from tests.fix_rows import Rows

OLD, NEW = "k1:" + "a" * 32, "k2:" + "b" * 32
LOADED: list[str] = []


class Hostile:
    """Unpickling it is seen."""

    def __reduce__(self) -> Any:
        return note, ("loaded",)


def note(what: str) -> None:
    LOADED.append(what)


def codec(*keys: str, encrypt: bool = False, accept_unsigned: bool = False, **options: Any) -> Codec:
    return Codec(sealer=Sealer.of(keys, encrypt, accept_unsigned), **options)


@pytest.fixture(params=[False, True], ids=["signed", "encrypted"])
def encrypt(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("value", [None, 1, "x" * 5000, {"a": [1, {"b": "é"}]}], ids=["none", "int", "long", "nested"])
@pytest.mark.parametrize("options", [{}, {"serializer": "msgpack"}, {"compression": "gzip"}], ids=str)
def test_what_is_sealed_comes_back(value: object, options: dict[str, Any], encrypt: bool) -> None:
    one = codec(OLD, encrypt=encrypt, **options)
    payload = one.encode(value)
    assert payload.type.endswith(f";{'enc' if encrypt else 'sig'}=k1")
    assert one.decode(*payload) == value
    if encrypt:
        assert payload.body != one.encode(value).body
        assert b"xxxx" not in payload.body


def test_every_bit_of_it_counts(encrypt: bool) -> None:
    one = codec(OLD, encrypt=encrypt)
    payload = one.encode({"amount": 1})
    for index in range(len(payload.body)):
        changed = bytearray(payload.body)
        changed[index] ^= 1
        with pytest.raises(PayloadSignatureError, match="state of instance 5 has a wrong signature"):
            one.decode(payload.type, bytes(changed), "state of instance 5")
    for length in range(len(payload.body)):
        with pytest.raises(PayloadSignatureError):
            one.decode(payload.type, payload.body[:length])
    kind = payload.type.partition(";")
    for other in ("msgpack", "json+gzip", "pickle"):
        with pytest.raises(PayloadSignatureError):
            one.decode(other + kind[1] + kind[2], payload.body)


@pytest.mark.parametrize(
    "kind", ["json;sig=k9", "json;enc=k9", "json;sig=", "json;", "json;x=k1", "json;sig=k1;sig=k1"]
)
def test_a_seal_that_is_none_is_refused(kind: str) -> None:
    with pytest.raises(PayloadSignatureError):
        codec(OLD).decode(kind, b"{}")
    with pytest.raises(PayloadSignatureError):
        codec(OLD, accept_unsigned=True).decode(kind, b"{}")
    with pytest.raises(PayloadSignatureError):
        Codec().decode(kind, b"{}")


def test_nothing_of_a_forged_payload_is_decoded() -> None:
    accept = {"serializer": "pickle", "accept_content": ("json", "pickle")}
    body = pickle.dumps(Hostile())
    LOADED.clear()
    for kind, bytes_ in (("pickle", body), ("pickle;sig=k1", bytes(32) + body), ("pickle;enc=k1", bytes(28) + body)):
        with pytest.raises(PayloadSignatureError):
            codec(OLD, **accept).decode(kind, bytes_)
    assert LOADED == []
    codec(OLD, accept_unsigned=True, **accept).decode("pickle", body)
    assert LOADED == ["loaded"], "this test can fail"


def test_keys_are_rotated_by_putting_the_new_one_in_front(encrypt: bool) -> None:
    before, between, after = codec(OLD, encrypt=encrypt), codec(NEW, OLD, encrypt=encrypt), codec(NEW, encrypt=encrypt)
    written = before.encode("x")
    assert between.decode(*written) == "x"
    assert after.decode(*between.encode("y")) == "y"
    with pytest.raises(PayloadSignatureError, match="a key that payload_keys doesn't hold"):
        after.decode(*written)
    with pytest.raises(PayloadSignatureError):
        codec("k1:" + "c" * 32, encrypt=encrypt).decode(*written)


def test_signing_turns_into_encryption_and_back_without_a_stop() -> None:
    signing, encrypting = codec(OLD), codec(OLD, encrypt=True)
    assert encrypting.decode(*signing.encode("x")) == "x"
    assert signing.decode(*encrypting.encode("x")) == "x"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"payload_keys": "k1"}, "key 1 must be NAME:SECRET"),
        ({"payload_keys": "K 1:" + "a" * 32}, "key 1 must be NAME:SECRET"),
        ({"payload_keys": ["k1:short-secret"]}, "secret of key 'k1' must be at least 32 characters"),
        ({"payload_keys": [OLD, OLD]}, "two keys 'k1'"),
        ({"payload_keys": 5}, "must be a list of NAME:SECRET"),
        ({"payload_keys": {"k1": "secret"}}, "must be a list of NAME:SECRET"),
        ({"payload_encryption": True}, "needs a key in payload_keys"),
    ],
)
def test_wrong_keys_are_named_without_their_secret(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as raised:
        Durable("x", dsn="postgresql://x/x", **settings)
    assert "short-secret" not in str(raised.value)
    assert "aaaa" not in str(raised.value)


def test_settings_do_not_show_their_secrets() -> None:
    config = Config.load({"DURABLE_PAYLOAD_KEYS": f"{NEW}, {OLD}"}, listen_dsn="postgresql://u:sesame@h/x")
    assert config.payload_keys == (NEW, OLD)
    assert "aaaa" not in repr(config)
    assert "sesame" not in repr(config)


def test_without_the_library_encryption_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(ConfigError, match=r"durable-pg\[encryption\]"):
        codec(OLD, encrypt=True)
    assert codec(OLD).decode(*codec(OLD).encode(1)) == 1


# In the database


def shop(database: str, schema: str, **settings: Any) -> Durable:
    app = Durable("shop", dsn=database, schema=schema, **settings)

    @app.task(name="double")
    def double(n: int) -> int:
        return n * 2

    @app.machine(name="order")
    class Order(Machine):
        @step(initial=True)
        def begin(self, ctx: Any) -> Any:
            return Await(["paid"], then=self.paid, state={"stage": "waiting"})

        @step
        def paid(self, ctx: Any) -> Any:
            state = {"amount": ctx.awaited[0].payload}
            return ScheduleChildren([("double", {"args": (state["amount"],)})], then=self.end, state=state)

        @step
        def end(self, ctx: Any) -> Any:
            return Done([ctx.state["amount"], [child.result for child in ctx.children]])

    return app


@pytest.fixture
def sealed(app: Durable, database: str, schema: str, encrypt: bool) -> Iterator[Durable]:
    made = shop(database, schema, payload_keys=[OLD], payload_encryption=encrypt)
    yield made
    made.close()


@pytest.fixture
def rows(app: Durable, database: str, schema: str) -> Iterator[Rows]:
    rows = Rows(database, schema)
    yield rows
    rows.close()


def stored(rows: Rows) -> list[Payload]:
    found = rows.fetch(
        "SELECT state_type AS kind, state AS body FROM {schema}.instances"
        " UNION ALL SELECT state_type, state FROM {schema}.history"
        " UNION ALL SELECT result_type, result FROM {schema}.history"
        " UNION ALL SELECT payload_type, payload FROM {schema}.signals"
    )
    return [Payload(row["kind"], row["body"]) for row in found if row["kind"] is not None]


def test_states_results_signals_and_childrens_results_are_all_sealed(
    sealed: Durable, rows: Rows, encrypt: bool
) -> None:
    order = sealed.insert("order")
    drain(sealed)
    sealed.signal(order.id, "paid", 21)
    assert [payload.type for payload in stored(rows)] == [f"json;{'enc' if encrypt else 'sig'}=k1"] * 2
    drain(sealed)
    assert order.get(timeout=10) == [21, [42]]
    payloads = stored(rows)
    assert len(payloads) == 4
    assert {payload.type for payload in payloads} == {f"json;{'enc' if encrypt else 'sig'}=k1"}
    assert rows.fetch("SELECT state, result FROM {schema}.instance_view WHERE id = %s", [order.id]) == [
        {"state": None, "result": None}
    ]


def test_a_forged_state_fails_by_name_and_its_neighbours_do_not(sealed: Durable, rows: Rows) -> None:
    good = sealed.find_task("double").delay(1)
    unsigned = rows.insert(1, machine="double", state=Payload("json", b'{"args": [1]}'))[0]
    changed = sealed.find_task("double").delay(3)
    rows.fetch("UPDATE {schema}.instances SET state = set_byte(state, 40, 0) WHERE id = %s", [changed.id])
    drain(sealed)
    assert good.get(timeout=10) == 2
    for instance in (unsigned, changed.id):
        with pytest.raises(TaskFailed) as failure:
            sealed.result(instance).get(timeout=10)
        assert failure.value.error_type == "PayloadSignatureError"
        assert "was not loaded" in failure.value.message


def test_a_forged_result_signal_and_child_fail_by_name(sealed: Durable, rows: Rows) -> None:
    done = sealed.find_task("double").delay(1)
    order, parent = sealed.insert("order"), sealed.insert("order")
    drain(sealed)
    rows.fetch("UPDATE {schema}.history SET result_type = 'json', result = '9' WHERE id = %s", [done.id])
    with pytest.raises(PayloadSignatureError, match="is not signed"):
        done.get(timeout=10)
    sealed.signal(order.id, "paid", 1)
    rows.fetch("UPDATE {schema}.signals SET payload_type = 'json', payload = '9' WHERE target_id = %s", [order.id])
    drain(sealed)
    with pytest.raises(TaskFailed, match="PayloadSignatureError"):
        order.get(timeout=10)
    sealed.signal(parent.id, "paid", 1)
    with pytest.raises(DrainError):
        drain(sealed, max_steps=2)
    rows.fetch("UPDATE {schema}.history SET result = set_byte(result, 3, 0) WHERE parent_id = %s", [parent.id])
    drain(sealed)
    with pytest.raises(TaskFailed, match="PayloadSignatureError"):
        parent.get(timeout=10)


def test_a_worker_command_works_with_keys_from_the_environment(
    app: Durable, database: str, schema: str, tmp_path: Path, durable_worker: Callable[..., Any]
) -> None:
    (tmp_path / "tasks.py").write_text(
        f"from durable import Durable\napp = Durable('shop', dsn={database!r}, schema={schema!r})\n"
        "@app.task(name='double')\ndef double(n):\n    return n * 2\n"
    )
    command = durable_worker(
        "worker", "-l", "debug", DURABLE_PAYLOAD_KEYS=f"{NEW},{OLD}", DURABLE_PAYLOAD_ENCRYPTION="1"
    )
    producer = shop(database, schema, payload_keys=[OLD])
    reader = shop(database, schema, payload_keys=[NEW, OLD])
    try:
        result = producer.find_task("double").delay(4)
        wait_until(lambda: result.status == "done", what="the end")
        assert reader.result(result.id).get(timeout=10) == 8
        with pytest.raises(PayloadSignatureError):
            result.get(timeout=10)
        assert command.stop() == 0
        assert "aaaa" not in command.output()
    finally:
        producer.close()
        reader.close()


def test_a_pickled_row_fails_without_being_loaded(app: Durable, rows: Rows, database: str, schema: str) -> None:
    LOADED.clear()
    shop_app = shop(database, schema)
    body = pickle.dumps(Hostile())
    (state,) = rows.insert(1, machine="double", state=Payload("pickle", body))
    order = shop_app.insert("order")
    done = shop_app.find_task("double").delay(1)
    drain(shop_app)
    rows.fetch(
        "INSERT INTO {schema}.signals (target_id, name, payload_type, payload) VALUES (%s, 'paid', 'pickle', %s)",
        [order.id, body],
    )
    rows.fetch("UPDATE {schema}.instances SET status = 'runnable', inbox = 1 WHERE id = %s", [order.id])
    rows.fetch("UPDATE {schema}.history SET result_type = 'pickle', result = %s WHERE id = %s", [body, done.id])
    drain(shop_app)
    try:
        for result in (shop_app.result(state), order, done):
            with pytest.raises(Exception, match="it was not loaded"):
                result.get(timeout=10)
        assert LOADED == []
    finally:
        shop_app.close()
