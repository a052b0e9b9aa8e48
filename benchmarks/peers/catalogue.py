"""Every peer, in the order in which they run."""

from __future__ import annotations

from benchmarks.peers.absurd import Absurd
from benchmarks.peers.base import Peer
from benchmarks.peers.celery import CeleryRabbitmq, CeleryRedis
from benchmarks.peers.chancy import Chancy
from benchmarks.peers.dbos import Dbos
from benchmarks.peers.dramatiq import DramatiqRabbitmq, DramatiqRedis
from benchmarks.peers.oban import Oban
from benchmarks.peers.pgqueuer import PgQueuerAsyncpg, PgQueuerPsycopg
from benchmarks.peers.procrastinate import Procrastinate

PEERS: tuple[type[Peer], ...] = (
    PgQueuerAsyncpg,
    PgQueuerPsycopg,
    Oban,
    Chancy,
    Procrastinate,
    Absurd,
    Dbos,
    CeleryRedis,
    CeleryRabbitmq,
    DramatiqRedis,
    DramatiqRabbitmq,
)
BY_KIND = {peer.__name__: peer for peer in PEERS}
