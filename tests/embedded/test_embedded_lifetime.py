"""Starting, joining, dying and ending of the server, as its users see it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from durable import forks
from durable.embedded import Server, binaries
from durable.embedded.client import Client

# xdist's worker has threads, of which Python 3.12 and later warn at a fork; the children here use none of their locks.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def ask(dsn, query):
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query).fetchone()[0]


def run_in_child(function):
    """Whether `function` returned true in a forked child. No pytest machinery runs in it."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if function() else 1)
        except BaseException as exc:
            os.write(2, f"in the child: {exc!r}\n".encode())
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fresh_start_gives_a_durable_private_server(make_server, home, bindir):
    server = make_server(bindir=bindir, settings={"shared_buffers": "16MB"})
    assert server.status().running is False
    assert not home.exists(), "looking must not make anything"
    dsn = server.ensure()
    assert dsn == server.ensure() == server.dsn()
    wanted = {
        "max_connections": "200",
        "fsync": "on",
        "full_page_writes": "on",
        "synchronous_commit": "on",
        "listen_addresses": "",
        "unix_socket_permissions": "0700",
        "shared_buffers": "16MB",
        "server_encoding": "UTF8",
        "data_checksums": "on",
    }
    assert {name: ask(dsn, f"SHOW {name}") for name in wanted} == wanted
    assert ask(dsn, "SELECT current_user || ' ' || current_database()") == "durable durable"
    assert ask(server.ensure('sh"o p'), "SELECT current_database()") == 'sh"o p'
    status = server.status()
    assert status.running
    assert not status.holders
    # As root, binaries that the server's account can't reach (tox keeps its folder private) are copied.
    assert status.binaries == bindir or str(status.binaries).startswith("/var/cache/durable/")
    assert status.version == ask(dsn, "SHOW server_version")
    assert status.version.split(".")[0] == str(binaries.major(bindir))
    assert server.stop() is True
    assert server.stop() is False
    assert server.status().running is False


def test_data_survives_a_stop_and_the_next_ensure_of_a_holder_starts_again(make_server):
    server = make_server()
    with psycopg.connect(server.ensure()) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS n")
    make_server().stop()
    assert ask(server.ensure(), "SELECT n FROM kept") == 42


def test_eight_processes_at_once_on_a_fresh_home_get_one_server(hold):
    holders = [hold() for _ in range(8)]
    dsns = {holder.line() for holder in holders}
    assert len(dsns) == 1
    assert ask(dsns.pop(), "SELECT 1") == 1


def test_holders_of_another_process_are_seen(make_server, hold):
    server = make_server()
    server.ensure()
    assert server.status().holders is False
    other = hold()
    other.line()
    assert server.status().holders is True
    assert make_server().status().holders is True
    other.end()
    assert server.status().holders is False
    assert make_server().status().holders is True, "we hold it, and this object does not"


def test_a_killed_server_is_restarted_by_the_next_ensure(make_server, wait_for, alive):
    server = make_server()
    dsn = server.ensure()
    killed = server.status().pid
    os.kill(killed, signal.SIGKILL)
    assert ask(server.ensure(), "SELECT 1") == 1
    assert server.status().pid != killed
    wait_for(lambda: not Path(f"/proc/{killed}").exists(), "the keeper reaps its dead server")
    assert server.dsn() == dsn


def test_a_server_killed_while_the_database_is_made_is_started_again(make_server, monkeypatch):
    server, create, killed = make_server(), Client.create, []

    def kill_first(client, database):
        if not killed:
            killed.append(client.pid())
            os.kill(killed[0], signal.SIGKILL)
        create(client, database)

    monkeypatch.setattr(Client, "create", kill_first)
    assert ask(server.ensure("shop"), "SELECT current_database()") == "shop"
    assert server.status().pid != killed[0]


@linux
def test_the_keeper_is_small_and_detached(make_server, keeper_pid):
    make_server().ensure()
    keeper = Path(f"/proc/{keeper_pid()}")
    assert os.getsid(int(keeper.name)) != os.getsid(0)
    assert os.readlink(keeper / "cwd") == "/"
    status = dict(line.split(":", 1) for line in (keeper / "status").read_text().splitlines())
    assert int(status["PPid"]) != os.getpid()
    assert int(status["VmRSS"].split()[0]) < 20_000, "kB; it was 7 600 when it was written"


def test_a_forked_child_restarts_a_killed_server(make_server):
    server = make_server()
    dsn = server.ensure()
    os.kill(server.status().pid, signal.SIGKILL)
    assert run_in_child(lambda: ask(server.ensure(), "SELECT 1") == 1)
    assert ask(dsn, "SELECT 1") == 1, "the server outlives the child that started it"
    assert server.ensure() == dsn


def test_a_forked_child_keeps_the_hold_that_its_parent_released(make_server):
    server, looking = make_server(), make_server()
    server.ensure()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    server.release()
    server.release()
    assert looking.status().holders is True
    os.close(writer)
    os.waitpid(child, 0)
    assert looking.status().holders is False


def test_child_of_a_step_holds_no_server(make_server):
    def step():
        forks.begin()
        server, looking = make_server(), make_server()
        server.ensure()
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        server.release()
        return looking.status().holders is False

    assert run_in_child(step)


def test_a_child_that_releases_does_not_take_its_parents_hold_away(make_server):
    server, looking = make_server(), make_server()
    server.ensure()
    assert run_in_child(lambda: server.release() is None)
    assert looking.status().holders is True


def test_the_server_stops_after_its_last_holder_was_killed(make_server, hold, wait_for, alive, keeper_pid, monkeypatch):
    monkeypatch.setenv("DURABLE_SERVER_LINGER", "0.2")
    holder = hold()
    holder.line()
    pid, keeper = make_server().status().pid, keeper_pid()
    holder.kill()
    wait_for(lambda: not alive(pid), "the server stops")
    wait_for(lambda: not alive(keeper), "its keeper ends")
    assert make_server().status().running is False


def test_a_keeper_told_to_leave_stops_an_unused_server_at_once(make_server, wait_for, alive, keeper_pid):
    server = make_server()
    server.ensure()
    pid, keeper = server.status().pid, keeper_pid()
    os.kill(keeper, signal.SIGTERM)
    assert ask(server.ensure(), "SELECT 1") == 1
    assert server.status().pid == pid, "it is in use"
    server.release()
    wait_for(lambda: not alive(pid) and not alive(keeper), "server and keeper end long before their linger")


def test_a_server_whose_keeper_was_killed_is_adopted(make_server, wait_for, alive, keeper_pid, monkeypatch):
    server = make_server()
    server.ensure()
    pid, first = server.status().pid, keeper_pid()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not alive(first), "the keeper is dead")
    monkeypatch.setenv("DURABLE_SERVER_LINGER", "0.2")
    assert ask(server.ensure(), "SELECT 1") == 1
    assert server.status().pid == pid
    assert keeper_pid() != first
    server.release()
    wait_for(lambda: not alive(pid), "the second keeper stops the server")


@linux
def test_zombies_below_a_pid_1_that_does_not_reap_do_not_stop_a_restart(hold, make_server):
    holder = hold(env={"HOLDER_DOES_NOT_REAP": "1"})
    dsn = holder.line()
    holder.process.stdin.write("crash\nensure\n")
    holder.process.stdin.flush()
    assert holder.line() == "zombies"
    assert holder.line() == dsn
    assert ask(dsn, "SELECT 1") == 1
    assert make_server().stop() is True


@linux
def test_a_recycled_pid_in_the_lock_files_leaves_the_bystander_alone(make_server, home, bystander):
    server = make_server()
    server.ensure()
    stale = (home / "data" / "postmaster.pid").read_text().splitlines()
    server.stop()
    stale[0] = str(bystander.pid)
    (home / "data" / "postmaster.pid").write_text("\n".join(stale) + "\n")
    (home / "s" / ".s.PGSQL.5432.lock").write_text("\n".join(stale[:5]) + "\n")
    (home / "s" / ".s.PGSQL.5432").touch()
    assert server.status().running is False
    assert server.stop() is False
    assert ask(server.ensure(), "SELECT 1") == 1
    assert server.status().pid != bystander.pid
    assert server.stop() is True


@linux
def test_somebody_in_the_data_directory_is_not_taken_for_a_server(make_server, home):
    server = make_server()
    server.ensure()
    server.stop()
    with subprocess.Popen(["sleep", "600"], cwd=home / "data") as visitor:
        assert ask(server.ensure(), "SELECT 1") == 1
        visitor.kill()


@linux
def test_a_full_server_is_joined_and_stopped(make_server):
    settings = {"fsync": "off", "max_connections": "4", "superuser_reserved_connections": "0", "max_wal_senders": "0"}
    dsn = make_server(settings=settings).ensure()
    connections = [psycopg.connect(dsn) for _ in range(4)]
    late = make_server()
    assert late.ensure() == dsn
    assert late.status().running
    assert late.stop() is True
    for connection in connections:
        connection.close()


def test_a_killed_initdb_leaves_nothing_that_stops_the_next(make_server, home):
    home.mkdir(mode=0o711)
    home.chmod(0o711)
    (home / "data.new" / "base").mkdir(parents=True)
    (home / "data.new" / "PG_VERSION").write_text("18\n")
    assert ask(make_server().ensure(), "SELECT 1") == 1


def test_psql_reaches_the_server_whatever_the_environment_says(make_server, monkeypatch):
    server = make_server()
    server.ensure()
    monkeypatch.setenv("PGHOST", "nowhere.invalid")
    monkeypatch.setenv("PGOPTIONS", "-c nonsense=1")
    argv, environment = server.psql_argv("durable", ["-XAtc", "SELECT current_database()"])
    ran = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "durable\n"


def test_a_server_of_the_environment_is_found_by_name(home, monkeypatch):
    monkeypatch.setenv("DURABLE_HOME", str(home))
    assert Server().status().data == home / "data"
