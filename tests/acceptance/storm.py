"""A fleet that is killed piece by piece while it works."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.fix_app import Command
from tests.fix_db import wait_until


class Storm:
    """Worker commands, and the faults that befall them; the dice are loaded the same way each time.

    start  starts one more worker command
    """

    def __init__(self, start: Callable[[], Command], commands: int = 2, seed: int = 7) -> None:
        self._start = start
        self._dice = random.Random(seed)
        self.commands = [start() for _ in range(commands)]

    def kill_child(self, number: int) -> None:
        """SIGKILL one of a command's worker processes."""
        children = wait_until(lambda: self.commands[number].children("durable:default"), what="a child to kill")
        os.kill(self._dice.choice(children), signal.SIGKILL)  # type: ignore[arg-type]

    def kill_agent(self, number: int) -> None:
        """SIGKILL a command's agent."""
        (agent,) = wait_until(lambda: self.commands[number].children("durable:agent"), what="an agent to kill")  # type: ignore[attr-defined]
        os.kill(agent, signal.SIGKILL)

    def kill_command(self, number: int) -> None:
        """SIGKILL a whole command, and start another."""
        self.commands[number].process.kill()
        self.commands[number].process.wait()
        self.commands[number] = self._start()


def blow(faults: Sequence[Callable[[], None]], progress: Callable[[], int], work: int) -> None:
    """Let each fault happen at its share of the work."""
    for number, fault in enumerate(faults, start=1):
        enough = number * work / (len(faults) + 2)
        wait_until(lambda enough=enough: progress() > enough, 60, f"enough work before fault {number}")  # type: ignore[misc]
        fault()


def lines(path: Path) -> list[str]:
    """What has been written into a file of effects."""
    return path.read_text().splitlines() if path.exists() else []
