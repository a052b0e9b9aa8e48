"""Every benchmark, in the order in which they run together, with the sizes that make a run last 4 s or more."""

from __future__ import annotations

from benchmarks.backlog import backlog
from benchmarks.drain import drain
from benchmarks.enqueue import enqueue
from benchmarks.fanout import fanout
from benchmarks.idle import idle
from benchmarks.limits import limits
from benchmarks.memory import memory
from benchmarks.peers.measure import peers
from benchmarks.registry import Benchmark
from benchmarks.signals import signals
from benchmarks.snapshot import snapshot
from benchmarks.steady import latency
from benchmarks.steps import steps

BENCHMARKS = (
    Benchmark("enqueue", enqueue, 200_000, "tasks in batches; a twentieth of them one by one"),
    Benchmark("drain", drain, 200_000, "no-op tasks", processes=(1, 2, 4, 8)),
    Benchmark("steps", steps, 20_000, "five-step machines"),
    Benchmark("latency", latency, 200, "tasks, 20 a second"),
    Benchmark("signals", signals, 10_000, "parked instances, one signal each"),
    Benchmark("fanout", fanout, 10_000, "children of one parent"),
    Benchmark("limits", limits, 200_000, "unlimited tasks; half as many throttled ones"),
    Benchmark("backlog", backlog, 1_000_000, "runnable rows, and as many scheduled ones"),
    Benchmark("snapshot", snapshot, 300_000, "no-op tasks"),
    Benchmark("idle", idle, 60, "seconds to watch: rare duties come every 15", processes=(10,), least=1),
    Benchmark("memory", memory, 200_000, "no-op tasks", processes=(4,)),
    Benchmark("peers", peers, 100_000, "no-op tasks of the fastest; the slower ones get fewer", processes=(1, 2)),
)
