"""`python -m benchmarks.peers KIND ACTION [NUMBER [SECONDS]]`: one act of one peer, in a process of its own."""

from __future__ import annotations

import sys
import time

from benchmarks.peers.base import Peer
from benchmarks.peers.catalogue import BY_KIND
from benchmarks.peers.celery import CeleryRedis


def watch(peer: Peer, count: int) -> None:
    """Print that it looks; and when `count` have finished, how many did per second."""
    print("watching", flush=True)
    while (found := peer.finished()).count < count:
        time.sleep(peer.look)
    if found.count != count:
        raise SystemExit(f"{found.count} tasks finished of {count} that were enqueued")
    print(found.rate(), flush=True)


def main(kind: str, action: str, number: str = "1", seconds: str = "0", begin: str = "0") -> None:
    """Do it."""
    peer = BY_KIND[kind]()
    if action == "prepare":
        peer.prepare()
    elif action == "fill":
        peer.fill(int(number))
    elif action == "chains":
        peer.fill_chains(int(number))
    elif action == "pace":
        peer.pace(int(number), float(seconds))
    elif action == "steady":
        assert isinstance(peer, CeleryRedis), "the one peer that is measured under a steady load"
        peer.steady(float(number), float(seconds), float(begin))
        sys.stdin.read()
    elif action == "work":
        peer.work(int(number))
    elif action == "watch":
        watch(peer, int(number))
    else:
        raise SystemExit(f"no such action: {action}")


if __name__ == "__main__":
    main(*sys.argv[1:])
