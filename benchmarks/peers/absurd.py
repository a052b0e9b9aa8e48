"""Absurd: its SQL by absurdctl, its Python SDK."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import stamps
from benchmarks.peers.base import STEPS, PostgresPeer

QUEUE = "bench"


class Absurd(PostgresPeer):
    """Tasks are rows that stay, with a checkpoint per step."""

    name = "absurd"
    setting = "batch 100, concurrency 1 per process, polled each 20 ms, results kept"
    distributions = ("absurd-sdk", "absurdctl")
    share = 0.03
    chains = True
    FINISHED = (
        "SELECT count(*), extract(epoch FROM min(completed_at)), extract(epoch FROM max(completed_at))"
        f" FROM absurd.r_{QUEUE} WHERE state = 'completed'"
    )

    def _app(self) -> Any:
        from absurd_sdk import Absurd as App

        app = App(self.dsn, queue_name=QUEUE)

        @app.register_task(name="noop")
        def noop(params: Any, ctx: Any) -> None: ...

        @app.register_task(name="stamp")
        def stamp(params: Any, ctx: Any) -> None:
            stamps.stamp(params["sent"])

        @app.register_task(name="chain")
        def chain(params: Any, ctx: Any) -> None:
            for n in range(STEPS):
                ctx.step(f"step-{n}", lambda n=n: n)

        return app

    def prepare(self) -> None:
        program = Path(sys.executable).with_name("absurdctl")
        subprocess.run([str(program), "init", "-d", self.dsn], check=True, stdout=subprocess.DEVNULL)
        self._app().create_queue()

    def _spawn(self, count: int, task: str) -> None:
        app = self._app()
        for _ in range(count):
            app.spawn(task, {})

    def fill(self, count: int) -> None:
        self._spawn(count, "noop")

    def fill_chains(self, count: int) -> None:
        self._spawn(count, "chain")

    def pace(self, count: int, interval: float) -> None:
        app = self._app()
        for _ in range(count):
            app.spawn("stamp", {"sent": time.monotonic_ns()})
            time.sleep(interval)

    def work(self, processes: int) -> None:
        self._app().start_worker(batch_size=100, poll_interval=0.02)
