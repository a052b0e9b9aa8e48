"""Running something in a forked child, and what became of it. A child that hangs is killed, and says where it hung."""

from __future__ import annotations

import faulthandler
import gc
import os
import pickle
import select
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import IO, Any, NamedTuple, NoReturn

LEAVE_TO_DUMP = 2.0
"""Seconds that a child gets, past its time, to say where it hangs."""


class Ended(NamedTuple):
    """How a child ended: its exit code (-n: killed by signal n), and what it returned or the traceback it left."""

    code: int
    value: Any = None
    trouble: str | None = None


def in_child(action: Callable[[], Any], timeout: float) -> Ended:
    """Run `action` in a forked child; return what became of it, within `timeout` seconds and a little."""
    with tempfile.TemporaryFile() as dump:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads don't survive a fork; the child needs none
            pid = os.fork()
        if pid == 0:
            _be_child(action, writer, dump, timeout)
        os.close(writer)
        try:
            body = _read(reader, time.monotonic() + timeout + LEAVE_TO_DUMP)
        finally:
            os.close(reader)
            if not _is_gone(pid, 1.0):
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if body is None:
            dump.seek(0)
            where = dump.read().decode(errors="replace")
            return Ended(code, trouble=f"it did not end within {timeout:g} s and was killed; it was at\n{where}")
        if not body:
            return Ended(code)
        value, trouble = pickle.loads(body)  # noqa: S301 - our own child's
        return Ended(code, value, trouble)


def _be_child(action: Callable[[], Any], writer: int, dump: IO[bytes], timeout: float) -> NoReturn:
    try:
        gc.freeze()  # collecting what is the parent's would copy its pages
        faulthandler.dump_traceback_later(timeout, file=dump)
        try:
            body = pickle.dumps((action(), None))
        except BaseException:
            body = pickle.dumps((None, traceback.format_exc()))
        while body:
            body = body[os.write(writer, body) :]
    finally:
        os._exit(0)


def _read(reader: int, until: float) -> bytes | None:
    """Return everything a pipe brings, or None when it does not end in time."""
    body = b""
    while (left := until - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            part = os.read(reader, 1 << 16)
            if not part:
                return body
            body += part
    return None


def _is_gone(pid: int, patience: float) -> bool:
    """Whether a child has ended, which one whose pipe is closed does at once; it is not reaped."""
    until = time.monotonic() + patience
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True
