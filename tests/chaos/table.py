"""The table of faults."""

from __future__ import annotations

from tests.chaos import faults, surroundings
from tests.chaos.faults import Fault

FAULTS: list[Fault] = [
    faults.KillChild(),
    faults.KillAgent(),
    faults.KillSupervisor(),
    faults.KillBeat(),
    faults.KillProducer(),
    faults.Zombie(),
    faults.ZombieAgent(),
    faults.StopChild(),
    faults.StopBeat(),
    faults.Reload(),
    faults.Restart(),
    surroundings.TerminateBackends(),
    surroundings.CrashPostgres(),
    surroundings.LockTable(),
    surroundings.DiskFull(),
    surroundings.SkewedClock(),
    surroundings.Delay(),
    surroundings.Cut(),
    surroundings.HalfOpen(),
    surroundings.LoseAnswer(),
    faults.Upgrade(),
]
"""The order is part of what a seed means: new ones come last."""
