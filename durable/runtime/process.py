"""What every process of the family does after a fork: die with its parent, default signals, a seed of its own."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from durable import forks

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def fork(body: Callable[[], int], title: str) -> int:
    """Fork a child that runs `body` and exits with its return value; return the child's pid.

    The child is killed when its parent ends, whatever way that happens. An exception in `body` is printed and exits
    70. The caller must be single-threaded.
    """
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    with forks.own():
        pid = os.fork()
    if pid == 0:
        _child(body, title, parent)
    return pid


def _child(body: Callable[[], int], title: str, parent: int) -> NoReturn:
    code = 70
    try:
        forks.default_signals()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        die_with_parent(parent)
        name_process(title)
        random.seed()
        code = body()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 70
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; where it can't, the parent's pid is watched for."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it ended before the kernel knew


def name_process(title: str) -> None:
    """Set what `ps -o comm` and `top` show; at most 15 bytes count, and of those whole letters only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(
            _PR_SET_NAME, title.encode()[:15].decode(errors="ignore").encode(), 0, 0, 0
        )


def describe_exit(status: int) -> str:
    """Return how a process ended, from waitpid's status: "was killed by signal 9 (SIGKILL)", "exited with code 1"."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "unknown"
        return f"was killed by signal {number} ({name})"
    return f"exited with code {os.WEXITSTATUS(status)}"
