"""Puts together what runs the steps of a worker process: one slot, or many."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from durable.app import Durable
from durable.instance import Claimed
from durable.runtime.buffer import Buffer, Outbox
from durable.runtime.coroutines import CoroutineRunner
from durable.runtime.executor import Executor
from durable.runtime.many_pacing import ManyPacing
from durable.runtime.many_slots import STEP_CONNECTIONS, ManySlots
from durable.runtime.pacing import Pacing
from durable.runtime.shared import Bell, Seat
from durable.runtime.shared_buffer import SharedBuffer
from durable.runtime.slot import Slot
from durable.runtime.slots import Policy, Rows, Slots
from durable.runtime.step_transaction import StepConnections


@dataclass(frozen=True, slots=True)
class Process:
    """What there is of a worker process already; the functions as in `Slot` and `StepConnections`."""

    app: Durable
    queue: str
    outbox: Outbox
    seat: Seat
    bell: Bell
    worker: Callable[[], int]
    owns: Callable[[Claimed], bool]
    stopping: Callable[[], bool]

    def connections(self, coroutines: CoroutineRunner, most: int = 1) -> StepConnections:
        """Return its connections for steps."""
        name = f"durable {self.app.name} step {self.queue} {os.getpid()}"
        return StepConnections(self.app, name, coroutines, self.worker, self.stopping, most)


class Parts(NamedTuple):
    """What runs steps, and what the engine needs to know of it."""

    slot: Slots
    buffer: Rows
    pacing: Policy
    step_connections: StepConnections


def one_slot(process: Process) -> Parts:
    """The main thread runs one step after another."""
    app, seat, outbox = process.app, process.seat, process.outbox
    coroutines = CoroutineRunner()
    step_connections = process.connections(coroutines)
    executor = Executor(app, coroutines, step_connections.begin)
    buffer = Buffer(process.bell.ring)
    slot = Slot(executor, buffer, outbox, seat, process.owns, process.stopping)
    return Parts(slot, buffer, Pacing(app.conf, slot, buffer, outbox, seat), step_connections)


def many_slots(process: Process, kind: str, allowed: Callable[[], int]) -> tuple[Parts, ManySlots]:
    """As many slots as are allowed at the moment. `kind`: THREADS or ASYNCIO."""
    app, seat, outbox, roster = process.app, process.seat, process.outbox, process.seat.roster
    assert roster is not None, "made with the seats"
    buffer = SharedBuffer(process.bell.ring, roster.slots, allowed)
    most = min(allowed(), STEP_CONNECTIONS)
    slots = ManySlots(
        app,
        kind,
        buffer,
        outbox,
        seat,
        lambda coroutines: process.connections(coroutines, most),
        process.owns,
        process.stopping,
    )
    return Parts(slots, buffer, ManyPacing(app.conf, slots, buffer, outbox, seat), slots.step_connections), slots
