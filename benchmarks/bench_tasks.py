"""The app that the benchmarks' workers import; database and schema come from the environment."""

import os

from durable import Durable

app = Durable("bench", schema=os.environ.get("BENCH_SCHEMA", "bench"))


@app.task(name="noop")
def noop() -> None:
    """Do nothing: what is measured is everything around it."""
