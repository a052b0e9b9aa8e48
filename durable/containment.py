"""Where an exception of user code ends: in a worker process, where it is caught.

User code is called from many places besides steps: hooks, receivers, handlers of events, filters and handlers of
logging. Whatever it raises there is logged and changes nothing. SystemExit and its like are no exception to that: they
would end the process, and with it the steps of others.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

CONTAINED = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)
"""What ends where it is caught in every process. KeyboardInterrupt, and a test's own failure, do so in workers only."""

_NOT_A_WORKERS = (signal.default_int_handler, signal.SIG_DFL, signal.SIG_IGN)
"""Handlers of SIGINT outside of a worker command; a shell ignores the signal for what it runs in the background."""


def is_contained(error: BaseException) -> bool:
    """Return whether an exception of user code ends where it was caught; if not, it is to be raised again.

    Ctrl-C ends a drain or a script. The processes of a worker command handle SIGINT themselves, so a KeyboardInterrupt
    in one of them was raised by user code.
    """
    return issubclass(type(error), CONTAINED) or signal.getsignal(signal.SIGINT) not in _NOT_A_WORKERS


def contain_logging(*through: type[BaseException]) -> None:
    """Have no filter, handler or record factory of logging raise out of a call of our loggers, in this process.

    Args:
        through: exceptions that interrupt a step, and are raised all the same.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        ours = name == "durable" or name.startswith("durable.")
        if ours and isinstance(logger, logging.Logger) and "_log" not in logger.__dict__:
            logger.__dict__["_log"] = _contained(logger._log, through)


def _contained(log: Callable[..., None], through: tuple[type[BaseException], ...]) -> Callable[..., None]:
    def contained(*args: Any, stacklevel: int = 1, **options: Any) -> None:
        try:
            log(*args, stacklevel=stacklevel + 1, **options)  # this frame is not the caller that a record names
        except through:
            raise
        except BaseException:
            try:
                sys.stderr.write(f"durable: logging failed, this record is lost: {args[1]!r}\n{traceback.format_exc()}")
            except BaseException:
                return  # standard error is closed, or user code prints the exception: there is no place left to tell

    return contained
