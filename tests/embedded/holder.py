"""Run as a process of its own: uses the server, prints one line per answer, ends with its standard input.

Commands on standard input, a line each: `ensure` prints the DSN; `crash` kills the server and its keeper and prints
whether both stay zombies, as they do below a PID 1 that does not reap.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from durable.embedded import Server

PR_SET_CHILD_SUBREAPER = 36


def crash(server: Server) -> str:
    home = Path(os.environ["DURABLE_HOME"])
    victims = [int((home / "keeper").read_text()), server.status().pid]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        states = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in victims]
        if states == ["Z", "Z"]:
            return "zombies"
        time.sleep(0.01)
    return f"states {states}"


def main() -> None:
    if os.environ.get("HOLDER_DOES_NOT_REAP"):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    server = Server(settings={"fsync": "off"})
    print(server.ensure(), flush=True)
    for line in sys.stdin:
        print(server.ensure() if line.strip() == "ensure" else crash(server), flush=True)


main()
