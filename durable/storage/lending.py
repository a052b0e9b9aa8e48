"""What the pool of a process's threads and the pool of an event loop have in common."""

from __future__ import annotations

import select

import psycopg

from durable.storage.bounded import AsyncBoundedConnection, BoundedConnection

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.0
"""Seconds between attempts to connect: the first pause, and the one that doubling ends at."""
LIFETIME = 3600.0
"""Seconds after which a connection is closed when it comes back: a server process keeps growing, and names move."""
_LOOKS = 3


class NoneFreeError(Exception):
    """Every connection of the pool was in use for as long as the caller waited."""


def is_alive(connection: BoundedConnection | AsyncBoundedConnection) -> bool:
    """Return whether an idle connection is still open, without waiting and without a round trip.

    A connection that the server has closed is readable. So is one with a notice, which is read here.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN | select.POLLHUP | select.POLLERR)
    for _ in range(_LOOKS):
        if not poll.poll(0):
            return True
        try:
            connection.pgconn.consume_input()
        except psycopg.Error:
            return False
    return False


def may_be_kept(connection: BoundedConnection | AsyncBoundedConnection, now: float) -> bool:
    """Return whether a connection that comes back can be lent again."""
    status = connection.pgconn.transaction_status
    return status == psycopg.pq.TransactionStatus.IDLE and now - connection.opened_at < LIFETIME
