"""The table of faults."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

from tests.chaos import faults, foreign, guilty, surroundings
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
    guilty.ForkStep(),
    guilty.ForkBusy(),
    guilty.ForkOrphan(),
    guilty.ExitStep(),
    guilty.ExitHook(),
    guilty.ExitLoop(),
    surroundings.SilentOne(),
    surroundings.SilentShare(),
    foreign.HeldInstances(),
    foreign.HeldParent(),
    foreign.HeldSignal(),
    foreign.HeldKey(),
    foreign.HeldSchedule(),
    foreign.HeldWorker(),
    foreign.HeldLimit(),
    foreign.HeldDuty(),
]
"""The order is part of what a seed means: new ones come last."""


def chosen(patterns: Sequence[str]) -> list[str]:
    """Return the names that these patterns (`fork-*`) name. Raises ValueError for one that names none."""
    found: list[str] = []
    for pattern in patterns:
        names = [fault.name for fault in FAULTS if fnmatch(fault.name, pattern)]
        if not names:
            raise ValueError(f"no fault is called {pattern}")
        found += names
    return found
