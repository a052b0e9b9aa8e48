"""When a soft time limit may interrupt: never inside a call into durable, but right after it.

An exception that is raised in the middle of a call of ours would leave a connection in use, or be taken for another
error. So whoever is about to interrupt a step looks at the stack first. While a call of ours, a logging call or a
finalizer is on it, the limit is `late`: calls of ours that can wait raise it at their end, and the others are asked
about again a moment later. After LONGEST_DELAY seconds the call itself is interrupted.

This costs a step nothing that stays within its limit, and each call of ours one look at an empty dict.
"""

from __future__ import annotations

import asyncio
import threading
import types
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

LONGEST_DELAY = 1.0
"""Seconds that an interruption waits at most for the end of a call of ours."""

late: dict[Hashable, Callable[[], BaseException | None]] = {}
"""By thread or asyncio task: what makes the exception that is overdue there; None if it is not due any more."""

_transparent: set[types.CodeType] = set()
_boundaries: set[types.CodeType] = set()


def transparent(function: F) -> F:
    """Mark a function of ours that may be interrupted, because it only waits or calls user code. Decorator."""
    _transparent.add(function.__code__)
    return function


def boundary(function: F) -> F:
    """Mark the function that calls the user code of a step: what called it counts no more. Decorator."""
    _boundaries.add(function.__code__)
    return function


def in_our_code(frame: types.FrameType | None) -> bool:
    """Whether a call of ours is under way, from the innermost frame of a thread out to the step's user code."""
    found = False
    while frame is not None and frame.f_code not in _boundaries:
        found = found or _is_ours(frame)
        frame = frame.f_back
    return found


def awaits_our_code(awaited: Any) -> bool:
    """`in_our_code` for a coroutine that is suspended."""
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None and _is_ours(frame):
            return True
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return False


def _is_ours(frame: types.FrameType) -> bool:
    code = frame.f_code
    module = frame.f_globals.get("__name__", "")
    package = module.partition(".")[0] if isinstance(module, str) else ""
    # Python prints what leaves a finalizer and goes on; logging does so with what a handler raises.
    return (package in ("durable", "logging") and code not in _transparent) or code.co_name == "__del__"


def raise_late() -> None:
    """Raise what is overdue in this thread, if anything: for the end of a call that can wait."""
    _raise(threading.get_ident())


def araise_late() -> None:
    """`raise_late` for coroutines."""
    _raise(asyncio.current_task())


def _raise(where: Hashable) -> None:
    make = late.pop(where, None)
    error = None if make is None else make()
    if error is not None:
        raise error
