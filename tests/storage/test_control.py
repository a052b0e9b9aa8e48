"""Paused queues: nothing is claimed from them, everything else goes on."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from durable import Durable
from durable.errors import ValidationError
from durable.storage import claims, control, inspection, maintenance, workers
from durable.storage.control import QueueOrders
from durable.storage.workers import Identity
from tests.fix_rows import Rows, done

HERE = Identity("worker", "me", "host", "boot", 1, 2, "start", "a")


def test_nothing_is_claimed_from_a_paused_queue_and_everything_from_its_neighbour(rows: Rows) -> None:
    worker = rows.worker()
    (here,) = rows.insert(queue="a")
    (there,) = rows.insert(queue="b")
    assert rows.run(control.pause("a", "broken printer"))
    assert rows.claim(worker, queue="a") == []
    assert [row.id for row in rows.claim(worker, queue="b")] == [there]
    assert rows.run(control.resume("a"))
    assert [row.id for row in rows.claim(worker, queue="a")] == [here]


def test_a_suspect_of_a_paused_queue_waits_too(rows: Rows) -> None:
    worker = rows.worker()
    (claimed,) = rows.claimed(worker)
    rows.bury(worker)
    rows.reclaim(worker, [(claimed.id, claimed.token)])
    rows.run(control.pause("default"))
    assert rows.run(claims.claim_suspect(rows.worker(), "default", [])) == []
    rows.run(control.resume("default"))
    assert [row.id for row in rows.run(claims.claim_suspect(rows.worker(), "default", []))] == [claimed.id]


def test_what_runs_while_its_queue_is_paused_commits_and_goes_back_as_ever(rows: Rows) -> None:
    worker, dying = rows.worker(), rows.worker()
    first, second = rows.claimed(worker, 2)
    (third,) = rows.claimed(dying)
    rows.run(control.pause("default"))
    assert rows.flush(worker, done(first)) == {first.id}
    assert rows.release(worker, second) == {"default": 1}
    rows.bury(dying)
    assert rows.reclaim(dying).by_queue == {"default": 1}
    assert [rows.status(row.id) for row in (first, second, third)] == ["done", "runnable", "runnable"]


def test_inserts_due_rows_and_cancels_of_a_paused_queue_go_on(rows: Rows) -> None:
    rows.run(control.pause("default"))
    due, unwanted = rows.insert(delay=0.001)[0], rows.insert()[0]
    rows.fetch("SELECT pg_sleep(0.002)")
    assert rows.run(maintenance.promote()) == {"default": 1}
    assert rows.status(due) == "runnable"
    assert rows.cancel(unwanted)


def test_pausing_twice_keeps_the_first_moment_and_reason(rows: Rows) -> None:
    assert rows.run(control.pause("a", "first"))
    (before,) = rows.run(inspection.queues())
    assert not rows.run(control.pause("a", "second"))
    (after,) = rows.run(inspection.queues())
    assert (after.queue, after.paused_at, after.pause_reason) == ("a", before.paused_at, "first")
    assert rows.run(control.resume("a"))
    assert not rows.run(control.resume("a"))
    assert rows.run(inspection.queues()) == []


def test_a_queue_nobody_gave_orders_for_has_none(rows: Rows) -> None:
    rows.run(control.pause("b"))
    rows.run(control.set_concurrency("b", 3))
    expected = {"a": QueueOrders(), "b": QueueOrders(paused=True, concurrency=3)}
    assert rows.run(control.orders(["a", "b"], HERE)) == (expected, None)


def test_only_the_command_that_is_asked_hears_of_it_and_once(rows: Rows) -> None:
    mine, other = rows.run(workers.register(HERE, 600)), replace(HERE, name="other", command_pid=7)
    rows.run(workers.register(replace(HERE, pid=9), 600))
    rows.run(workers.register(other, 600))
    rows.run(workers.register(replace(HERE, command_pid=8), -1))
    assert rows.run(control.ask("nobody", "stop")) == []
    assert rows.run(control.ask("me", "reload")) == [("host", 2)]
    assert rows.run(control.orders(["a"], other))[1] is None
    rows.bury(mine)  # a process that was replaced since: the command has heard all the same
    assert rows.run(control.orders(["a"], HERE))[1] == "reload"
    rows.run(control.ask("me", "stop"))
    assert rows.run(control.orders(["a"], HERE))[1] == "stop", "the last word is to end"
    rows.run(control.forget_asked(HERE))
    assert rows.run(control.orders(["a"], HERE))[1] is None


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_pause_that_is_being_committed_makes_no_claim_wait(rows: Rows, end: str) -> None:
    """The claim sees the queue as it is committed: an operator's open transaction stops nobody."""
    worker, operator = rows.worker(), rows.other()
    rows.insert(2)
    operator.connection.execute("BEGIN")
    operator.run(control.pause("default"))
    assert len(rows.claim(worker, 1)) == 1
    operator.connection.execute(end)
    assert len(rows.claim(worker, 1)) == (0 if end == "commit" else 1)


async def _twins(app: Durable) -> list[bool]:
    try:
        return [
            await app.apause("a"),
            await app.apause("a"),
            await app.aresume("a"),
            await app.aresume("a"),
        ]
    finally:
        await app.aclose()


def test_the_app_pauses_and_resumes_and_refuses_what_is_no_queue(app: Durable) -> None:
    assert [app.pause("a", "why"), app.pause("a"), app.resume("a"), app.resume("a")] == [True, False, True, False]
    assert asyncio.run(_twins(app)) == [True, False, True, False]
    for wrong in ("", "A b", 7):
        with pytest.raises(ValidationError, match="queue must be"):
            app.pause(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="NUL"):
        app.pause("a", "x\0")
