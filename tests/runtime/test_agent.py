"""What an agent finds when it starts: claims of commands that are gone, and of others that only look like them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from durable import Durable
from durable.runtime import identity
from durable.runtime.agent import Agent
from durable.runtime.shared import Bell, SharedSeats
from durable.storage import workers
from durable.storage.workers import Identity
from tests.fix_rows import Rows, done
from tests.interleaving import Held, flushing, wait_until_blocked

HERE = identity.own("worker", "predecessor", "default")


@pytest.fixture
def agent(app: Durable) -> Iterator[Agent]:
    """An agent that does only what it is told."""
    reader, writer = os.pipe()
    bell = Bell()
    agent = Agent(app, "successor", ["default"], SharedSeats(1), [bell], reader)
    yield agent
    agent._link.drop()
    for descriptor in (reader, writer, bell.reader, bell._writer):
        os.close(descriptor)


@pytest.fixture(scope="module")
def gone() -> Identity:
    """A command of this host and boot that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = identity.process_start(process.pid)
    assert identity.exists(process.pid, started)
    process.communicate(b"\n")
    assert not identity.exists(process.pid, started)
    return replace(HERE, pid=process.pid, command_pid=process.pid, command_start=started)


def lease(rows: Rows, who: Identity) -> int:
    return rows.run(workers.register(who, 600.0))


def test_claims_of_a_command_that_is_gone_go_back_at_once_and_nobody_elses(
    rows: Rows, agent: Agent, gone: Identity
) -> None:
    """Leases of ten minutes: it is the process that counts, and only where its pid means something."""
    leases = {
        "gone": lease(rows, gone),
        "its pid was given to another": lease(rows, replace(HERE, command_start="1")),
        "alive": lease(rows, HERE),
        "another host": lease(rows, replace(gone, host="elsewhere")),
        "another boot or container": lease(rows, replace(gone, boot_id=f"{gone.boot_id}0")),
    }
    claimed = {who: rows.claimed(worker)[0] for who, worker in leases.items()}
    agent._release_predecessors()
    assert {who for who, row in claimed.items() if rows.status(row.id) == "runnable"} == {
        "gone",
        "its pid was given to another",
    }
    living = {leases[who] for who in ("alive", "another host", "another boot or container")}
    assert rows.run(workers.heartbeat(list(leases.values()), 600)) == living
    row = rows.live(claimed["gone"].id)
    assert row is not None
    assert (row["crashes"], row["attempt"]) == (1, 0)


def test_a_claim_of_a_dead_command_that_commits_at_this_moment_is_met(rows: Rows, agent: Agent, gone: Identity) -> None:
    """Its server process may outlive it by a statement."""
    worker, backend = lease(rows, gone), rows.other()
    (instance,) = rows.insert()
    backend.connection.execute("BEGIN")
    assert [row.id for row in backend.claim(worker)] == [instance]
    agent._link.connection.execute("SET lock_timeout = 0")  # else it comes back another time
    pid = agent._link.connection.info.backend_pid
    releasing = rows.background(agent._release_predecessors)
    wait_until_blocked(rows, pid, releasing)
    backend.connection.execute("COMMIT")
    releasing.result(20)
    assert rows.status(instance) == "runnable"
    assert backend.claim(worker) == []


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_an_outcome_of_a_dead_command_that_commits_at_this_moment_is_passed_by(
    rows: Rows, agent: Agent, gone: Identity, end: str
) -> None:
    worker = lease(rows, gone)
    (claimed,) = rows.claimed(worker)
    held = Held(rows.other(), flushing(worker, done(claimed))).until(None)
    agent._release_predecessors()
    assert rows.status(claimed.id) == "executing"
    if end == "commit":
        held.commit()
    else:
        held.rollback()
    agent._reap()
    assert rows.status(claimed.id) == ("done" if end == "commit" else "runnable")
