"""Settings: names, values, sources, and what they must be together."""

from __future__ import annotations

from typing import Any

import pytest

from durable.config import Config
from durable.errors import ConfigError


def test_every_setting_says_what_it_means_and_its_default_passes_its_own_check() -> None:
    for name in Config.names():
        assert len(Config.doc(name)) > 10, name
        setattr(Config(), name, getattr(Config(), name))


def test_every_setting_of_the_spec_is_there_with_its_default() -> None:
    expected = {
        "lease_ttl": 20,
        "heartbeat_interval": 5,
        "reconcile_interval": 15,
        "reaper_interval": 5,
        "reaper_grace": 20,
        "poll_interval": 1,
        "max_poll_interval": 5,
        "gc_interval": 60,
        "retention": 86400,
        "history_partition": "day",
        "drain_timeout": 10,
        "flush_batch": 200,
        "flush_delay": 0.002,
        "prefetch": None,
        "min_demand": None,
        "max_attempts": 20,
        "max_crashes": 3,
        "max_payload_bytes": 1024 * 1024,
        "beat_grace": 30,
        "serializer": "json",
        "reaper": True,
        "gc": True,
    }
    config = Config()
    assert {name: getattr(config, name) for name in expected} == expected
    assert "pickle" not in config.accept_content


@pytest.mark.parametrize("give", [lambda: Config(lease_tlt=5), lambda: Config.load({}, lease_tlt=5)])
def test_an_unknown_setting_is_refused(give: Any) -> None:
    with pytest.raises((ConfigError, TypeError), match="lease_tlt"):
        give()


def test_an_unknown_setting_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'lease_tlt'; did you mean 'lease_ttl'"):
        Config.load({}, lease_tlt=5)
    with pytest.raises(ConfigError, match="did you mean 'flush_batch'"):
        Config().update(flush_bach=5)
    with pytest.raises(ConfigError, match="did you mean 'retention'"):
        Config().retenton = 5


BAD_VALUES = [
    ("lease_ttl", 0),
    ("lease_ttl", -1),
    ("lease_ttl", float("nan")),
    ("lease_ttl", float("inf")),
    ("lease_ttl", "soon"),
    ("lease_ttl", True),
    ("lease_ttl", None),
    ("lease_ttl", 1e12),
    ("heartbeat_interval", 0),
    ("reaper_grace", -1),
    ("poll_interval", 0),
    ("time_limit", 0),
    ("soft_time_limit", -1),
    ("pool_size", 0),
    ("drain_timeout", -0.1),
    ("flush_batch", 0),
    ("flush_batch", 1.5),
    ("flush_batch", "many"),
    ("flush_batch", "²"),
    ("flush_batch", True),
    ("flush_batch", 2**31),
    ("max_attempts", 0),
    ("max_crashes", 32_768),
    ("max_payload_bytes", 2**28 + 1),
    ("prefetch", 0),
    ("prefetch", "lots"),
    ("reaper", "ture"),
    ("reaper", 1),
    ("serializer", ""),
    ("serializer", 5),
    ("accept_content", 5),
    ("accept_content", [1]),
    ("history_partition", "month"),
    ("listen_dsn", 5),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_wrong_value_is_refused_with_the_settings_name(name: str, value: Any) -> None:
    config = Config()
    before = getattr(config, name)
    with pytest.raises(ConfigError, match=name):
        config.update(**{name: value})
    assert getattr(config, name) == before


def test_the_environment_gives_settings_and_loses_to_arguments() -> None:
    environ = {
        "DURABLE_LEASE_TTL": "1e3",
        "DURABLE_FLUSH_BATCH": "50",
        "DURABLE_REAPER": "off",
        "DURABLE_ACCEPT_CONTENT": "json, yaml",
        "DURABLE_PREFETCH": "auto",
        "DURABLE_COMPRESSION": "",
        "DURABLE_UNRELATED": "ignored",
    }
    config = Config.load(environ, flush_batch=7)
    assert config.lease_ttl == 1000
    assert config.flush_batch == 7
    assert config.reaper is False
    assert config.accept_content == ("json", "yaml")
    assert config.prefetch is None
    assert config.compression is None


@pytest.mark.parametrize(
    ("variable", "text"),
    [("DURABLE_REAPER", "ture"), ("DURABLE_FLUSH_BATCH", "1e3"), ("DURABLE_LEASE_TTL", ""), ("DURABLE_LEASE_TTL", "x")],
)
def test_a_wrong_environment_variable_is_named(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        Config.load({variable: text})


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("DURABLE_LEASE_TLT", "DURABLE_LEASE_TTL"),
        ("DURABLE_FLUSH_BACH", "DURABLE_FLUSH_BATCH"),
        ("DURABLE_DNS", "DURABLE_DSN"),
        ("DURABLE_PAYLOAD_KEY", "DURABLE_PAYLOAD_KEYS"),
    ],
)
def test_a_misspelt_variable_is_refused_and_not_ignored(variable: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no setting {variable}; did you mean {meant}") as refused:
        Config.load({variable: "sesame"})
    assert "sesame" not in str(refused.value)


@pytest.mark.parametrize(
    "variable",
    ["DURABLE_APP", "DURABLE_DSN", "DURABLE_HOME", "DURABLE_PG_BIN", "DURABLE_SERVER_LINGER", "DURABLE_TEST_DSN",
     "DURABLE_SCHEMA", "DURABLE_REDIS", "LEASE_TLT", "_DURABLE_COMPLETE", "DURABLE_"],
)  # fmt: skip
def test_variables_of_others_are_left_alone(variable: str) -> None:
    assert Config.load({variable: "x"}) == Config()


def test_a_lease_must_outlive_two_heartbeats() -> None:
    with pytest.raises(ConfigError, match=r"lease_ttl \(10 s\) must be more than twice heartbeat_interval \(5 s\)"):
        Config.load({}, lease_ttl=10)
    with pytest.raises(ConfigError, match="twice"):
        Config.load({"DURABLE_HEARTBEAT_INTERVAL": "10"})
    Config.load({}, lease_ttl=10, heartbeat_interval=4)


def test_a_soft_limit_must_come_before_the_hard_one() -> None:
    with pytest.raises(ConfigError, match=r"soft_time_limit \(10 s\) must be shorter than time_limit \(10 s\)"):
        Config.load({"DURABLE_TIME_LIMIT": "10"}, soft_time_limit=10)


def test_a_refused_update_changes_nothing_at_all() -> None:
    config = Config()
    with pytest.raises(ConfigError):
        config.update(flush_batch=9, heartbeat_interval=19)
    assert config == Config()


def test_assigning_a_setting_checks_and_converts_it() -> None:
    config = Config()
    config.lease_ttl = "30"  # type: ignore[assignment]
    assert config.lease_ttl == 30.0
    with pytest.raises(ConfigError):
        config.lease_ttl = "thirty"  # type: ignore[assignment]


@pytest.mark.parametrize(("megabytes", "outcomes"), [(1, 200), (2, 128), (64, 4), (256, 1)])
def test_a_commit_holds_as_many_outcomes_as_surely_fit_a_message_to_the_server(megabytes: int, outcomes: int) -> None:
    assert Config(max_payload_bytes=megabytes * 2**20).outcomes_per_commit == outcomes
    assert Config(max_payload_bytes=megabytes * 2**20, flush_batch=3).outcomes_per_commit == min(3, outcomes)
