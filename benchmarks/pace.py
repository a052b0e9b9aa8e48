"""Calls at even distances."""

from __future__ import annotations

import time
from collections.abc import Callable


def pace(act: Callable[[int], object], rate: float, seconds: float, begin: float) -> None:
    """Call `act` with time.monotonic_ns() `rate` times a second at even distances, from time.monotonic() `begin` on."""
    for n in range(max(1, round(rate * seconds))):
        due = begin + n / rate
        if (early := due - time.monotonic()) > 0:
            time.sleep(early)
        act(time.monotonic_ns())
