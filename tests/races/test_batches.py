"""Producers with the same keys at the same moment: one winner per key, and no deadlock in any order."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial

import psycopg
import pytest

from durable import DuplicateError
from durable.storage import instances, migrations
from durable.storage.session import execute
from tests.fix_rows import Rows, Session, new
from tests.interleaving import Held, wait_blocked


class Stepped:
    """An insert_many whose statements are sent one at a time."""

    def __init__(self, session: Session, keys: Sequence[str]) -> None:
        self.session = session
        self.operation = instances.insert_many([new(correlation_key=key) for key in keys])
        self.rows: list[tuple[object, ...]] | None = None
        self.ids: list[int | None] | None = None

    def step(self) -> bool:
        """Send the next statement; False when there was none."""
        try:
            name, parameters = self.operation.send(self.rows)  # type: ignore[arg-type]
        except StopIteration as stop:
            self.ids = stop.value
            return False
        self.rows = execute(self.session.connection, self.session.sql, name, parameters)
        return True

    def finish(self) -> list[int | None]:
        while self.step():
            pass
        assert self.ids is not None
        return self.ids


def test_two_batches_with_the_same_new_keys_in_opposite_order_do_not_deadlock(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One statement per row, so that each could hold what the other wants next; the order of keys forbids it."""
    monkeypatch.setattr(instances, "INSERT_CHUNK", 1)
    one, two = rows.other(), rows.other()
    keys = ["a", "b", "c"]
    with two.connection.transaction():
        with one.connection.transaction():
            first = Stepped(one, keys)
            assert [first.step(), first.step()] == [True, True]  # the ids, and the first key
            going = rows.background(Stepped(two, keys[::-1]).finish)
            rows.wait_blocked(two, going)
            ids = first.finish()
        assert going.result(20) == [None, None, None]
    assert None not in ids
    assert len(rows.fetch("SELECT FROM {schema}.instances")) == 3


def insert(session: Session, keys: Sequence[str]) -> list[int | None]:
    return session.atomically(instances.insert_many([new(correlation_key=key) for key in keys]))


def test_one_statements_batches_in_opposite_order_do_not_deadlock_either(rows: Rows) -> None:
    keys = [f"k{n:05}" for n in range(2000)]
    for turn in range(3):
        names = [f"{turn}{key}" for key in keys]
        sessions = [rows.other() for _ in range(4)]
        going = [
            rows.background(partial(insert, session, names[::order]))
            for session, order in zip(sessions, (1, -1, 1, -1), strict=True)
        ]
        inserted = [instance for future in going for instance in future.result(60) if instance is not None]
        assert len(inserted) == len(set(inserted)) == 2000
    assert rows.fetch("SELECT count(*) AS n FROM {schema}.instances") == [{"n": 6000}]


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_second_insert_of_a_key_waits_for_the_first_and_follows_its_end(rows: Rows, end: str) -> None:
    one, two = rows.other(), rows.other()
    with one.connection.transaction(force_rollback=end == "rollback"):
        first = one.run(instances.insert(new(correlation_key="k")))
        going = rows.background(lambda: two.run(instances.insert(new(correlation_key="k"))))
        rows.wait_blocked(two, going)
    if end == "rollback":
        assert going.result(20) != first
    else:
        with pytest.raises(DuplicateError) as caught:
            going.result(20)
        assert caught.value.existing_id == first


def test_inserts_of_other_keys_and_of_none_never_wait(rows: Rows) -> None:
    one, two = rows.other(), rows.other()
    with one.connection.transaction():
        one.run(instances.insert(new(correlation_key="k")))
        two.run(instances.insert(new(correlation_key="other")))
        two.run(instances.insert(new()))
        two.run(instances.insert(new(correlation_key="k", correlation_scope=())))
    assert len(rows.fetch("SELECT FROM {schema}.instances")) == 4


def test_whole_statements_in_opposite_order_that_meet_at_a_held_key_do_not_deadlock(rows: Rows) -> None:
    """Each inserts all of its keys in one statement; where both stand still, one of them holds nothing yet."""
    keys = ["a", "b", "c"]
    holder, one, two = rows.other(), rows.other(), rows.other()
    held = Held(holder, instances.insert_many([new(correlation_key="b")])).until(None)
    leading = rows.background(partial(insert, one, keys))
    wait_blocked(rows, one, leading)
    following = rows.background(partial(insert, two, keys[::-1]))
    wait_blocked(rows, two, following)
    held.rollback()
    assert None not in leading.result(20)
    assert following.result(20) == [None, None, None]


def test_every_batch_goes_in_one_order_whatever_the_databases_collation(
    server_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted by a language, "a" is before "B"; one batch in two statements and one in one statement must agree."""
    name = f"collated_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(server_dsn, autocommit=True) as connection:
        try:
            connection.execute(
                f"CREATE DATABASE {name} TEMPLATE template0 ENCODING utf8"
                " LOCALE_PROVIDER icu ICU_LOCALE 'en' LOCALE 'C'"
            )
        except (psycopg.errors.FeatureNotSupported, psycopg.errors.SyntaxError):
            pytest.skip("this server knows no language's order (built without ICU)")
    dsn = psycopg.conninfo.make_conninfo(server_dsn, dbname=name)
    with psycopg.connect(dsn, autocommit=True) as connection:
        migrations.migrate(connection, "collated")
    rows = Rows(dsn, "collated")
    try:
        one, two = rows.other(), rows.other()
        one.connection.execute("BEGIN")
        monkeypatch.setattr(instances, "INSERT_CHUNK", 1)
        first = Stepped(one, ["a", "B"])
        assert [first.step(), first.step()] == [True, True]  # the ids, and the first key
        monkeypatch.undo()
        going = rows.background(partial(insert, two, ["a", "B"]))
        wait_blocked(rows, two, going)
        assert None not in first.finish()
        one.connection.execute("COMMIT")
        assert going.result(20) == [None, None]
    finally:
        rows.close()
        with psycopg.connect(server_dsn, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
