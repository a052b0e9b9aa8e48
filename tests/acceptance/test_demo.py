"""`durable demo`: what a newcomer sees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psycopg


def test_the_demo_kills_a_worker_and_loses_nothing(database: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "durable_cli", "demo", "--files", "300"],
        cwd=tmp_path,
        env={**os.environ, "DURABLE_DSN": database},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "300 of 300 files processed, 0 lost, 0 committed twice" in ran.stdout
    assert ran.stdout.count("kill -9") == 2
    assert "order:42 is parked" in ran.stdout
    assert "sent again, as webhooks do: ignored" in ran.stdout
    assert "order:42 shipped, 8 of 8 parcels; 8 rows written by 8 steps" in ran.stdout
    again = subprocess.run(
        [sys.executable, "-m", "durable_cli", "demo", "--files", "300", "--json"],
        cwd=tmp_path,
        env={**os.environ, "DURABLE_DSN": database},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    document = json.loads(again.stdout)
    assert (document["files"], document["done"], document["committed_twice"]) == (300, 300, 0)
    assert (document["checkout"]["parcels"], document["checkout"]["redelivery_ignored"]) == (8, True)
    with psycopg.connect(database) as connection:
        rows = connection.execute(
            "SELECT count(*), bool_and(status = 'done' AND version = 1) FROM durable_demo.history"
            " WHERE machine LIKE '%index_file'"
        ).fetchall()
        assert rows == [(300, True)]
        connection.execute("DROP SCHEMA durable_demo CASCADE")
