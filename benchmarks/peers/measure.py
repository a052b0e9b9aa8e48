"""Peers beside durable on the same work: a drain, five-step work, and how soon an idle worker starts what comes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import psycopg
from psycopg.conninfo import make_conninfo

from benchmarks import latency, steps
from benchmarks.database import Database
from benchmarks.drain import run_durable, run_floor
from benchmarks.figures import FLOOR, OURS, Measure, Series, Target, percentile
from benchmarks.peers.base import POSTGRES, Peer
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.servers import reason, servers
from benchmarks.registry import Size
from benchmarks.stamps import stamps
from benchmarks.workers import ROOT

TIMES = {
    "pgqueuer (asyncpg)": 1.5,
    "oban": 8.0,
    "chancy": 8.0,
    "procrastinate": 20.0,
    "absurd": 20.0,
    "dbos": 20.0,
    "celery (redis)": 20.0,
}
"""How many times a peer's jobs per second ours are to be."""
LEAST, SENT, WARM, LIMIT = 20, 200, 5, 600.0
"""Tasks of the slowest peer at the smallest size; stamps per run, and before it; seconds an act of a peer may take."""


class PeerFailed(RuntimeError):
    """A peer's process ended badly; the message ends with what it said last."""


def act(kind: type[Peer], environment: Mapping[str, str], action: str, *arguments: object) -> str:
    """Do one act of a peer in a process of its own and return what it printed. Raises PeerFailed."""
    command = [sys.executable, "-m", "benchmarks.peers", kind.__name__, action, *map(str, arguments)]
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired as error:
        raise PeerFailed(f"{action} took more than {LIMIT:g} s") from error
    if ran.returncode != 0:
        said = (ran.stderr.strip() or ran.stdout.strip() or f"exit code {ran.returncode}").splitlines()[-1]
        raise PeerFailed(f"{action}: {said}")
    return ran.stdout


@contextmanager
def working(kind: type[Peer], environment: Mapping[str, str], processes: int) -> Iterator[None]:
    """A peer's worker processes, stopped by SIGTERM and after ten seconds by SIGKILL."""
    number, each = (1, processes) if kind.forks else (processes, 1)
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", kind.__name__, "work", str(each)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(number)
    ]
    try:
        yield
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, 9)  # its own session: it and its children
                worker.wait()


def watched(kind: type[Peer], environment: Mapping[str, str], processes: int, count: int) -> float:
    """Return how many of `count` end per second; who looks is there before the workers are. Raises PeerFailed."""
    watcher = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.peers", kind.__name__, "watch", str(count)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        with working(kind, environment, processes):
            said, wrong = watcher.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        raise PeerFailed(f"not every one of {count} tasks ended within {LIMIT:g} s") from error
    finally:
        watcher.kill()
        watcher.communicate()
    if watcher.returncode != 0:
        raise PeerFailed(f"watch: {(wrong.strip() or 'it ended').splitlines()[-1]}")
    return float(said)


@contextmanager
def prepared(kind: type[Peer], database: Database, environment: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """A peer with an empty database of its own, and the environment for its acts."""
    own = dict(environment)
    if POSTGRES in kind.servers:
        _recreate(database)
        own["BENCH_POSTGRES"] = make_conninfo(database.dsn, dbname="bench_peer")
    try:
        act(kind, own, "prepare")
        yield own
    finally:
        if POSTGRES in kind.servers:
            with psycopg.connect(database.dsn, autocommit=True) as connection:
                connection.execute("DROP DATABASE IF EXISTS bench_peer WITH (FORCE)")


def _recreate(database: Database) -> None:
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS bench_peer WITH (FORCE)")
        connection.execute("CREATE DATABASE bench_peer")


def drained(
    kind: type[Peer], database: Database, environment: Mapping[str, str], processes: int, count: int, filled: str
) -> float:
    """Return how many of `count` ended per second, from the first to the last, on tables that were analyzed."""
    with prepared(kind, database, environment) as own:
        act(kind, own, filled, count)
        if POSTGRES in kind.servers:
            with psycopg.connect(own["BENCH_POSTGRES"], autocommit=True) as connection:
                connection.execute("VACUUM ANALYZE")
                connection.execute("CHECKPOINT")
        return watched(kind, own, processes, count)


def started(kind: type[Peer], database: Database, environment: Mapping[str, str], count: int) -> list[float]:
    """Return waits in ms from the call that enqueues to the start of the step, 20 a second."""
    with (
        stamps() as place,
        prepared(kind, database, {**environment, **place.environment}) as own,
        working(kind, own, 1),
    ):
        try:
            act(kind, own, "pace", WARM, latency.INTERVAL)
            place.take(WARM)
            act(kind, own, "pace", count, latency.INTERVAL)
            return place.take(count)
        except TimeoutError as error:
            raise PeerFailed("not every task started") from error


class Round:
    """Contenders of one measure: those that failed once are not run again, and say why."""

    def __init__(self, what: str, unit: str) -> None:
        self.measure = Measure(what, unit, [])
        self._acts: list[tuple[Series, Callable[[], float]]] = []

    def add(self, name: str, run: Callable[[], float], setting: str = "", missing: str = "") -> None:
        """Add a contender, or why it cannot be one."""
        series = Series(name, setting=setting, missing=missing)
        self.measure.series.append(series)
        if not missing:
            self._acts.append((series, run))

    def run(self) -> None:
        """Run each contender once."""
        for series, run in self._acts:
            if series.missing:
                continue
            try:
                series.runs.append(run())
            except PeerFailed as error:
                series.runs.clear()
                series.missing = f"failed: {error}"


def unavailable(kind: type[Peer]) -> str:
    """Return why a peer cannot be run here; empty when it can."""
    if missing := kind.missing():
        return f"not installed: {missing}"
    return next((why for why in map(reason, kind.servers) if why), "")


def peers(database: Database, size: Size) -> list[Measure]:
    """Run other systems on the same work, each in its own processes, at its documented best setting."""
    here = [kind for kind in PEERS if not unavailable(kind)]
    with servers({server for kind in here for server in kind.servers}) as environment:
        rounds = [_drains(database, size, environment, processes) for processes in size.processes]
        rounds += [_chains(database, size, environment), *_latencies(database, size, environment)]
        for _ in range(size.runs):
            for one in rounds:
                one.run()
    return [one.measure for one in rounds]


def _drains(database: Database, size: Size, environment: Mapping[str, str], processes: int) -> Round:
    plural = "es" if processes > 1 else ""
    made = Round(f"peers: drain of no-op tasks, {processes} worker process{plural}", "jobs/s")
    made.add(FLOOR, partial(run_floor, database, size.count, processes))
    made.add(OURS, partial(run_durable, database, size.count, processes), "results kept")
    for kind in PEERS:
        count = max(LEAST, int(size.count * kind.share))
        run = partial(drained, kind, database, environment, processes, count, "fill")
        made.add(kind.name, run, _setting(kind, count), unavailable(kind))
    made.measure.targets = [Target(OURS, times, name) for name, times in TIMES.items()]
    return made


def _chains(database: Database, size: Size, environment: Mapping[str, str]) -> Round:
    made = Round("peers: work of five steps, 2 worker processes", "steps/s")
    ours = max(LEAST, size.count // steps.STEPS)
    made.add(f"{OURS}, plain", partial(steps.run, database, 2, ours, "plain_chain", "a", steps.STEPS))
    made.add(f"{OURS}, inline", partial(steps.run, database, 2, ours, "inline_chain", "a", steps.STEPS))
    for kind in PEERS:
        if kind.chains:
            count = max(LEAST, int(size.count * kind.share / steps.STEPS))
            made.add(
                kind.name, partial(_chain, kind, database, environment, count), _setting(kind, count), unavailable(kind)
            )
    return made


def _chain(kind: type[Peer], database: Database, environment: Mapping[str, str], count: int) -> float:
    ends = count * (steps.STEPS if kind.name.startswith("celery") else 1)
    with prepared(kind, database, environment) as own:
        act(kind, own, "chains", count)
        rate = watched(kind, own, 2, ends)
    return rate if ends > count else rate * steps.STEPS


class _Latencies:
    """p50 and p99 of one run, read by two measures."""

    def __init__(self, wait: Callable[[], list[float]]) -> None:
        self._wait, self._waits = wait, list[float]()

    def p50(self) -> float:
        """Run, and return the median."""
        self._waits.clear()
        self._waits = self._wait()
        return percentile(self._waits, 50)

    def p99(self) -> float:
        """Return the 99th percentile of the run before. Raises PeerFailed when that failed."""
        if not self._waits:
            raise PeerFailed("see p50")
        return percentile(self._waits, 99)


def _latencies(database: Database, size: Size, environment: Mapping[str, str]) -> list[Round]:
    count = min(SENT, max(LEAST, size.count // 100))
    middle, tail = (Round(f"peers: enqueued to step start, 20 a second, {part}", "ms") for part in ("p50", "p99"))
    ours = _Latencies(lambda: latency.step_starts(database, 2, count))
    middle.add(OURS, ours.p50)
    tail.add(OURS, ours.p99)
    for kind in PEERS:
        both = _Latencies(partial(started, kind, database, environment, count))
        middle.add(kind.name, both.p50, kind.described() if not kind.missing() else "", unavailable(kind))
        tail.add(kind.name, both.p99, "", unavailable(kind))
    return [middle, tail]


def _setting(kind: type[Peer], count: int) -> str:
    return f"{count:,} tasks; {kind.described()}" if not kind.missing() else ""
