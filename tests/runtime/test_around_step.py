"""`around_step`: context managers around every step, in every pool, in a drain and eagerly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from durable import Cancel, Context, Done, Durable, Machine, Retry, Stop, step
from durable.errors import DefinitionError
from durable.testing import assert_done, assert_failed, drain
from tests.fix_app import Command
from tests.fix_db import wait_until

KINDS = ["task", "coroutine", "machine", "amachine"]
seen: ContextVar[str] = ContextVar("seen", default="nothing")


class Log(list[str]):
    """What happened, in order."""

    def manager(self, name: str) -> Callable[[Context], Any]:
        """A plain manager that notes when it is entered and what leaves it."""

        @contextmanager
        def note(ctx: Context) -> Iterator[None]:
            self.append(f"{name} {ctx.name}.{ctx.step}")
            try:
                yield
            except BaseException as error:
                self.append(f"{name} saw {type(error).__name__}")
                raise
            finally:
                self.append(f"{name} ends")

        return note


@pytest.fixture
def log() -> Log:
    return Log()


def defined(app: Durable, body: Callable[[Context], Any], **options: Any) -> dict[str, Any]:
    """A task and a machine of each kind whose step is `body`."""

    @app.task(name="task", bind=True, **options)
    def task(ctx: Context) -> Any:
        return body(ctx)

    @app.task(name="coroutine", bind=True, **options)
    async def coroutine(ctx: Context) -> Any:
        await asyncio.sleep(0)
        return body(ctx)

    @app.machine(name="machine")
    class M(Machine):
        @step(initial=True)
        def run(self, ctx: Context) -> Any:
            return Done(body(ctx))

    @app.machine(name="amachine")
    class A(Machine):
        @step(initial=True)
        async def run(self, ctx: Context) -> Any:
            await asyncio.sleep(0)
            return Done(body(ctx))

    return {"task": task, "coroutine": coroutine, "machine": M, "amachine": A}


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_manager_is_the_outermost(app: Durable, log: Log, kind: str) -> None:
    app.around_step(log.manager("outer"))
    app.around_step(log.manager("inner"))
    result = defined(app, lambda ctx: log.append("step"))[kind].delay()
    assert drain(app) == {"steps": 1, "done": 1}
    assert log == [f"outer {kind}.run", f"inner {kind}.run", "step", "inner ends", "outer ends"]
    assert_done(app, result)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["factory", "enter", "exit"])
@pytest.mark.parametrize("kind_of_error", [ValueError, SystemExit, GeneratorExit])
def test_an_error_of_a_manager_is_the_steps(
    app: Durable, log: Log, kind: str, where: str, kind_of_error: type[BaseException]
) -> None:
    class Manager:
        def __init__(self, now: str) -> None:
            log.append(now)
            if now == where:
                raise kind_of_error("mine")

        def __enter__(self) -> None:
            Manager("enter")

        def __exit__(self, *_: Any) -> None:
            Manager("exit")

    app.around_step(lambda ctx: Manager("factory"))
    result = defined(app, lambda ctx: log.append("step"), max_attempts=1)[kind].delay()
    assert drain(app) == {"steps": 1, "failed": 1}
    assert_failed(app, result, kind_of_error, match="mine")
    assert (
        log[: 4 if where == "exit" else 3]
        == {
            "factory": ["factory"] if kind in ("task", "coroutine") else ["factory", "factory"],
            "enter": ["factory", "enter"] if kind in ("task", "coroutine") else ["factory", "enter", "factory"],
            "exit": ["factory", "enter", "step", "exit"],
        }[where]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_manager_swallows_no_exception(app: Durable, kind: str) -> None:
    @app.around_step
    def swallow(ctx: Context) -> Iterator[None]:
        try:
            yield
        except ZeroDivisionError:
            return

    result = defined(app, lambda ctx: 1 / 0, max_attempts=1)[kind].delay()
    assert drain(app)["failed"] == 1
    assert_failed(app, result, ZeroDivisionError)


@pytest.mark.parametrize("kind", KINDS)
def test_a_manager_may_raise_another_exception(app: Durable, kind: str) -> None:
    @app.around_step
    @contextmanager
    def translate(ctx: Context) -> Iterator[None]:
        try:
            yield
        except ZeroDivisionError as error:
            raise Cancel("no number") from error

    result = defined(app, lambda ctx: 1 / 0)[kind].delay()
    assert drain(app) == {"steps": 1, "failed": 1}
    assert_failed(app, result, "Cancel", match="no number")


def test_handle_runs_inside_managers_of_its_own(app: Durable, log: Log) -> None:
    app.around_step(log.manager("m"))

    @app.machine(name="machine")
    class M(Machine):
        @step(initial=True)
        def run(self, ctx: Context) -> Any:
            raise ZeroDivisionError

        async def handle(self, error: BaseException, ctx: Context) -> Any:
            log.append("handle")
            return Stop("handled")

    result = M.delay()
    drain(app)
    assert_failed(app, result, "Stop", match="handled")
    assert log == ["m machine.run", "m saw ZeroDivisionError", "m ends", "m machine.run", "handle", "m ends"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_async_manager_is_for_coroutines(app: Durable, log: Log, kind: str) -> None:
    @app.around_step
    @asynccontextmanager
    async def manager(ctx: Context) -> AsyncIterator[None]:
        token = seen.set("set")
        await asyncio.sleep(0)
        yield
        seen.reset(token)
        log.append("left")

    app.around_step(lambda ctx: None)
    result = defined(app, lambda ctx: seen.get())[kind].delay()
    drain(app)
    is_async = kind in ("coroutine", "amachine")
    assert assert_done(app, result) == ("set" if is_async else "nothing")
    assert log == (["left"] if is_async else [])


def test_each_kind_uses_its_own_methods(app: Durable, log: Log) -> None:
    class Both:
        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *_: Any) -> None: ...

        async def __aenter__(self) -> None:
            log.append("aenter")

        async def __aexit__(self, *_: Any) -> None: ...

    app.around_step(lambda ctx: Both())
    targets = defined(app, lambda ctx: None)
    for kind in KINDS:
        targets[kind].delay()
        drain(app)
    assert log == ["enter", "aenter", "enter", "aenter"]


def test_an_asked_for_retry_passes_the_managers(app: Durable, log: Log) -> None:
    app.around_step(log.manager("m"))

    @app.task(name="task", bind=True)
    def task(ctx: Context) -> Any:
        if ctx.attempt == 0:
            raise ctx.retry(countdown=0, exc=KeyError("first"))
        return Retry() if ctx.attempt == 1 else "third"

    result = task.delay()
    drain(app)
    assert_done(app, result, "third")
    assert log.count("m saw RetryRequested") == 1
    assert log.count("m ends") == 3


def test_a_manager_shares_the_steps_connection(app: Durable) -> None:
    @app.around_step
    @contextmanager
    def tenant(ctx: Context) -> Iterator[None]:
        ctx.connection.execute("SET LOCAL application_name = 'tenant 7'")
        yield

    @app.task(name="task", bind=True)
    def task(ctx: Context) -> Any:
        return ctx.connection.execute("SHOW application_name").fetchone()[0]

    result = task.delay()
    drain(app)
    assert_done(app, result, "tenant 7")


def test_what_is_no_manager_fails_the_step(app: Durable) -> None:
    app.around_step(lambda ctx: 7)
    result = defined(app, lambda ctx: None, max_attempts=1)["task"].delay()
    drain(app)
    assert_failed(app, result, DefinitionError, match="returned 7; it must return a context manager, or None")


@pytest.mark.parametrize("kind", ["task", "coroutine"])
def test_eager_runs_enter_the_managers(log: Log, kind: str) -> None:
    app = Durable("eager", dsn="postgresql://127.0.0.1:1/none", task_always_eager=True)
    app.around_step(log.manager("m"))
    assert defined(app, lambda ctx: log.append("step"))[kind].delay().get() is None
    assert log == [f"m {kind}.run", "step", "m ends"]


def test_what_can_t_be_one_is_refused(app: Durable) -> None:
    async def returns(ctx: Context) -> None: ...

    async def returns_nothing() -> None: ...

    for wrong in (7, lambda: None, lambda a, b: None):
        with pytest.raises(DefinitionError, match="around_step takes a function of the Context"):
            app.around_step(wrong)  # type: ignore[type-var]
    with pytest.raises(DefinitionError, match="never yields"):
        app.around_step(returns)
    with pytest.raises(DefinitionError, match="on_process_start takes a function of no argument"):
        app.on_process_start(lambda name: None)
    with pytest.raises(DefinitionError, match="on_process_stop takes a plain function, got the async"):
        app.on_process_stop(returns_nothing)


POOL_TASKS = """
    import asyncio, os
    from contextvars import ContextVar
    from durable import Done, Machine, step

    open_in = ContextVar("open_in", default=None)

    class Note:
        def __init__(self, ctx): self.ctx = ctx
        def __enter__(self): self.token = open_in.set(f"plain {self.ctx.name}")
        def __exit__(self, *_): open_in.reset(self.token)
        async def __aenter__(self): self.token = open_in.set(f"async {self.ctx.name}")
        async def __aexit__(self, *_): open_in.reset(self.token)

    app.around_step(Note)

    @app.task(name="task")
    def task(): return open_in.get()

    @app.task(name="coroutine")
    async def coroutine():
        await asyncio.sleep(0)
        return open_in.get()

    @app.machine(name="machine")
    class M(Machine):
        @step(initial=True)
        def run(self, ctx): return Done(open_in.get())

    @app.machine(name="amachine")
    class A(Machine):
        @step(initial=True)
        async def run(self, ctx): return Done(await asyncio.create_task(self.inner()))
        async def inner(self): return open_in.get()

    @app.on_process_start
    def start():
        with open("hooks", "a") as hooks: hooks.write(f"start {os.getpid()}\\n")

    @app.on_process_stop
    def stop():
        with open("hooks", "a") as hooks: hooks.write(f"stop {os.getpid()}\\n")

    @app.on_process_stop
    def fails(): raise SystemExit(3)
"""


@pytest.mark.parametrize("pool", ["prefork", "threads", "asyncio"])
def test_each_pool_runs_them(
    app: Durable,
    pool: str,
    tasks_module: Callable[[str], Path],
    durable_worker: Callable[..., Command],
    tmp_path: Path,
) -> None:
    tasks_module(POOL_TASKS)
    targets = defined(app, lambda ctx: None)
    results = {kind: targets[kind].delay() for kind in KINDS}
    worker = durable_worker("worker", "-P", pool, "-c", "2")
    assert {kind: results[kind].get(timeout=20) for kind in KINDS} == {
        "task": "plain task",
        "coroutine": "async coroutine",
        "machine": "plain machine",
        "amachine": "async amachine",
    }
    children = worker.children("durable:default")
    assert worker.stop() == 0
    hooks = (tmp_path / "hooks").read_text().split("\n")[:-1]
    assert sorted(hooks) == sorted(f"{what} {pid}" for what in ("start", "stop") for pid in children)
    assert "marked on_process_stop, raised" in worker.output()


FAILING_START = """
    import os

    @app.on_process_start
    def start():
        if not os.path.exists("ready"):
            open("tried", "a").write("x")
            raise SystemExit("no database")

    @app.task(name="task")
    def task(): return "ran"
"""


def test_no_step_runs_in_a_process_that_can_t_start(
    app: Durable, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command], tmp_path: Path
) -> None:
    tasks_module(FAILING_START)
    task = app.task(name="task", max_attempts=1)(lambda: None)
    result = task.delay()
    worker = durable_worker("worker", "-c", "1", wait=False)
    wait_until(lambda: (tmp_path / "tried").exists() and len((tmp_path / "tried").read_text()) >= 2, what="two tries")
    assert result.status == "runnable"
    (tmp_path / "ready").touch()
    assert result.get(timeout=20) == "ran"
    assert result.attempts == 1
    assert "marked on_process_start, raised" in worker.output()
