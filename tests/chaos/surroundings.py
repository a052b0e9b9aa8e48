"""Faults that are done to the server, its disk, the network and the clocks."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.chaos import effects
from tests.chaos.application import SCHEMA
from tests.chaos.cluster import CHILD, LEASE, Place, SmallDisk
from tests.chaos.faults import Fault, Made, Missed, World, taken, until

SILENT_FOR = 20.0
"""Seconds after which a connection that is silent still is reset, as a network might."""
SKEW_C = Path(__file__).with_name("skew.c")


class TerminateBackends(Fault):
    """pg_terminate_backend of some or all sessions that are not ours."""

    name, weight = "terminate-backends", 4.0

    def make(self, world: World, dice: random.Random) -> Made:
        with world.postgres.connect() as connection:
            pids = [row[0] for row in connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                " AND backend_type = 'client backend'"
                " AND application_name NOT LIKE 'chaos%' ORDER BY pid")]  # fmt: skip
            chosen = dice.sample(pids, dice.choice((1, 2, 4, len(pids))) if len(pids) >= 4 else len(pids))
            if not chosen:
                raise Missed("no sessions")
            ended = connection.execute("SELECT count(*) FROM unnest(%s) AS p WHERE pg_terminate_backend(p, 3000)",
                                       [chosen]).fetchone()  # fmt: skip
            if not ended or not ended[0]:
                raise Missed("no session ended")
            return {"sessions": ended[0]}


class CrashPostgres(Fault):
    """An immediate stop of the server, and a restart at once or after more than a lease."""

    name, weight = "crash-postgres", 1.2

    def make(self, world: World, dice: random.Random) -> Made:
        began = time.monotonic()
        away = dice.choice((0.0, 0.0, 0.5, LEASE + 0.5))
        world.postgres.crash(away)
        with world.postgres.connect() as connection:
            row = connection.execute(
                "SELECT extract(epoch FROM clock_timestamp() - pg_postmaster_start_time())"
            ).fetchone()
        ended = time.monotonic()
        world.restarts.append((began, ended))
        if row is None or row[0] > ended - began:
            raise Missed("the server was not started anew")
        return {"away": ended - began}


class LockTable(Fault):
    """An ACCESS EXCLUSIVE lock on the table of instances for a while."""

    name, weight = "lock-table", 1.0

    def make(self, world: World, dice: random.Random) -> Made:
        with world.postgres.connect() as holder, world.postgres.connect() as looker, ExitStack() as stack:
            stack.enter_context(holder.transaction())
            holder.execute("SET LOCAL lock_timeout = '5s'")
            holder.execute(f"LOCK TABLE {SCHEMA}.instances IN ACCESS EXCLUSIVE MODE")
            time.sleep(dice.uniform(0.3, 1.5))
            row = looker.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
        if not row or not row[0]:
            raise Missed("nobody waited")
        return {"waited": row[0]}


class DiskFull(Fault):
    """No room on the disk of the tables, until somebody was refused, and a little longer."""

    name, weight = "disk-full", 0.7

    def why_not(self) -> str | None:
        if os.geteuid() != 0:
            return "only root may mount a small disk"
        try:
            with tempfile.TemporaryDirectory() as folder:
                SmallDisk(Path(folder) / "probe", "1m").close()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"no tmpfs can be mounted: {getattr(error, 'stderr', None) or error}"
        return None

    def make(self, world: World, dice: random.Random) -> Made:
        postgres = world.postgres
        assert postgres.disk is not None, "the schedule has this fault"
        refusals = postgres.log().count("No space left")
        with postgres.lock, postgres.disk.full():  # a recovery from a crash would need room
            until(lambda: postgres.log().count("No space left") > refusals, 5, "a refusal")
            time.sleep(dice.uniform(0.2, 1.5))
        return {"refusals": postgres.log().count("No space left") - refusals}


class SkewedClock(Fault):
    """A worker command is started anew with a clock an hour ahead or behind, and keeps it until something ends it."""

    name, weight = "skew-clock", 0.7

    def why_not(self) -> str | None:
        return None if shutil.which("cc") else "no C compiler (cc) to build the library that shifts the clock"

    def make(self, world: World, dice: random.Random) -> Made:
        library = world.fleet.folder / "skew.so"
        if not library.exists():
            built = library.with_suffix(f".{time.monotonic_ns()}")
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(built), str(SKEW_C), "-ldl"], check=True)
            built.rename(library)
        hours = dice.choice((-1, 1))
        with taken(world.fleet.workers, dice) as place:
            command, ended = place.command, len(place.ended)
            place.extra = {"LD_PRELOAD": str(library), "CHAOS_SKEW": str(3600 * hours)}
            try:
                command.process.send_signal(signal.SIGTERM)
                until(lambda: place.command is not command, 25, "another command")
            finally:
                place.extra = {}
            until(lambda: self.bites(world, place), 20, "a step by the wrong clock")
            return {"hours": hours, "exit": place.ended[ended][1], "place": place.name}

    def bites(self, world: World, place: Place) -> bool:
        """Whether a child's effects are dated otherwise than we would."""
        for pid in place.children(CHILD):
            for path in world.fleet.effects.glob(f"{pid}-*"):
                *_, line = path.read_text().split("\n")[:-1] or [""]
                if line and abs(effects.parse(line).wall - time.time()) > 1800:
                    return True
        return False


class _Network(Fault):
    """Something the proxy does. One at a time would be tidy; they may overlap."""

    def make(self, world: World, dice: random.Random) -> Made:
        before = world.fleet.proxy.touched
        self.disturb(world, dice)
        touched = world.fleet.proxy.touched - before
        if not touched:
            raise Missed("nothing went through")
        return {"touched": touched}

    def disturb(self, world: World, dice: random.Random) -> None:
        raise NotImplementedError


class Delay(_Network):
    """Every chunk is late."""

    name, weight = "net-delay", 1.5

    def disturb(self, world: World, dice: random.Random) -> None:
        world.fleet.proxy.latency = dice.uniform(0.005, 0.15)
        time.sleep(dice.uniform(0.5, 2.0))
        world.fleet.proxy.latency = 0.0


class Cut(_Network):
    """Every connection is reset."""

    name, weight = "net-cut", 2.5

    def disturb(self, world: World, dice: random.Random) -> None:
        world.fleet.proxy.cut()


class HalfOpen(_Network):
    """Nothing is read or written while both sockets stay, beyond a lease or not; then it goes on, or all are reset."""

    name, weight = "net-half-open", 1.5

    def disturb(self, world: World, dice: random.Random) -> None:
        world.fleet.proxy.half_open(True)
        time.sleep(dice.choice((0.5, 1.5, LEASE + 1)))
        if dice.random() < 0.5:
            world.fleet.proxy.cut()
        world.fleet.proxy.half_open(False)


class LoseAnswer(_Network):
    """The answer to a write is lost together with its connection: it was done, and nobody was told."""

    name, weight = "net-lose-answer", 5.0

    def disturb(self, world: World, dice: random.Random) -> None:
        before = world.fleet.proxy.touched
        world.fleet.proxy.swallow = dice.randint(1, 3)
        until(lambda: world.fleet.proxy.touched > before, 3, "an answer to be lost")
        time.sleep(0.2)
        world.fleet.proxy.swallow = 0


class SilentOne(Fault):
    """One connection stays open and acknowledges what it is sent, and never answers; new ones work."""

    name, weight = "silent-one", 1.5

    def share(self, dice: random.Random) -> float:
        """Which part of the connections; 0: one."""
        return 0.0

    def make(self, world: World, dice: random.Random) -> Made:
        links = world.fleet.proxy.silence(self.share(dice), dice, lingers=dice.choice((0.0, 0.0, 2 * LEASE)))
        if not links:
            raise Missed("no connections")
        until = time.monotonic() + SILENT_FOR
        while time.monotonic() < until and any(not link.closed for link in links):
            time.sleep(0.1)
        world.fleet.proxy.reset(links)
        used = [link for link in links if link.waited_since is not None]
        if not used:
            raise Missed("nobody used it")
        return {"links": len(links), "waited": [(link.name, link.waited()) for link in used]}


class SilentShare(SilentOne):
    """A part of all connections."""

    name, weight = "silent-share", 1.0

    def share(self, dice: random.Random) -> float:
        return dice.uniform(0.2, 1.0)
