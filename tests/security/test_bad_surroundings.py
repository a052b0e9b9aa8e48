"""A database that refuses, changes under a running worker or talks nonsense, and a machine that lacks something.

52, 66, 67 and 71 of the list: the cause is named, nothing is tried at full speed, and what can go on goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from threading import Thread

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from psycopg.conninfo import make_conninfo

from durable import Durable
from durable.wakeups import due_channel, queue_channel
from tests.cli.conftest import Ran
from tests.fix_app import Command
from tests.fix_db import wait_until
from tests.fix_rows import Rows
from tests.security.conftest import Role

WORK = "@app.task(name='work')\ndef work(value=None):\n    return value\n"
Break = Callable[[Rows], None]

# A server that does not let us in


@pytest.fixture
def locked_out(database: str, schema: str) -> Iterator[Callable[[str], str]]:
    """The DSN of a role whose connections the server's pg_hba.conf treats in a way."""
    role = f"{schema}_shut"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'right'".encode())
        shown = connection.execute("SHOW hba_file").fetchone()
        assert shown is not None
        file = Path(str(shown[0]))
        if not os.access(file, os.W_OK):
            pytest.skip("the server's pg_hba.conf is not ours")
        with file.open() as alone:
            fcntl.flock(alone, fcntl.LOCK_EX)  # other test processes share the server
            before = file.read_text()

            def make(method: str) -> str:
                file.write_text(f"local all {role} {method}\nhost all {role} all {method}\n{before}")
                connection.execute("SELECT pg_reload_conf()")
                dsn = make_conninfo(database, user=role, password="sesame")
                wait_until(lambda: not _lets_in(dsn), what="the new pg_hba.conf")
                return dsn

            yield make
            file.write_text(before)
        connection.execute("SELECT pg_reload_conf()")
        connection.execute(f"DROP ROLE {role}".encode())


def _lets_in(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@pytest.mark.parametrize("command", ["worker", "beat", "list"])
@pytest.mark.parametrize(
    ("method", "said"),
    [("scram-sha-256", "password authentication failed for user"), ("reject", "pg_hba.conf rejects connection")],
)
def test_a_role_that_is_not_let_in_ends_a_command_at_once(
    locked_out: Callable[[str], str], tmp_path: Path, process: Callable[..., Ran], method: str, said: str, command: str
) -> None:
    (tmp_path / "tasks.py").write_text("from durable import Durable\napp = Durable('shut')\n")
    ran = process(command, env={"DURABLE_DSN": locked_out(method)})
    assert ran.code == 3
    assert ran.error.startswith("Error: the database can't be reached: ")
    assert said in ran.error
    assert "sesame" not in ran.err


class Certified:
    """Takes TLS for a name that is not its own, and never gets as far as to speak of databases."""

    def __init__(self, folder: Path, encrypts: bool) -> None:
        self.ca, key = folder / "ca.pem", folder / "key.pem"
        self._encrypts = encrypts
        private = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "db.example")])
        now = datetime.now(UTC)
        made = x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number(),
                                       now - timedelta(days=1), now + timedelta(days=1))  # fmt: skip
        names = x509.SubjectAlternativeName([x509.DNSName("db.example")])
        signed = made.add_extension(names, False).sign(private, hashes.SHA256())
        self.ca.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        key.write_bytes(
            private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.ca, key)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._thread = Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            with client:
                client.recv(8)  # SSLRequest
                client.sendall(b"S" if self._encrypts else b"N")
                try:
                    if self._encrypts:
                        self._context.wrap_socket(client, server_side=True).close()
                except OSError:
                    continue

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


@pytest.mark.parametrize(
    ("encrypts", "options", "said"),
    [
        (False, "sslmode=require", "server does not support SSL, but SSL was required"),
        (True, "sslmode=verify-full&sslrootcert={ca}", 'server certificate for "db.example" does not match host name'),
        (True, "sslmode=verify-full&sslrootcert=/nowhere.pem", 'root certificate file "/nowhere.pem" does not exist'),
        (True, "sslmode=verify-ca&sslrootcert=system", "sslmode"),
        (True, "sslmode=verify-full&sslrootcert=system", "certificate verify failed"),
    ],
    ids=["no TLS", "another name", "no root", "weak", "unknown CA"],
)
def test_a_server_without_the_right_certificate_is_told_by_what_it_lacks(
    durable: Callable[..., Ran], tmp_path: Path, encrypts: bool, options: str, said: str
) -> None:
    server = Certified(tmp_path, encrypts)
    try:
        query = options.format(ca=server.ca)
        ran = durable("list", DURABLE_DSN=f"postgresql://somebody:sesame@localhost:{server.port}/shop?{query}")
    finally:
        server.close()
    assert ran.code == 3
    assert said in ran.error
    assert "sesame" not in ran.err


# A database that is changed under a running worker


def rename_column(rows: Rows) -> None:
    rows.fetch("ALTER TABLE {schema}.instances RENAME COLUMN eligible_at TO gone")


def rename_column_back(rows: Rows) -> None:
    rows.fetch("ALTER TABLE {schema}.instances RENAME COLUMN gone TO eligible_at")


def rename_table(rows: Rows) -> None:
    rows.fetch("ALTER TABLE {schema}.workers RENAME TO gone")


def rename_table_back(rows: Rows) -> None:
    rows.fetch("ALTER TABLE {schema}.gone RENAME TO workers")


def _grant(rows: Rows, words: str) -> None:
    rows.fetch(words.replace("{role}", f'"{rows.schema} ""worker"""'))


def revoke(rows: Rows) -> None:
    _grant(rows, "REVOKE SELECT, UPDATE ON {schema}.instances, {schema}.workers FROM {role}")


def grant(rows: Rows) -> None:
    _grant(rows, "GRANT SELECT, UPDATE ON {schema}.instances, {schema}.workers TO {role}")


_LINE = re.compile(r"^(\S+ \S+) WARNING (\S+) .*trying on: (.*)$", re.MULTILINE)


def complaints(command: Command) -> dict[str, list[tuple[datetime, str]]]:
    found: dict[str, list[tuple[datetime, str]]] = defaultdict(list)
    for at, process, why in _LINE.findall(command.output()):
        found[process].append((datetime.fromisoformat(at), why))
    return found


@pytest.mark.parametrize(
    ("damage", "mend", "said"),
    [
        (rename_column, rename_column_back, "run `durable migrate`"),
        (rename_table, rename_table_back, "run `durable migrate`"),
        (revoke, grant, "the database role may not do this: permission denied"),
    ],
    ids=["column", "table", "permission"],
)
def test_a_worker_says_what_is_wrong_with_its_database_waits_between_tries_and_goes_on(
    app: Durable,
    role: Role,
    rows: Rows,
    tmp_path: Path,
    schema: str,
    durable_worker: Callable[..., Command],
    damage: Break,
    mend: Break,
    said: str,
) -> None:
    dsn = role("worker")
    head = f"from durable import Durable\napp = Durable('test', dsn={dsn!r}, schema={schema!r})\n"
    (tmp_path / "tasks.py").write_text(head + WORK)
    command = durable_worker("worker", "-c", "1")
    work = app.task(name="work")(lambda value=None: value)
    assert work.delay(1).get(timeout=20) == 1
    damage(rows)
    wait_until(lambda: any(len(lines) >= 3 for lines in complaints(command).values()), what="three complaints")
    mend(rows)
    assert work.delay(2).get(timeout=20) == 2
    for process, lines in complaints(command).items():
        assert said in lines[0][1]
        gaps = [(later - earlier).total_seconds() for (earlier, _), (later, _) in pairwise(lines)]
        assert all(gap > 0.15 for gap in gaps), (process, gaps)
    assert "Traceback" not in command.output()
    assert command.stop() == 0


NOISE = ["", "garbage", "x" * 7999, "default:1", "default:-1:0", "other:5:0", "*:*:*", '{"op": "insert"}', "\x1b[31m",
         "default:999999999:!", "terminate ", "durable", "ping 1"]  # fmt: skip


def test_notifications_that_are_not_ours_are_passed_by(
    app: Durable, rows: Rows, tasks_module: Callable[[str], Path], durable_worker: Callable[..., Command], schema: str
) -> None:
    tasks_module(WORK)
    command = durable_worker("worker", "-B", "-c", "1", "-l", "debug", DURABLE_POLL_INTERVAL="3600")
    work = app.task(name="work")(lambda value=None: value)
    listening = "SELECT FROM pg_stat_activity WHERE query IN (%s, %s)"
    channels = [f'LISTEN "{channel(schema)}"' for channel in (queue_channel, due_channel)]
    wait_until(lambda: rows.connection.execute(listening, channels).rowcount == 2, what="agent and beat to listen")
    for text in NOISE:
        rows.fetch(
            "SELECT pg_notify(%s, %s), pg_notify(%s, %s)", [queue_channel(schema), text, due_channel(schema), text]
        )
    passed = sum(text not in ("other:5:0", "default:999999999:!", "ping 1") for text in NOISE)
    said = "a notification that is not ours"
    wait_until(lambda: command.output().count(said) == passed, what="all of them to be passed by")
    assert work.delay(1).get(timeout=20) == 1
    assert "WARNING" not in command.output()
    assert "Traceback" not in command.output()
    assert command.stop() == 0


# A machine that lacks something

SKEW = Path(__file__).parents[1] / "chaos" / "skew.c"
ROUND = (
    '"$PYTHON" -m durable_cli worker -B -c 1 2>worker.log & worker=$!; '
    '"$PYTHON" -m durable_cli call work --args "[\\"gr\\u00fcn\\"]" --wait 30 --json >out.json 2>call.log; code=$?; '
    "kill -TERM $worker; wait $worker || exit 50; exit $code"
)
LACKS: dict[str, tuple[str, dict[str, str]]] = {
    "UTF-8": ("", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "a zone": ("", {"TZ": "bogus"}),
    "a home": ("", {"HOME": "/nonexistent/home"}),
    "assertions": ("", {"PYTHONOPTIMIZE": "2"}),
    "the right century": ("", {"CHAOS_SKEW": str(86_400 - int(time.time()))}),
    "shared memory": ("mount -t tmpfs -o ro none /dev/shm && ! touch /dev/shm/x 2>/dev/null || exit 77; ", {}),
}


@pytest.mark.parametrize("lack", LACKS)
def test_work_is_done_on_a_machine_that_lacks(
    app: Durable, tasks_module: Callable[[str], Path], tmp_path: Path, lack: str
) -> None:
    before, environment = LACKS[lack]
    folder = tasks_module(WORK)
    if "CHAOS_SKEW" in environment:
        compiler = shutil.which("cc")
        if compiler is None:
            pytest.skip("there is no C compiler")
        library = tmp_path / "skew.so"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(SKEW), "-ldl"], check=True)
        environment = {**environment, "LD_PRELOAD": str(library)}
    prefix = ["unshare", "--mount"] if "mount" in before else []
    if prefix and (shutil.which("unshare") is None or os.geteuid() != 0):
        pytest.skip("this takes root and unshare")
    ran = subprocess.run(
        [*prefix, "sh", "-c", before + ROUND],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        timeout=90,
    )
    if ran.returncode == 77:
        pytest.skip("nothing can be mounted here")
    log = (folder / "worker.log").read_text() + (folder / "call.log").read_text()
    assert ran.returncode == 0, log
    assert "grün" in str(json.loads((folder / "out.json").read_text()))
    assert "Traceback" not in log


@pytest.mark.parametrize("descriptors", [12, 16, 24])
def test_too_few_descriptors_are_said_in_a_line(
    app: Durable, tasks_module: Callable[[str], Path], descriptors: int
) -> None:
    script = f'ulimit -n {descriptors}; exec "$PYTHON" -m durable_cli worker -c 8'
    ran = subprocess.run(
        ["sh", "-c", script],
        cwd=tasks_module(WORK),
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode in (1, 3)
    assert "Too many open files" in ran.stderr
    assert "Traceback" not in ran.stderr
