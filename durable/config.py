"""Settings: every one with its default, its unit and its meaning, checked when it is set.

A setting is given to `Durable(...)`, to `app.conf.update(...)`, or as `DURABLE_<NAME>` in the environment (which loses
to the first two). Times are seconds, sizes bytes. Changing settings after the app opened connections or started
workers does not reach those.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from durable.errors import ConfigError
from durable.sealing import parse_keys
from durable.validation import near, shown

Check = Callable[[str, Any], Any]

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_OTHER_VARIABLES = {f"DURABLE_{name}" for name in ("APP", "DSN", "HOME", "PG_BIN", "SERVER_LINGER")}

SHORTEST_PATIENCE = 5.0
"""Seconds; a busy server may well take some of them."""
MAX_CRASHES = 32_767  # a smallint in the database
MAX_PAYLOAD_BYTES = 256 * 1024 * 1024
_MESSAGE_BYTES = 512 * 1024 * 1024  # of a commit's results and states


def _seconds(name: str, value: Any) -> float:
    seconds = _number(name, value)
    if not 0 < seconds <= 315_360_000:
        raise ConfigError(f"{name} must be more than 0 seconds (and at most ten years), got {shown(value)}")
    return seconds


def _seconds_or_zero(name: str, value: Any) -> float:
    return 0.0 if _number(name, value) == 0 else _seconds(name, value)


def _seconds_or_none(name: str, value: Any) -> float | None:
    return None if value in (None, "") else _seconds(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{name} must be a number, got {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise ConfigError(f"{name} must be a finite number, got {shown(value)}")
    return float(value)


def _count(name: str, value: Any) -> int:
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**31 - 1:
        raise ConfigError(f"{name} must be an integer from 1, got {shown(value)}")
    return value


def _crashes(name: str, value: Any) -> int:
    count = _count(name, value)
    if count > MAX_CRASHES:
        raise ConfigError(f"{name} must be at most {MAX_CRASHES:,}, got {shown(value)}")
    return count


def _payload_bytes(name: str, value: Any) -> int:
    count = _count(name, value)
    if count > MAX_PAYLOAD_BYTES:
        raise ConfigError(
            f"{name} must be at most {MAX_PAYLOAD_BYTES:,}, got {shown(value)}: store what is larger elsewhere, "
            "and pass a reference"
        )
    return count


def _count_or_none(name: str, value: Any) -> int | None:
    return None if value in (None, "") else _count(name, value)


def _auto_or_count(name: str, value: Any) -> int | None:
    if value in (None, "auto"):
        return None
    try:
        return _count(name, value)
    except ConfigError:
        raise ConfigError(f"{name} must be 'auto' or an integer from 1, got {shown(value)}") from None


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {shown(value)}")
    return value


def _words(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(word, str) for word in value):
        raise ConfigError(f"{name} must be a collection of names, got {shown(value)}")
    return tuple(value)


def _mapping_or_none(name: str, value: Any) -> Mapping[str, Any] | None:
    if value is not None and (not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value)):
        raise ConfigError(f"{name} must map names to entries, and is given in code; got {shown(value)}")
    return value


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a name, got {shown(value)}")
    return value


def _word_or_none(name: str, value: Any) -> str | None:
    return None if value in (None, "") else _word(name, value)


def _day(name: str, value: Any) -> str:
    if value != "day":
        raise ConfigError(f"{name} must be 'day', got {shown(value)}")
    return "day"


def _keys(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [entry.strip() for entry in value.split(",") if entry.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{name} must be a list of NAME:SECRET")  # whatever it is, it may be a secret
    parse_keys(name, value)
    return tuple(value)


def _setting(default: Any, check: Check, doc: str, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"check": check, "doc": doc})


@dataclass
class Config:
    """All settings. Assigning one checks it; `update` checks several together."""

    lease_ttl: float = _setting(20.0, _seconds, "seconds a worker process counts as alive after its last heartbeat")
    heartbeat_interval: float = _setting(5.0, _seconds, "seconds between an agent's heartbeats")
    reconcile_interval: float = _setting(
        15.0, _seconds, "seconds between a worker's checks for rows it owns unknowingly"
    )
    reaper_interval: float = _setting(5.0, _seconds, "seconds between searches for rows of dead workers")
    reaper_grace: float = _setting(
        20.0, _seconds_or_zero, "seconds after a start of Postgres in which nothing is reaped"
    )
    poll_interval: float = _setting(1.0, _seconds, "seconds between an agent's idle queries, the floor under NOTIFY")
    max_poll_interval: float = _setting(5.0, _seconds, "longest wait in seconds between tries to reach a database away")
    gc_interval: float = _setting(60.0, _seconds, "seconds between sweeps of what retention no longer holds")
    retention: float = _setting(86400.0, _seconds_or_zero, "seconds a finished instance is kept at least")
    history_partition: str = _setting("day", _day, "span of one partition of the history")
    soft_time_limit: float | None = _setting(
        None,
        _seconds_or_none,
        "seconds after which SoftTimeLimitExceeded is raised in a step, unless its task says otherwise",
    )
    time_limit: float | None = _setting(
        None, _seconds_or_none, "seconds after which a step's process is killed, unless its task says otherwise"
    )
    max_tasks_per_child: int | None = _setting(
        None, _count_or_none, "steps after which a worker process is replaced by a fresh one"
    )
    max_memory_per_child: int | None = _setting(
        None, _count_or_none, "resident bytes beyond which a worker process is replaced after its step"
    )
    beat_schedule: Mapping[str, Any] | None = _setting(
        None, _mapping_or_none, "periodic work as Celery writes it: name -> {task, schedule, args, kwargs, options}"
    )
    drain_timeout: float = _setting(10.0, _seconds_or_zero, "seconds that running steps get to end at shutdown")
    flush_batch: int = _setting(
        200, _count, "most outcomes in one commit; at most 256 divided by `max_payload_bytes` in MiB"
    )
    flush_delay: float = _setting(0.002, _seconds_or_zero, "longest wait in seconds for more outcomes while steps run")
    prefetch: int | None = _setting(None, _auto_or_count, "most rows in a worker's buffer; auto: some 30 ms of work")
    min_demand: int | None = _setting(None, _auto_or_count, "least room in the buffer worth a claim; auto: half of it")
    max_attempts: int = _setting(20, _count, "attempts a task gets unless it says otherwise")
    max_crashes: int = _setting(3, _crashes, "worker deaths in one step after which the instance fails")
    max_payload_bytes: int = _setting(
        1024 * 1024, _payload_bytes, "largest payload in bytes, before compression; at most 256 MiB"
    )
    beat_grace: float = _setting(30.0, _seconds_or_zero, "seconds without a beat after which agents take its duties")
    accept_content: tuple[str, ...] = _setting(("json", "msgpack"), _words, "serializers whose payloads are loaded")
    serializer: str = _setting("json", _word, "serializer of payloads, unless a task says otherwise")
    compression: str | None = _setting(None, _word_or_none, "kombu compression of payloads from 1 KiB on")
    payload_keys: tuple[str, ...] = _setting(
        (), _keys, "`name:secret` keys that sign payloads; the first one writes, all read", secret=True
    )
    payload_encryption: bool = _setting(False, _flag, "whether payloads are encrypted, too; extra `encryption`")
    accept_unsigned: bool = _setting(
        False, _flag, "whether unsigned payloads are loaded although there are payload_keys"
    )
    reaper: bool = _setting(True, _flag, "whether agents and beats of this app reap dead workers")
    gc: bool = _setting(True, _flag, "whether agents and beats of this app collect garbage")
    step_connections: int | None = _setting(
        None, _auto_or_count, "most connections for ctx.connection of a worker process; auto: one, with many slots four"
    )
    pool_size: int = _setting(4, _count, "most connections of a producer process")
    connect_timeout: float = _setting(10.0, _seconds, "seconds a producer waits for a connection")
    call_timeout: float = _setting(
        30.0,
        _seconds,
        "seconds a call to the database may take in all, connecting included, unless the call says otherwise",
    )
    pooler: bool = _setting(False, _flag, "whether the DSN leads through a transaction pooler such as PgBouncer")
    listen_dsn: str | None = _setting(
        None, _word_or_none, "DSN for LISTEN past a pooler; without it a pooler means polling", secret=True
    )
    log_payloads: bool = _setting(False, _flag, "whether workers log the arguments of each step, at level debug")
    notify: bool = _setting(True, _flag, "whether commits wake workers by NOTIFY; polling finds all work without it")
    task_always_eager: bool = _setting(False, _flag, "whether delay() runs the task here and now, without a database")
    task_eager_propagates: bool = _setting(False, _flag, "whether an eager task's exception comes out of delay()")

    def __setattr__(self, name: str, value: Any) -> None:
        setting = type(self).__dataclass_fields__.get(name)
        if setting is None:
            raise ConfigError(f"unknown setting {name!r}{near(name, self.names())}")
        object.__setattr__(self, name, setting.metadata["check"](name, value))

    @property
    def outcomes_per_commit(self) -> int:
        """Most outcomes in one commit: `flush_batch`, or as many as surely fit one message to the server (1 GiB)."""
        return min(self.flush_batch, max(1, _MESSAGE_BYTES // (2 * self.max_payload_bytes)))

    @property
    def worker_patience(self) -> float:
        """Seconds that a worker process waits for an answer of the database before it replaces its connection."""
        return max(SHORTEST_PATIENCE, self.lease_ttl)

    @property
    def lease_patience(self) -> float:
        """`worker_patience` of an agent or a beat: short enough to renew the leases on a new connection in time."""
        return max(SHORTEST_PATIENCE, self.lease_ttl - 2 * self.heartbeat_interval)

    @classmethod
    def names(cls) -> list[str]:
        """Return the name of every setting."""
        return [setting.name for setting in fields(cls)]

    @classmethod
    def doc(cls, name: str) -> str:
        """Return what a setting means and its unit."""
        return str(cls.__dataclass_fields__[name].metadata["doc"])

    def update(self, **values: Any) -> None:
        """Set several settings; raises ConfigError, and changes nothing, when one of them or their sum is wrong."""
        before = {name: getattr(self, name) for name in self.names()}
        try:
            for name, value in values.items():
                setattr(self, name, value)
            self._check_together()
        except ConfigError:
            for name, value in before.items():
                object.__setattr__(self, name, value)
            raise

    def _check_together(self) -> None:
        soft, hard = self.soft_time_limit, self.time_limit
        if soft is not None and hard is not None and soft >= hard:
            raise ConfigError(f"soft_time_limit ({soft:g} s) must be shorter than time_limit ({hard:g} s)")
        if self.payload_encryption and not self.payload_keys:
            raise ConfigError("payload_encryption needs a key in payload_keys")
        if self.lease_ttl <= 2 * self.heartbeat_interval:
            raise ConfigError(
                f"lease_ttl ({self.lease_ttl:g} s) must be more than twice heartbeat_interval "
                f"({self.heartbeat_interval:g} s), or one lost heartbeat loses the lease"
            )

    @classmethod
    def _refuse_misspelt(cls, environ: Mapping[str, str]) -> None:
        """A variable that looks like one of ours would be ignored in silence; any other may be somebody's own."""
        known = {f"DURABLE_{name.upper()}" for name in cls.names()} | _OTHER_VARIABLES
        for variable in environ:
            if variable.startswith("DURABLE_") and variable not in known:
                close = [name for name in known if sorted(name) == sorted(variable)]
                close += difflib.get_close_matches(variable, known, 1, 0.93)
                if close:
                    raise ConfigError(f"there is no setting {variable}; did you mean {close[0]}?")

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ, **values: Any) -> Config:
        """Return settings from `DURABLE_*` variables, overridden by `values`. Raises ConfigError."""
        config = cls()
        cls._refuse_misspelt(environ)
        from_environment: dict[str, Any] = {}
        for name in cls.names():
            variable = f"DURABLE_{name.upper()}"
            if variable in environ:
                check: Check = cls.__dataclass_fields__[name].metadata["check"]
                from_environment[name] = check(variable, environ[variable])
        config.update(**{**from_environment, **values})
        return config
