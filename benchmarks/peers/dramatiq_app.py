"""The module that dramatiq's own command imports: the broker that BENCH_DRAMATIQ names."""

import os

from benchmarks.peers.dramatiq import KINDS

broker = KINDS[os.environ["BENCH_DRAMATIQ"]]().broker
