"""An app that is used, then forked (as gunicorn does with --preload), then used on both sides."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

import pytest

from durable import Durable
from tests.fix_rows import Rows

HEAD = """
import asyncio, gc, os, sys, threading
from durable import Durable
app = Durable("fork", dsn=sys.argv[1], schema=sys.argv[2], pool_size=1)

@app.task(name="task")
def task(n): ...

def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
            gc.collect()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return pid

def backends():
    with app._pool.connection() as connection:
        return connection.info.backend_pid

def ended(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""

SCRIPTS = {
    "sync": """
        task.delay(1)
        before = backends()
        pids = [in_child(lambda: [task.delay(n) for n in range(5)]) for _ in range(3)]
        for n in range(20):
            task.delay(n)
        for pid in pids:
            ended(pid)
        assert backends() == before, "the parent's connection is the same one, and it works"
        task.delay(2)
    """,
    "the child opens its own": """
        before = backends()
        reader, writer = os.pipe()
        ended(in_child(lambda: os.write(writer, str(backends()).encode())))
        assert int(os.read(reader, 100)) != before
        assert backends() == before
    """,
    "a batch and a wait": """
        results = app.insert_many([(task, {"args": (n,)}) for n in range(3)])
        try:
            results[0].get(timeout=0.05)
        except TimeoutError:
            pass

        def work():
            with app.batch():
                again = task.delay(5)
            assert again.status == "runnable"
            try:
                app.result(again.id).get(timeout=0.05)
            except TimeoutError:
                return
            raise AssertionError("it waited for nothing")

        ended(in_child(work))
        assert results[1].status == "runnable"
    """,
    "async on both sides": """
        async def main():
            result = await task.adelay(1)
            try:
                return await result.astatus()
            finally:
                await app.aclose()

        assert asyncio.run(main()) == "runnable"

        def work():
            assert asyncio.run(main()) == "runnable"
            task.delay(1)

        task.delay(0)
        ended(in_child(work))
        assert asyncio.run(main()) == "runnable"
        task.delay(3)
    """,
    "the child closes": """
        task.delay(1)
        before = backends()

        def work():
            task.delay(2)
            app.close()

        ended(in_child(work))
        ended(in_child(app.close))
        assert backends() == before
    """,
    "forked while another thread enqueues": """
        stop = threading.Event()
        errors = []

        def enqueue():
            try:
                while not stop.is_set():
                    task.delay(1)
            except BaseException as error:
                errors.append(error)

        task.delay(0)
        thread = threading.Thread(target=enqueue)
        thread.start()
        for _ in range(5):
            ended(in_child(lambda: [task.delay(n) for n in range(3)]))
        stop.set()
        thread.join()
        assert not errors, errors
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_parent_and_child_both_keep_working(app: Durable, rows: Rows, database: str, name: str) -> None:
    script = HEAD + textwrap.dedent(SCRIPTS[name])
    done = subprocess.run(
        [sys.executable, "-c", script, database, app.schema], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr, done.stderr
    if name == "sync":
        assert rows.fetch("SELECT count(*) AS n FROM {schema}.instances") == [{"n": 1 + 15 + 20 + 1}]


def test_a_script_that_never_closes_its_app_ends_at_once_and_silently(app: Durable, database: str) -> None:
    script = HEAD + "task.delay(1)\nimport time\nprint(time.time())\n"
    done = subprocess.run(
        [sys.executable, "-c", script, database, app.schema], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert time.time() - float(done.stdout) < 5
