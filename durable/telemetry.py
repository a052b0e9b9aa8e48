"""Events of this process, and the handlers that hear them; callbacks at the start and the end of a process.

    telemetry.attach("step.stop", lambda event, measurements, metadata: ...)

A handler runs at once, in the thread that emits: a slow one slows the worker down. One that raises is logged and
detached, nothing else. Handlers attached while the app is imported are there in every process forked afterwards.
Durations are seconds. An event that nobody hears costs one look into a dict.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from durable import forks
from durable.containment import is_contained
from durable.errors import ValidationError
from durable.validation import near, shown

log = logging.getLogger(__name__)


class Event(NamedTuple):
    """One kind of event: the names of its measurements and of its metadata, and when it happens."""

    measurements: tuple[str, ...]
    metadata: tuple[str, ...]
    meaning: str


EVENTS: Mapping[str, Event] = MappingProxyType(
    {
        "step.stop": Event(("duration",), ("id", "fsm", "step", "kind"), "a step has run; its outcome commits next"),
        "pick.stop": Event(("count", "demand"), ("queue", "worker"), "a claim came back with `count` of `demand` rows"),
        "scheduler.saturation": Event(
            ("in_flight", "buffer", "concurrency", "prefetch", "flush_lag"),
            ("queue",),
            "a worker process works: at most once a second, and once more when it comes to rest",
        ),
        "scheduler.drain": Event(("released", "in_flight"), ("queue",), "a worker process is asked to stop"),
        "scheduler.reclaimed": Event(
            ("count",), ("queue",), "claims were taken back that a dead process, or nobody, knew of"
        ),
        "concurrency.contended": Event(
            ("count",), ("id", "fsm", "concurrency_key"), "a claim found a row's key taken, and parked the row"
        ),
        "concurrency.throttled": Event(
            ("wanted", "admitted"), ("key", "queue"), "a gate had too few slots for a claim"
        ),
        "outcome.stale": Event(("count",), ("id", "fsm", "step", "kind"), "an outcome came when its claim was lost"),
        "reaper.reaped": Event(("count",), ("ids",), "rows of workers that stopped answering were taken back"),
        "signal.unread": Event(
            ("count",),
            ("id", "fsm", "step", "rerun"),
            "signals arrived while a step ran that ended its instance: they are unread, or the step runs again",
        ),
        "await.timeout": Event(("count",), (), "parks on signals ended by their timeout"),
        "gc.swept": Event(("count", "buckets", "gates"), (), "garbage was collected"),
        "rate_limit.throttled": Event(
            ("wanted", "granted"), ("key", "queue"), "a bucket had too few tokens for a claim"
        ),
        "rate_limit.contended": Event(("count",), ("queue",), "another claim held the tokens of rows"),
        "rate_limit.unknown": Event(
            ("count",), ("key", "name", "fsm", "step"), "a claim parked rows whose rate limit does not exist any more"
        ),
    }
)
"""Every event by name."""

Handler = Callable[[str, Mapping[str, Any], Mapping[str, Any]], object]
"""Called with (event, measurements, metadata); what it returns is ignored."""

ROLES = ("worker", "agent", "beat")
"""What a process of durable can be: it runs steps; it is the helper of a worker command; it is a beat."""

Hook = Callable[[str], object]
"""Called with the role of the process."""
H = TypeVar("H", bound=Hook)

attached: dict[str, tuple[Handler, ...]] = {}
"""The handlers by event; an event without any is not in it. To be read only: `attach` and `detach` change it."""

_lock = threading.Lock()
_at_start: list[Hook] = []
_at_stop: list[Hook] = []


def attach(event: str, handler: Handler) -> None:
    """Have `handler` called at every such event in this process, and in those forked from it later.

    Attaching the same one again changes nothing. Raises ValidationError for an unknown event or no function.
    """
    _check(event)
    if not callable(handler):
        raise ValidationError(f"a handler is a function of (event, measurements, metadata), got {shown(handler)}")
    with _lock:
        handlers = attached.get(event, ())
        if handler not in handlers:
            attached[event] = (*handlers, handler)


def detach(event: str, handler: Handler) -> bool:
    """Take a handler off an event; return whether it was on it. Raises ValidationError for an unknown event."""
    _check(event)
    with _lock:
        handlers = attached.get(event, ())
        left = tuple(other for other in handlers if other != handler)
        if left:
            attached[event] = left
        else:
            attached.pop(event, None)
    return len(left) < len(handlers)


def _check(event: object) -> None:
    if not isinstance(event, str) or event not in EVENTS:
        raise ValidationError(f"there is no event {shown(event)}{near(str(event), EVENTS)}")


def emit(event: str, measurements: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Call the handlers of an event; never raises. Ask `event in attached` first where making the values costs."""
    handlers = attached.get(event)
    if handlers is None:
        return
    measurements, metadata = MappingProxyType(measurements), MappingProxyType(metadata)
    for handler in handlers:
        try:
            forks.contained(handler, event, measurements, metadata)
        except BaseException as error:
            if not is_contained(error):
                raise
            detach(event, handler)
            log.exception("a handler of %s failed; it is detached: %s", event, shown(handler))


def on_process_start(function: H) -> H:
    """Have `function(role)` called when a process of durable begins, after its fork: for what has threads or sockets.

    role  one of ROLES
    Decorator. One that raises is logged, nothing else.
    """
    _at_start.append(function)
    return function


def on_process_stop(function: H) -> H:
    """Have `function(role)` called when a process of durable ends in order: to send what is still buffered. Decorator.

    A process that is killed does not call it.
    """
    _at_stop.append(function)
    return function


class _Process:
    role: str | None = None

    def disown(self) -> None:
        """In a child that user code forks: have no role, and so no end to tell of."""
        _Process.role = None


_process = forks.shared(_Process())


@contextmanager
def process(role: str) -> Iterator[None]:
    """Be a process of that role: its callbacks are called at the start and at the end of the block."""
    _Process.role = role
    _call(_at_start, role)
    try:
        yield
    finally:
        leave()


def leave() -> None:
    """Call the callbacks of the end, once: for a process that ends without leaving the block of `process`."""
    role, _Process.role = _Process.role, None
    if role is not None:
        _call(_at_stop, role)


def _call(hooks: list[Hook], role: str) -> None:
    for hook in hooks:
        try:
            forks.contained(hook, role)
        except BaseException as error:
            if not is_contained(error):
                raise
            log.exception("%s failed in the %s process", shown(hook), role)
