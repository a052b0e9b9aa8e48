"""One step: whatever user code returns or raises becomes exactly one outcome."""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from durable import Context, Durable
from durable.context import current
from durable.instance import Claimed, Payload
from durable.outcomes import Cancel, Done, Retry, Stop
from durable.runtime.coroutines import CoroutineRunner
from durable.runtime.executor import Executor
from durable.runtime.failures import MAX_ERROR_TEXT, error_json
from durable.storage.claims import Commit


class Bench:
    """An app that never connects, and the executor of one slot."""

    def __init__(self) -> None:
        self.app = Durable(
            "unit", dsn="postgresql://nobody@127.0.0.1:1/none", max_payload_bytes=100_000, max_attempts=3
        )
        self.executor = Executor(self.app, CoroutineRunner())

    def run(
        self, function: Callable[..., Any], *args: Any, claimed: dict[str, Any] | None = None, **options: Any
    ) -> Commit:
        name = f"task{len(self.app.tasks)}"
        self.app.task(name=name, **options)(function)
        state = self.app.codec.encode({"args": list(args)} if args else {})
        return self.executor.execute(claim(machine=name, state_type=state.type, state=state.body, **(claimed or {})))

    def result(self, commit: Commit) -> Any:
        assert commit.result is not None
        return self.app.codec.decode(*commit.result)


def claim(**values: Any) -> Claimed:
    fields: dict[str, Any] = {
        "id": 7,
        "token": 3,
        "version": 1,
        "priority": 0,
        "eligible_at": datetime.now(UTC),
        "machine": "task0",
        "machine_version": 1,
        "step": "run",
        "attempt": 0,
        "crashes": 0,
        "state_type": "json",
        "state": b"{}",
        "max_attempts": None,
        "correlation_key": None,
        "keeps_key": False,
        "expired": None,
        "queue": "default",
    }
    return Claimed(**{**fields, **values})


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.executor.close()


def raising(error: BaseException) -> Callable[..., Any]:
    def step() -> None:
        raise error

    return step


def error_of(commit: Commit) -> dict[str, Any]:
    assert commit.error is not None
    assert "\\u0000" not in commit.error, "jsonb would refuse it"
    error: dict[str, Any] = json.loads(commit.error)
    for text in error.values():
        text.encode()
    return error


# Return values


@pytest.mark.parametrize("value", [None, 0, "", [1, {"a": None}], {"x": 1.5}, b"\xff"])
def test_a_return_value_is_the_result(bench: Bench, value: Any) -> None:
    for returned in (value, Done(value)):
        commit = bench.run(lambda returned=returned: returned)
        assert (commit.status, commit.error) == ("done", None)
        assert bench.result(commit) == value


def test_arguments_come_from_the_state(bench: Bench) -> None:
    assert bench.result(bench.run(lambda a, b: [b, a], 1, [2])) == [[2], 1]


def test_stop_fails_at_once_and_keeps_its_reason(bench: Bench) -> None:
    for reason, message in (("no money", "no money"), ({"code": 5}, "{'code': 5}"), (None, "")):
        commit = bench.run(lambda reason=reason: Stop(reason))
        assert commit.status == "failed"
        assert error_of(commit) == {"type": "Stop", "message": message, "traceback": ""}
        assert bench.result(commit) == reason
    commit = bench.run(lambda: Stop(KeyError("x")))
    assert (commit.status, error_of(commit)["type"]) == ("failed", "KeyError")


def test_retry_is_another_attempt_after_its_delay(bench: Bench) -> None:
    soon = bench.run(lambda: Retry(delay=5), claimed={"attempt": 1})
    assert (soon.status, soon.attempt, soon.delay) == ("scheduled", 2, 5.0)
    now = bench.run(lambda: Retry())
    assert (now.status, now.attempt, now.delay) == ("runnable", 1, 0.0)


def test_a_retry_beyond_the_last_attempt_fails(bench: Bench) -> None:
    commit = bench.run(lambda: Retry(), claimed={"attempt": 2})
    assert commit.status == "failed"
    assert "another attempt" in error_of(commit)["message"]


def test_a_retry_with_a_wrong_delay_is_a_failed_attempt(bench: Bench) -> None:
    commit = bench.run(lambda: Retry(delay=-1))
    assert (commit.status, error_of(commit)["type"]) == ("scheduled", "OutcomeError")


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), "\0", {1: 2}, (n for n in ()), [lambda: None]])
def test_a_result_that_cannot_be_stored_fails_once(bench: Bench, value: Any) -> None:
    commit = bench.run(lambda: value)
    assert (commit.status, commit.result) == ("failed", None)
    assert error_of(commit)["type"] == "PayloadError"
    assert "result" in error_of(commit)["message"]


def test_a_result_over_the_limit_fails_once_with_its_size(bench: Bench) -> None:
    commit = bench.run(lambda: "x" * 200_000)
    assert commit.status == "failed"
    assert error_of(commit)["type"] == "PayloadTooLargeError"
    assert "200,002 bytes" in error_of(commit)["message"]


def test_a_reason_that_cannot_be_stored_still_fails_the_instance(bench: Bench) -> None:
    for step in (lambda: Stop({1}), raising(Cancel({1}))):
        commit = bench.run(step)
        assert (commit.status, error_of(commit)["type"]) == ("failed", "PayloadError")


def test_a_forgotten_await_is_named(bench: Bench) -> None:
    async def inner() -> None: ...

    commit = bench.run(lambda: inner())
    assert commit.status == "failed"
    assert "returned a coroutine: declare it `async def`, or await it" in error_of(commit)["message"]


# Exceptions


def test_an_exception_is_another_attempt_with_backoff_until_the_limit(bench: Bench) -> None:
    for attempt in (0, 1):
        commit = bench.run(raising(ValueError("bad")), claimed={"attempt": attempt})
        assert (commit.status, commit.attempt) == ("scheduled", attempt + 1)
        assert 0.75 * 2**attempt <= (commit.delay or 0) <= 2**attempt
        assert error_of(commit)["type"] == "ValueError"
    last = bench.run(raising(ValueError("bad")), claimed={"attempt": 2})
    assert (last.status, last.attempt) == ("failed", 2)
    assert error_of(last)["message"] == "bad"


def test_the_limit_is_the_instances_else_the_tasks_else_the_apps(bench: Bench) -> None:
    failing = raising(ValueError())
    assert bench.run(failing, claimed={"attempt": 2}).status == "failed"
    assert bench.run(failing, claimed={"attempt": 2}, max_attempts=4).status == "scheduled"
    assert bench.run(failing, claimed={"attempt": 2, "max_attempts": 3}, max_attempts=4).status == "failed"
    assert bench.run(failing, max_attempts=1).status == "failed"


def test_cancel_fails_at_once_with_its_reason(bench: Bench) -> None:
    commit = bench.run(raising(Cancel("enough")))
    assert commit.status == "failed"
    assert error_of(commit) == {"type": "Cancel", "message": "enough", "traceback": ""}
    assert bench.result(commit) == "enough"


def test_ctx_retry_chooses_its_delay_and_names_its_cause(bench: Bench) -> None:
    def step(ctx: Context) -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            raise ctx.retry(countdown=7)  # noqa: B904

    commit = bench.run(step, bind=True)
    assert (commit.status, commit.delay, commit.attempt) == ("scheduled", 7.0, 1)
    assert error_of(commit)["type"] == "KeyError"

    def explicit(ctx: Context) -> None:
        raise ctx.retry(exc=OSError("gone"))

    commit = bench.run(explicit, bind=True)
    assert 0.75 <= (commit.delay or 0) <= 1
    assert error_of(commit) == {**error_of(commit), "type": "OSError", "message": "gone"}
    assert bench.run(explicit, bind=True, claimed={"attempt": 2}).status == "failed"


def test_ctx_retry_with_a_wrong_countdown_is_a_failed_attempt(bench: Bench) -> None:
    def step(ctx: Context) -> None:
        raise ctx.retry(countdown=-1)

    assert error_of(bench.run(step, bind=True))["type"] == "ValidationError"


def test_retry_for_and_dont_retry_for_decide(bench: Bench) -> None:
    failing = raising(FileNotFoundError())
    assert bench.run(failing, retry_for=[OSError]).status == "scheduled"
    assert bench.run(failing, retry_for=[OSError], dont_retry_for=[FileNotFoundError]).status == "failed"
    assert bench.run(failing, retry_for=ValueError).status == "failed"


@pytest.mark.parametrize("ending", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
def test_what_would_end_the_process_fails_the_instance_only(bench: Bench, ending: BaseException) -> None:
    commit = bench.run(raising(ending))
    assert (commit.status, error_of(commit)["type"]) == ("failed", type(ending).__name__)
    assert bench.run(lambda: 1).status == "done"


@pytest.mark.parametrize("backoff", [lambda n: -1, lambda n: float("nan"), lambda n: "5", lambda n: 1 / 0])
def test_a_broken_backoff_falls_back_to_the_default_and_says_so(
    bench: Bench, backoff: Any, caplog: pytest.LogCaptureFixture
) -> None:
    commit = bench.run(raising(ValueError()), backoff=backoff)
    assert commit.status == "scheduled"
    assert 0.75 <= (commit.delay or 0) <= 1
    assert "the default one is used" in caplog.text


def test_a_backoff_of_zero_is_runnable_at_once(bench: Bench) -> None:
    commit = bench.run(raising(ValueError()), backoff=lambda n: 0)
    assert (commit.status, commit.delay) == ("runnable", 0.0)


class Rude(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class RudeToTheEnd(Exception):
    def __str__(self) -> str:
        raise GeneratorExit

    __repr__ = __str__


@pytest.mark.parametrize("kind", [Rude, RudeToTheEnd])
def test_an_exception_that_cannot_be_printed_does_not_lose_the_outcome(bench: Bench, kind: type[Exception]) -> None:
    commit = bench.run(raising(kind()))
    assert (commit.status, error_of(commit)["type"]) == ("scheduled", kind.__name__)
    assert error_of(commit)["message"] == f"<unprintable {kind.__name__}>"


def test_a_huge_message_is_cut_in_the_middle(bench: Bench) -> None:
    commit = bench.run(raising(ValueError("start" + "x" * 5_000_000 + "end")))
    error = error_of(commit)
    for text in (error["message"], error["traceback"]):
        assert len(text) < MAX_ERROR_TEXT + 100
        assert "characters cut" in text
    assert error["message"].startswith("start")
    assert error["message"].endswith("end")


def test_nul_and_lone_surrogates_in_an_error_are_spelled_out(bench: Bench) -> None:
    error = error_of(bench.run(raising(ValueError("a\0b \ud800 é"))))
    assert error["message"] == "a\\0b \\ud800 é"
    assert "a\\0b" in error["traceback"]


def test_causes_in_a_circle_and_groups_are_described() -> None:
    one, two = ValueError("one"), KeyError("two")
    one.__cause__, two.__cause__ = two, one
    assert "one" in json.loads(error_json(one))["traceback"]
    group = ExceptionGroup("several", [ValueError(str(n)) for n in range(3)])
    assert json.loads(error_json(group))["type"] == "ExceptionGroup"


def test_a_recursion_error_is_an_ordinary_failure(bench: Bench) -> None:
    def step() -> None:
        step()

    assert error_of(bench.run(step))["type"] == "RecursionError"


def test_the_traceback_shows_user_code_and_neither_ours_nor_local_values(bench: Bench) -> None:
    def step(secret: str) -> None:
        raise ValueError("bad")

    trace = error_of(bench.run(step, "hunter2"))["traceback"]
    assert "test_executor.py" in trace
    assert "runtime/executor.py" not in trace
    assert "hunter2" not in trace


# Corrupt rows


@pytest.mark.parametrize(
    ("state_type", "state"),
    [
        ("json", b"5"),
        ("json", b"null"),
        ("json", b"[]"),
        ("json", b""),
        ("json", b"{"),
        ("json", b'{"args": 5}'),
        ("json", b'{"args": [], "kwargs": []}'),
        ("pickle", b"x"),
        ("msgpack", b"\xc1"),
        ("msgpack", b""),
        ("nonsense", b"{}"),
    ],
)
def test_a_row_that_cannot_be_read_fails_without_being_run(bench: Bench, state_type: str, state: bytes) -> None:
    ran = []
    bench.app.task(name="task0")(lambda *args, **kwargs: ran.append(1))
    commit = bench.executor.execute(claim(state_type=state_type, state=state))
    assert (commit.status, error_of(commit)["type"]) == ("failed", "CorruptRowError")
    assert "instance 7" in error_of(commit)["message"]
    assert ran == []


def test_arguments_that_no_longer_fit_the_function_are_an_error_of_the_step(bench: Bench) -> None:
    bench.app.task(name="task0")(lambda: None)
    commit = bench.executor.execute(claim(state=b'{"args": [1]}'))
    assert error_of(commit)["type"] == "TypeError"


# Async, context


def test_an_async_step_runs_on_a_loop_that_lives_on(bench: Bench) -> None:
    loops = []

    async def step(x: int) -> int:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return x

    assert bench.result(bench.run(step, 1)) == 1
    assert bench.result(bench.run(step, 2)) == 2
    assert loops[0] is loops[1]
    assert error_of(bench.run(_failing_async))["type"] == "ValueError"
    assert bench.run(_exiting_async).status == "failed"
    assert bench.result(bench.run(step, 3)) == 3


async def _failing_async() -> None:
    raise ValueError("async")


async def _exiting_async() -> None:
    raise SystemExit


def test_the_context_tells_the_step_about_itself(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "durable.step")
    seen: list[Any] = []

    def step(ctx: Context, x: int) -> None:
        seen.extend([ctx.id, ctx.step, ctx.attempt, ctx.queue, ctx.priority, ctx.correlation_key, ctx.version, x])
        seen.append(ctx.app is bench.app and current() is ctx)
        ctx.log.info("hello", extra={"mine": 1})

    bench.run(step, 9, bind=True, claimed={"attempt": 1, "correlation_key": "k", "priority": -2})
    assert seen == [7, "run", 1, "default", -2, "k", 1, 9, True]
    (record,) = [record for record in caplog.records if record.message == "hello"]
    assert (record.instance, record.attempt, record.mine) == (7, 1, 1)  # type: ignore[attr-defined]
    assert current() is None


def test_the_fence_of_the_claim_goes_with_the_outcome(bench: Bench) -> None:
    commit = bench.run(lambda: None)
    assert (commit.claimed.id, commit.claimed.token, commit.claimed.version) == (7, 3, 1)
    assert not commit.keeps_row
    assert Commit(claim(keeps_key=True), "done", Payload("json", b"1")).keeps_row
    assert Commit(claim(), "scheduled").keeps_row


def closes_its_loop() -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


@pytest.mark.parametrize("before", [closes_its_loop, lambda: asyncio.run(asyncio.sleep(0))], ids=["closes", "run"])
@pytest.mark.filterwarnings("ignore:There is no current event loop:DeprecationWarning")
def test_a_plain_step_can_get_an_event_loop(bench: Bench, before: Callable[[], None]) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    def after() -> int:
        loops.append(asyncio.get_event_loop())
        return loops[-1].run_until_complete(asyncio.sleep(0, 5))

    assert bench.run(before).status == "done"
    try:
        assert bench.result(bench.run(after)) == 5
        assert bench.result(bench.run(after)) == 5
        assert loops[0] is loops[1]
    finally:
        asyncio.set_event_loop(None)
        for loop in loops:
            loop.close()


def test_a_kept_task_is_cancelled_when_the_slot_ends(bench: Bench) -> None:
    ended: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.append("cancelled")

    async def step() -> None:
        tasks.append(asyncio.get_running_loop().create_task(forever(), context=contextvars.Context()))
        await asyncio.sleep(0)

    tasks: list[asyncio.Task[None]] = []
    bench.run(step)
    assert ended == []
    bench.executor.close()
    assert ended == ["cancelled"]
