"""The rules of harm reject what they must: a good record, doctored to show what one fault did to another instance."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.doctored import (
    BEGIN,
    effects_of,
    executing,
    final,
    finish,
    good,
    history,
    insert,
    live,
    over,
    rules_broken,
    update,
)
from tests.chaos.harm_rules import FELT, GIVES_UP
from tests.chaos.model import TASKS, expected
from tests.chaos.proxy import Proxy
from tests.chaos.record import Record

WORKER = [("I", "workers", {"id": "7", "pid": "99"})]


def crashed(**columns: Any) -> Record:
    """A run whose only instance lost its first claim, entered or not: with a crash unless `columns` say otherwise."""
    record = good()
    record.homes = {99: "worker-0"}
    lost = live(token="1", **{"crashes": "1", **columns})
    record.history = history(
        WORKER,
        insert(live()),
        update(executing()),
        update(lost),
        update(executing(token=2, crashes=lost["crashes"])),
        update(live(token="2", version="1")),
        update(executing(token=3, version=1)),
        finish(over(token=3, version=2)),
    )
    record.effects = [*effects_of(1, 0, 1, 10.0), *effects_of(1, 0, 2, 11.0), *effects_of(1, 1, 3, 12.0)]
    record.rows = [final(token=3)]
    record.clock = BEGIN
    return record


def fault(kind: str, begin: float = 2.0, end: float = 3.0, **what: Any) -> dict[str, Any]:
    return {"kind": kind, "bitten": True, "t": begin, "end": end, **what}


def held(kind: str = "held-instances", **what: Any) -> dict[str, Any]:
    return fault(kind, 20.0, 25.5, **{"released": 25.0, "waiting": 0.9, **what})


def busy(pid: int, *times: float, machine: str = "chain", before: int = 20) -> list[Any]:
    """Steps of another instance that a process began then, and some before."""
    early = [18.0 + n / 100 for n in range(before)]
    return [one for n, at in enumerate([*early, *times])
            for one in effects_of(1, 0, 1, at, pid=pid, machine=machine, mark=f"w{n}")]  # fmt: skip


EXPLAINED = {
    "its process was killed": fault("kill-child", pids=[99]),
    "its command was stopped": fault("stop-command", pids=[1], place="worker-0"),
    "its lease was held": fault("held-worker", place="worker-0", released=3.0, waiting=0.0),
    "the network was away": fault("net-half-open"),
    "a connection was silent": fault("silent-one", waited=[("durable chaos agent", 2.0)]),
}


@pytest.mark.parametrize("what", EXPLAINED)
def test_a_crash_with_a_cause_is_no_harm(what: str) -> None:
    record = crashed()
    record.faults = [EXPLAINED[what]]
    assert rules_broken(record) == set()


UNEXPLAINED = {
    "there was no fault": [],
    "another process was killed": [fault("kill-child", pids=[98], place="worker-1")],
    "another instance forked, and a lock was held": [
        fault("fork-step"),
        fault("held-signal", released=2.5, waiting=0.0),
    ],
    "it was long ago": [fault("kill-child", -90.0, -80.0 - FELT, pids=[99])],
}


@pytest.mark.parametrize("what", UNEXPLAINED)
def test_a_crash_without_a_cause_is_harm(what: str) -> None:
    record = crashed()
    record.faults = UNEXPLAINED[what]
    assert rules_broken(record) == {"I-51", "I-52"}


def test_a_step_run_again_after_a_release_is_harm() -> None:
    record = crashed(crashes="0")
    assert rules_broken(record) == {"I-52"}
    record.effects = record.effects[2:]  # it had not been entered when it was released
    assert rules_broken(record) == set()


def test_the_neighbour_of_poison_may_crash_with_it() -> None:
    record = crashed()
    record.effects += [replace(one, machine="poison", version=0) for one in effects_of(1, 0, 1, 3.0, mark="-")]
    assert "I-51" not in rules_broken(record)


def test_a_forked_child_that_works_is_harm() -> None:
    record = good()
    record.effects += [replace(effects_of(1, 0, 1, 9.0, pid=99, mark="return")[0], kind="fork", machine="fork")]
    assert rules_broken(record) == {"I-53"}
    record.effects[-1] = replace(record.effects[-1], pid=98)
    assert rules_broken(record) == set()


def test_a_forked_child_that_stays_is_reported() -> None:
    record = good()
    record.outlived[98] = "return"
    assert rules_broken(record) == {"I-54"}


@pytest.mark.parametrize("waited", [None, GIVES_UP + 1.0])
def test_waiting_on_a_silent_connection_is_reported(waited: float | None) -> None:
    record = good()
    record.faults = [fault("silent-one", waited=[("durable chaos worker", 2.0)])]
    assert rules_broken(record) == set()
    record.faults = [fault("silent-share", waited=[("durable chaos worker", 2.0), ("durable chaos agent", waited)])]
    assert rules_broken(record) == {"I-55"}


def test_a_process_that_a_lock_stops_is_harm() -> None:
    record = good()
    record.effects += busy(5, 18.0, 19.0, 26.0)
    record.faults = [held()]
    assert "I-56" in rules_broken(record)


@pytest.mark.parametrize(
    ("steps", "faults"),
    [
        (busy(5, 18.0, 22.0, 26.0), [held()]),
        (busy(5, 18.0, 19.0, 26.0), [held(waiting=0.0)]),
        (busy(5, 18.0, 19.0, 26.0), [held(), fault("crash-postgres", 21.0, 22.0)]),
        (busy(5, 18.0, 19.0, 26.0, machine="fork-busy"), [held()]),
        (busy(5, 18.0, 19.0), [held()]),
        (busy(5, 18.0, 19.0, 26.0, before=0), [held()]),
        (busy(5, 18.0, 19.0, 26.0), [held("held-worker", place="worker-0")]),
    ],
    ids=["went on", "no work", "the server was away", "in a long step", "had ended", "ran alone", "its own lease"],
)
def test_a_process_with_a_reason_to_pause(steps: Any, faults: Any) -> None:
    record = good()
    record.effects += steps
    record.homes[5] = "worker-0"
    record.faults = faults
    assert "I-56" not in rules_broken(record)


def test_a_schedule_that_another_stops_is_harm() -> None:
    record = good()
    record.clock = BEGIN
    record.faults = [held("held-key")]
    assert rules_broken(record) == {"I-57"}
    fired = [("I", "instances", live(3, machine="tick"))]
    schedules = [("U", "schedules", {"name": "tick", "next_at": f"1970-01-12 13:46:{at}+00", "fired": str(n),
                                     "skipped": "0"}) for n, at in enumerate((40, 50))]  # fmt: skip
    record.history += [replace(record.history[0], lsn=90, at=BEGIN + 19, changes=[schedules[0]])]
    record.history += [replace(record.history[0], lsn=91, at=BEGIN + 23, changes=[*fired, schedules[1]])]
    assert "I-57" not in rules_broken(record)


def test_every_guilty_instance_has_a_right_end() -> None:
    record = good()
    record.rows[0].update(machine="exit", state={"kwargs": {"k": "a", "place": "postrun", "kind": "exit"}, "args": []})
    record.rows[0].update(status="failed", version=1)
    assert "I-19" in rules_broken(record)
    assert "fork" in TASKS
    assert expected("exit", {"k": "a", "place": "on_retry", "kind": "exit"}).version == 2


@contextmanager
def echoing(folder: Path) -> Iterator[Proxy]:
    """A proxy before a server that answers what it was asked."""
    path = folder / ".s.PGSQL.1"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                session, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(session,), daemon=True).start()

    def answer(session: socket.socket) -> None:
        with session:
            while data := session.recv(100):
                session.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    proxy = Proxy(f"host={folder} port=1")
    try:
        yield proxy
    finally:
        proxy.close()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_a_silent_connection_stays_open(tmp_path: Path) -> None:
    with echoing(tmp_path) as proxy, closing(socket.create_connection(("127.0.0.1", proxy.port))) as one:
        one.sendall(b"application_name\0first\0")
        assert one.recv(100).startswith(b"application_name")
        (link,) = proxy.silence(0.0, random.Random(1), lingers=0.0)
        one.sendall(b"hello?")
        one.settimeout(0.2)
        with pytest.raises(TimeoutError):
            one.recv(100)
        with closing(socket.create_connection(("127.0.0.1", proxy.port))) as other:
            other.sendall(b"hello")
            assert other.recv(100) == b"hello"
        assert (link.name, link.waited()) == ("first", None)
        one.close()
        _until(lambda: link.closed)
        waited = link.waited()
        assert waited is not None
        assert 0.2 <= waited < 5


def _until(condition: Callable[[], object]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(wait(), 10))
