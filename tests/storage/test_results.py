"""AsyncResult: reading where an instance stands, and waiting for its end."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from durable import AsyncResult, Durable, Task
from durable.context import Context, entered
from durable.errors import (
    CorruptRowError,
    DurableError,
    NotFoundError,
    ResultTimeout,
    TaskCancelled,
    TaskFailed,
    ValidationError,
)
from durable.instance import Claimed, Payload
from durable.storage.claims import Commit
from tests.fix_db import wait_until
from tests.fix_rows import DONE, Rows, done

ERROR = '{"type": "ValueError", "message": "bad", "traceback": "Traceback: here"}'


@pytest.fixture
def task(app: Durable) -> Task[..., Any]:
    return app.task(name="task")(lambda *args: None)


@pytest.fixture
def finish(rows: Rows) -> Callable[..., None]:
    """End the next runnable instance, as a worker would."""
    worker = rows.worker()

    def finish(status: str = "done", result: Payload | None = DONE, error: str | None = None) -> None:
        (claimed,) = rows.claim(worker, 1)
        rows.flush(worker, Commit(claimed, status, result=result, error=error))

    return finish


def test_reading_follows_the_instance(task: Task[..., Any], rows: Rows) -> None:
    result = task.delay()
    worker = rows.worker()
    assert (result.status, result.ready(), result.successful(), result.failed()) == ("runnable", False, False, False)
    assert (result.result, result.error, result.attempts) == (None, None, 0)
    (claimed,) = rows.claim(worker)
    assert result.status == "executing"
    rows.flush(worker, Commit(claimed, "runnable", error=ERROR, attempt=1, delay=0.0))
    assert (result.status, result.attempts, result.error, result.result) == ("runnable", 1, None, None)
    (claimed,) = rows.claim(worker)
    rows.flush(worker, done(claimed))
    assert (result.status, result.ready(), result.successful(), result.failed()) == ("done", True, True, False)
    assert (result.result, result.error, result.attempts) == ("ok", None, 2)
    assert result.get() == "ok"


def test_an_id_that_never_existed_is_not_found_and_never_ready(app: Durable) -> None:
    result = app.result(2**40)
    assert (result.status, result.ready(), result.successful(), result.failed()) == ("not_found", False, False, False)
    assert (result.result, result.error, result.attempts) == (None, None, 0)


def test_waiting_for_an_id_that_never_existed_ends_with_not_found(app: Durable) -> None:
    with pytest.raises(NotFoundError, match=f"there is no instance {2**40}"):
        app.result(2**40).get(timeout=20)


def test_a_finished_result_asks_the_database_no_more(
    app: Durable, task: Task[..., Any], finish: Any, rows: Rows
) -> None:
    result = task.delay()
    finish()
    assert result.get() == "ok"
    rows.fetch("DELETE FROM {schema}.history")
    assert (result.status, result.get(), result.attempts) == ("done", "ok", 1)
    assert app.result(result.id).status == "not_found"


def test_get_returns_when_the_instance_ends(task: Task[..., Any], finish: Any, rows: Rows) -> None:
    result = task.delay()
    waiting = rows.background(lambda: result.get(timeout=20))
    finish(result=Payload("msgpack", b"\x93\x01\x02\x03"))
    assert waiting.result(20) == [1, 2, 3]


def test_a_result_without_a_value_is_none(task: Task[..., Any], finish: Any) -> None:
    result = task.delay()
    finish(result=None)
    assert result.get() is None


def test_get_raises_when_time_is_up_and_may_be_called_again(task: Task[..., Any], finish: Any) -> None:
    result = task.delay()
    for timeout in (0, 0.01, 0.05):
        with pytest.raises(
            ResultTimeout, match=f"instance {result.id} was not finished after {timeout:g} s; .*ask again"
        ):
            result.get(timeout=timeout)
    with pytest.raises(TimeoutError):
        result.get(timeout=0.01)
    finish()
    assert result.get(timeout=20) == "ok"


def test_no_time_to_wait_is_enough_for_what_is_finished(app: Durable, task: Task[..., Any], finish: Any) -> None:
    instance = task.delay().id
    finish()
    assert app.result(instance).get(timeout=0) == "ok"
    assert asyncio.run(_aget(app, instance, 0)) == "ok"


async def _aget(app: Durable, instance: int, timeout: float | None) -> Any:
    try:
        return await app.result(instance).aget(timeout=timeout)
    finally:
        await app.aclose()


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "5", True])
def test_a_wrong_timeout_is_refused(task: Task[..., Any], timeout: Any) -> None:
    with pytest.raises(ValidationError, match="timeout must be"):
        task.delay().get(timeout=timeout)


def test_a_failure_is_raised_with_what_the_worker_saw(task: Task[..., Any], finish: Any) -> None:
    result = task.delay()
    finish("failed", None, ERROR)
    for _ in range(2):
        with pytest.raises(TaskFailed, match=rf"^instance {result.id} failed: ValueError: bad$") as caught:
            result.get()
    error = caught.value
    assert (error.id, error.error_type, error.message) == (result.id, "ValueError", "bad")
    assert error.traceback_text == "Traceback: here"
    assert not isinstance(error, TaskCancelled)
    assert result.failed()
    assert str(result.error) == str(error)
    assert result.get(propagate=False) is None
    assert result.result is None


def test_a_reason_is_the_result_of_a_failure(task: Task[..., Any], finish: Any) -> None:
    result = task.delay()
    finish("failed", Payload("json", b'{"code":5}'), '{"type": "Stop", "message": "x"}')
    with pytest.raises(TaskFailed) as caught:
        result.get()
    assert caught.value.traceback_text == ""
    assert result.get(propagate=False) == result.result == {"code": 5}


def test_a_failure_without_any_error_still_says_what_it_is(task: Task[..., Any], finish: Any) -> None:
    result = task.delay()
    finish("failed", None, None)
    with pytest.raises(TaskFailed, match="failed: failed: "):
        result.get()


def test_a_cancelled_instance_raises_the_subclass(app: Durable, task: Task[..., Any]) -> None:
    result = task.delay()
    assert result.cancel("not needed")
    with pytest.raises(TaskCancelled, match="Cancelled: not needed"):
        result.get(timeout=20)
    assert not result.failed()
    assert isinstance(result.error, TaskCancelled)
    assert app.result(result.id).status == "cancelled"


def test_a_result_this_app_may_not_load_is_said_to_be_so(task: Task[..., Any], finish: Any) -> None:
    result = task.delay()
    finish(result=Payload("pickle", b"cos\nsystem\n."))
    with pytest.raises(CorruptRowError, match=f"result of instance {result.id} is 'pickle'.*not loaded"):
        result.get(timeout=20)
    assert result.status == "done"


def test_an_insert_that_commits_later_is_waited_for(
    task: Task[..., Any], database: str, finish: Any, rows: Rows
) -> None:
    with psycopg.connect(database) as theirs:
        result = task.apply_async(connection=theirs)
        waiting = rows.background(lambda: result.get(timeout=20))
        theirs.commit()
    finish()
    assert waiting.result(20) == "ok"


def test_all_waiters_share_one_watcher(app: Durable, task: Task[..., Any], rows: Rows) -> None:
    others = set(threading.enumerate())
    results = [task.delay(n) for n in range(6)]
    waiting = [rows.background(lambda result=result: result.get(timeout=20)) for result in results]  # type: ignore[misc]
    worker = rows.worker()
    claimed = rows.claim(worker)
    watchers = [thread for thread in set(threading.enumerate()) - others if thread.name == "durable-results"]
    assert len(watchers) <= 1
    rows.flush(worker, *(done(row) for row in claimed))
    assert [future.result(20) for future in waiting] == ["ok"] * 6


def test_a_wait_outlives_the_connections_it_is_made_on(
    app: Durable, task: Task[..., Any], finish: Callable[..., None], rows: Rows
) -> None:
    result = task.delay()
    waiting = rows.background(lambda: result.get(timeout=20))
    for _ in range(2):
        wait_until(
            lambda: rows.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'durable test'"
            ),
            what="a connection to cut",
        )
        assert not waiting.done()
    finish()
    assert waiting.result(20) == "ok"


def test_two_waits_for_one_instance_both_end(app: Durable, task: Task[..., Any], finish: Any, rows: Rows) -> None:
    result = task.delay()
    one = rows.background(lambda: result.get(timeout=20))
    two = rows.background(lambda: app.result(result.id).get(timeout=20))
    three = rows.background(lambda: _outcome(lambda: app.result(result.id).get(timeout=0.01)))
    assert isinstance(three.result(20), ResultTimeout)
    finish()
    assert one.result(20) == two.result(20) == "ok"


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except DurableError as error:
        return error


def test_aget_waits_on_the_event_loop(app: Durable, task: Task[..., Any], finish: Any, rows: Rows) -> None:
    async def main() -> None:
        result = task.delay()
        with pytest.raises(ResultTimeout):
            await result.aget(timeout=0.01)
        waiting = [asyncio.ensure_future(result.aget(timeout=20)) for _ in range(3)]
        await asyncio.to_thread(finish)
        assert await asyncio.gather(*waiting) == ["ok"] * 3
        failing = task.delay()
        await asyncio.to_thread(finish, "failed", None, ERROR)
        with pytest.raises(TaskFailed):
            await failing.aget(timeout=20)
        assert await failing.aget(propagate=False) is None
        with pytest.raises(NotFoundError):
            await app.result(2**40).aget(timeout=20)
        cancelled = asyncio.ensure_future(task.delay().aget())
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        await app.aclose()

    asyncio.run(main())


@pytest.fixture
def inside(app: Durable) -> Iterator[None]:
    """As if this were a step."""
    claimed = Claimed(1, 1, 0, 0, None, "outer", 1, "run", 0, 0, "json", b"{}", None, None, False, None, "q")  # type: ignore[arg-type]
    with entered(Context(claimed, app, logging.getLogger("test"))):
        yield


def test_waiting_inside_a_step_is_refused_unless_asked_for(
    app: Durable, task: Task[..., Any], finish: Any, inside: None
) -> None:
    result = task.delay()
    for call in (result.get, lambda: asyncio.run(_aget(app, result.id, None))):
        with pytest.raises(DurableError, match=r"outer instance 1.*holds a worker's slot.*allow_in_step=True"):
            call()
    finish()
    assert result.status == "done", "looking is not waiting"
    assert result.get(allow_in_step=True) == "ok"
    assert asyncio.run(result.aget(allow_in_step=True)) == "ok"


def test_handles_on_one_instance_are_equal(app: Durable, task: Task[..., Any]) -> None:
    result = task.delay()
    assert result == app.result(result.id)
    assert result != app.result(result.id + 1)
    assert len({result, app.result(result.id)}) == 1
    assert repr(result) == f"<AsyncResult {result.id}>"
    assert result != AsyncResult(result.id, object())  # type: ignore[arg-type]


def test_where_no_thread_can_be_had_the_next_wait_finds_one(
    app: Durable, task: Task[..., Any], finish: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = task.delay()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            app._watcher.wait_for(result.id)
    finish(result=Payload("json", b"5"))
    assert result.get(timeout=10) == 5


def _no_thread(_self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
