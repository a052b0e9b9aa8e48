"""A child that user code forks inside a process of durable is an ordinary Python process, not a worker.

`begin` marks a process as one of durable's: supervisor, agent, worker process or beat. When user code in it forks
(`os.fork`, `multiprocessing`, `subprocess` with `preexec_fn`), the child at once:

* has Python's default signal handlers instead of durable's;
* gives up what it shares with its parent: each object given to `shared` has its `disown` called. Shared memory becomes
  a private copy; pipes and database connections lead to /dev/null, so that the child can neither speak on them nor keep
  them open after its parent has died; an event loop runs nothing any more;
* is `strayed`. The runtime looks at that wherever user code returns or raises, and then calls `end`: the child ends
  with the code with which a script would end there.

durable's own forks are made through `own`. A program that is started (`subprocess`, `spawn`, `forkserver`) inherits
nothing but ignored signals, and durable ignores none.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

from durable import interruption

T = TypeVar("T")
S = TypeVar("S", bound="Shared")
Handler = Callable[[int, types.FrameType | None], object]

strayed = False
"""Whether user code in a process of durable has forked this process."""


class Shared(Protocol):
    """What a process of durable has and a child of it must not use."""

    def disown(self) -> None:
        """Called in the child: keep nothing that leads to the parent."""


class _Process:
    is_ours = False
    forks = False
    """Whether durable itself forks at the moment."""
    masks = threading.local()
    """`before`: the signals that were blocked in this thread before it forked."""
    handlers: dict[int, Handler] = {}
    registered = False


_shared: weakref.WeakSet[Any] = weakref.WeakSet()


def begin() -> None:
    """Be a process of durable's from now on; called in the main thread."""
    _Process.is_ours = True
    if not _Process.registered:
        _Process.registered = True
        os.register_at_fork(before=_before, after_in_parent=_restore_mask, after_in_child=_after_in_child)


def shared(thing: S) -> S:
    """Have `thing.disown()` called in a child that user code forks; return it."""
    _shared.add(thing)
    return thing


def handle(number: int, handler: Handler) -> None:
    """Install a signal handler that a child forked by user code does not keep."""
    _Process.handlers[number] = handler
    signal.signal(number, handler)


def ignore(number: int) -> None:
    """Have a signal do nothing in this process.

    By a handler, since a program that this process starts would inherit SIG_IGN and be deaf to the signal too.
    """
    handle(number, _nothing)
    signal.siginterrupt(number, False)  # as with SIG_IGN, no system call is interrupted


def is_ignored(number: int) -> bool:
    """Whether `ignore` was called for a signal."""
    return _Process.handlers.get(number) is _nothing


def _nothing(_number: int, _frame: types.FrameType | None) -> None:
    pass


@contextmanager
def own() -> Iterator[None]:
    """Fork inside this block: the child is one of durable's. Only where no other thread can fork meanwhile."""
    _Process.forks = True
    try:
        yield
    finally:
        _Process.forks = False


def default_signals() -> None:
    """Give every signal that durable handles Python's default handler, unless somebody has replaced durable's."""
    for number, handler in _Process.handlers.items():
        if signal.getsignal(number) is handler:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _Process.handlers.clear()
    signal.set_wakeup_fd(-1)


def _before() -> None:
    """Block the signals that durable handles: one sent to a child that has its parent's handlers yet would be lost."""
    if _Process.is_ours and not _Process.forks:
        _Process.masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _Process.handlers)


def _restore_mask() -> None:
    before = _Process.masks.__dict__.pop("before", None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _after_in_child() -> None:
    if _Process.is_ours and not _Process.forks:
        _stray()
    _restore_mask()


def _stray() -> None:
    global strayed
    _Process.is_ours = False
    strayed = True
    interruption.late.clear()
    default_signals()
    # A worker process never calls what was registered there, since it ends by os._exit: no more does its child.
    atexit._clear()
    for thing in list(_shared):
        try:
            thing.disown()
        except Exception:  # the others are to be given up all the same
            traceback.print_exc()


def silence(*descriptors: int) -> None:
    """Have file descriptors lead to /dev/null. They stay taken, so that closing them later closes nothing else."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for descriptor in descriptors:
            if descriptor >= 0:
                os.dup2(null, descriptor, inheritable=False)
    finally:
        os.close(null)


def contained(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call user code; a child that it forks ends where it would leave the call."""
    try:
        value = call(*args, **kwargs)
    except BaseException as error:
        if strayed:
            end(error)
        raise
    if strayed:
        end()
    return value


@interruption.transparent
async def acontained(awaitable: Awaitable[T]) -> T:
    """`contained` for coroutines."""
    try:
        value = await awaitable
    except BaseException as error:
        if strayed:
            end(error)
        raise
    if strayed:
        end()
    return value


def end(error: BaseException | None = None) -> NoReturn:
    """End this process as Python ends a script that has come to its end, or was left by an error.

    Waits for the threads that are no daemons and calls what the child itself has registered with `atexit`.
    """
    code = 1
    try:
        code = _exit_code(error)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    sys.excepthook(type(error), error, error.__traceback__)
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return 1
