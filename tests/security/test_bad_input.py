"""Bad input through the API, the command line, the environment and the database: a named error, and nothing written.

The numbers are those of the list in the design (reliability, part E). What is checked elsewhere in detail is here once,
end to end, so that the promise "nothing is written" is one test.
"""

from __future__ import annotations

import decimal
import enum
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from durable import Await, Done, Durable, Machine, Next, RateLimit, crontab, step
from durable.errors import (
    ConfigError,
    DefinitionError,
    DurableError,
    NoTargetError,
    PayloadError,
    TaskFailed,
    UnknownTaskError,
    ValidationError,
)
from durable.testing import drain
from tests.cli.conftest import Ran
from tests.fix_rows import Rows

NAN = float("nan")
CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
DEEP: Any = None
for _ in range(200):
    DEEP = [DEEP]


class Colour(enum.Enum):
    RED = object()


@pytest.fixture
def shop(app: Durable, database: str, schema: str) -> Iterator[Durable]:
    made = Durable("shop", dsn=database, schema=schema, rate_limits={"mails": RateLimit(5, burst=10)})
    made.migrate()

    @made.task(name="keep")
    def keep(value: Any = None) -> Any:
        return value

    @made.machine(name="order")
    class Order(Machine):
        @step(initial=True)
        def begin(self, ctx: Any) -> Any:
            return Await(["paid"], then=self.begin)

    yield made
    made.close()


@pytest.fixture
def rows(app: Durable, database: str, schema: str) -> Iterator[Rows]:
    rows = Rows(database, schema)
    yield rows
    rows.close()


def left(rows: Rows) -> int:
    (row,) = rows.fetch(
        "SELECT (SELECT count(*) FROM {schema}.instances) + (SELECT count(*) FROM {schema}.history)"
        " + (SELECT count(*) FROM {schema}.signals) + (SELECT count(*) FROM {schema}.queues)"
        " + (SELECT count(*) FROM {schema}.schedules) AS count"
    )
    return int(row["count"])


PAYLOADS: list[tuple[str, Any, str]] = [
    ("1-nan", {"x": NAN}, "JSON can't carry it"),
    ("1-inf", [math.inf], "JSON can't carry it"),
    ("2-nul", "a\0b", "NUL"),
    ("2-nul-key", {"a\0b": 1}, "NUL"),
    ("3-surrogate", "\ud800", "not valid Unicode"),
    ("4-set", {1}, "can't be written as json"),
    ("4-object", object(), "can't be written as json"),
    ("4-enum", Colour.RED, "can't be written as json"),
    ("4-generator", (n for n in ()), "can't be written as json"),
    ("4-function", print, "can't be written as json"),
    ("4-exception", ValueError("x"), "can't be written as json"),
    ("5-int-key", {1: "a", "1": "b"}, "which is not text"),
    ("5-none-key", {None: 1}, "which is not text"),
    ("5-mark", {"__type__": "decimal", "__value__": "x"}, "kombu keeps those"),
    ("6-large", "x" * 1_100_000, "more than max_payload_bytes"),
    ("7-deep", DEEP, "nested deeper than 100"),
    ("7-circle", CIRCLE, "nested deeper than 100"),
    ("8-digits", 10**5000, "can't be written as json"),
    ("10-decimal-nan", [decimal.Decimal("sNaN"), {1}], "can't be written as json"),
]


@pytest.mark.parametrize(("value", "says"), [pytest.param(*row[1:], id=row[0]) for row in PAYLOADS])
def test_a_payload_that_cannot_be_carried_is_refused_wherever_it_is_given(
    shop: Durable, rows: Rows, value: Any, says: str
) -> None:
    keep = shop.find_task("keep")
    before = left(rows)
    calls: list[Callable[[], Any]] = [
        lambda: keep.delay(value),
        lambda: keep.delay(value=value),
        lambda: shop.insert("order", state={"value": value}),
        lambda: shop.insert_many([("keep", {}), ("keep", {"args": (value,)})]),
        lambda: shop.signal(1, "paid", value),
        lambda: shop.signal_many([{"target": 1, "name": "paid"}, {"target": 1, "name": "paid", "payload": value}]),
    ]
    for call in calls:
        with pytest.raises((PayloadError, ValidationError), match=says):
            call()
    assert left(rows) == before


@pytest.mark.parametrize("value", [row[1] for row in PAYLOADS if row[0] != "4-generator"],
                         ids=[row[0] for row in PAYLOADS if row[0] != "4-generator"])  # fmt: skip
def test_a_result_that_cannot_be_carried_fails_its_instance_once(shop: Durable, value: Any) -> None:
    """11, 12."""
    bad = shop.task(name="bad")(lambda_free(value))
    result = bad.delay()
    drain(shop)
    with pytest.raises(TaskFailed, match="Payload"):
        result.get(timeout=10)


def lambda_free(value: Any) -> Callable[[], Any]:
    def bad() -> Any:
        return value

    return bad


TIMES = {"eta": "schedule_at", "countdown": "schedule_in"}
"""What `insert` calls them; `apply_async` takes Celery's names."""

OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("22-queue", {"queue": "q;DROP TABLE x"}, "queue must be"),
    ("22-queue-nul", {"queue": "q\0"}, "queue must be"),
    ("24-priority", {"priority": 40000}, "priority must be"),
    ("24-priority-bool", {"priority": True}, "priority must be"),
    ("25-naive", {"eta": datetime(2030, 1, 1)}, "no time zone"),
    ("26-far", {"eta": datetime(9999, 1, 1, tzinfo=UTC)}, "ten years from now"),
    ("26-both", {"eta": datetime.now(UTC), "countdown": 5}, "countdown|schedule_in"),
    ("27-nan", {"countdown": NAN}, "(countdown|schedule_in) must be"),
    ("27-text", {"countdown": "5"}, "(countdown|schedule_in) must be"),
    ("27-far", {"countdown": 1e15}, "(countdown|schedule_in) must be"),
    ("28-past", {"expires": datetime.now(UTC) - timedelta(hours=1)}, "expires"),
    ("28-before-eta", {"countdown": 100, "expires": 5}, "expires"),
    ("29-attempts", {"max_attempts": 0}, "max_attempts must be"),
    ("29-attempts-bool", {"max_attempts": True}, "max_attempts must be"),
    ("31-key", {"correlation_key": "k" * 3000}, "correlation_key must be 1 to 255 bytes"),
    ("31-key-empty", {"correlation_key": ""}, "correlation_key must be 1 to 255 bytes"),
    ("31-key-nul", {"correlation_key": "a\0"}, "NUL"),
    ("31-key-bytes", {"correlation_key": b"k"}, "correlation_key must be text"),
    ("32-scope", {"correlation_key": "k", "correlation_scope": ["finnished"]}, "unknown status"),
    ("32-scope-text", {"correlation_key": "k", "correlation_scope": "done"}, "must be a collection"),
    ("33-concurrency", {"concurrency_key": "k" * 3000}, "concurrency_key"),
    ("33-concurrency-nul", {"concurrency_key": "a\0"}, "NUL"),
    ("35-weight", {"rate_limit": "mails", "weight": 50}, "burst"),
    ("35-weight-zero", {"rate_limit": "mails", "weight": 0}, "weight"),
    ("36-rate", {"rate_limit": "nails"}, "did you mean 'mails'"),
    ("conflict", {"on_conflict": "explode"}, "on_conflict"),
    ("unknown", {"quue": "x"}, "quue"),
]


@pytest.mark.parametrize(("options", "says"), [pytest.param(*row[1:], id=row[0]) for row in OPTIONS])
def test_a_wrong_option_is_refused_wherever_it_is_given(
    shop: Durable, rows: Rows, options: dict[str, Any], says: str
) -> None:
    keep = shop.find_task("keep")
    before = left(rows)
    ours = {TIMES.get(name, name): value for name, value in options.items()}
    calls: list[Callable[[], Any]] = [
        lambda: keep.apply_async((1,), **options),
        lambda: shop.insert("keep", **ours),
        lambda: shop.insert("order", **ours),
        lambda: shop.insert_many([("keep", {}), ("keep", ours)]),
    ]
    for call in calls:
        with pytest.raises((ValidationError, TypeError), match=says):
            call()
    assert left(rows) == before


CALLS: list[tuple[str, Callable[[Durable], Any], type[Exception], str]] = [
    ("20-name", lambda app: app.insert("kep"), UnknownTaskError, "did you mean 'keep'"),
    ("20-none", lambda app: app.insert(None), ValidationError, "a target is a task"),
    ("21-missing", lambda app: app.insert("keep", args=(1, 2)), TypeError, "too many positional"),
    ("21-unknown", lambda app: app.insert("keep", kwargs={"x": 1}), TypeError, "unexpected keyword argument 'x'"),
    ("37-unknown", lambda app: app.signal(4711, "paid"), NoTargetError, "nothing live is at 4711"),
    ("37-key", lambda app: app.signal("42", "paid"), NoTargetError, "nothing live is at '42'"),
    ("37-negative", lambda app: app.signal(-1, "paid"), ValidationError, "an instance id is"),
    ("37-huge", lambda app: app.signal(2**63, "paid"), ValidationError, "an instance id is"),
    ("38-empty", lambda app: app.signal(1, ""), ValidationError, "a signal's name must be"),
    ("38-long", lambda app: app.signal(1, "n" * 300), ValidationError, "a signal's name must be"),
    ("38-dedup", lambda app: app.signal(1, "paid", dedup_key="k" * 3000), ValidationError, "dedup_key must be"),
    ("38-many", lambda app: app.signal_many([{"target": 1, "nam": "x"}]), ValidationError, "entry 0: unknown field"),
    ("38-none", lambda app: app.signal_many([{"target": 1}]), ValidationError, "entry 0: it has no 'name'"),
    ("39-negative", lambda app: app.result(1).get(timeout=-1), ValidationError, "timeout must be"),
    ("39-nan", lambda app: app.result(1).get(timeout=NAN), ValidationError, "timeout must be"),
    ("40-index", lambda app: app.insert_many([("keep", {})] * 517 + [("keep", {"queue": ""})]), ValidationError, "517"),
    ("40-shape", lambda app: app.insert_many(["keep"]), ValidationError, "0"),
    ("cancel-id", lambda app: app.cancel(2**63), ValidationError, "an instance id is"),
    ("cancel-reason", lambda app: app.cancel(1, "x\0"), ValidationError, "NUL"),
    ("retry-id", lambda app: app.retry("1"), ValidationError, "an instance id is"),
    ("pause", lambda app: app.pause("no good"), ValidationError, "queue must be"),
    ("task-option", lambda app: app.insert("keep", eta=5), TypeError, "no option 'eta'; here it is schedule_at"),
    ("machine-option", lambda app: app.insert("order", eta=5), TypeError, "order: there is no option 'eta'"),
    ("state-type", lambda app: app.insert("order", state=[1]), ValidationError, "expected a dict"),
    ("step", lambda app: app.insert("order", step="nowhere"), ValidationError, "nowhere"),
]


@pytest.mark.parametrize(("call", "error", "says"), [pytest.param(*row[1:], id=row[0]) for row in CALLS])
def test_a_wrong_call_is_refused(
    shop: Durable, rows: Rows, call: Callable[[Durable], Any], error: type[Exception], says: str
) -> None:
    before = left(rows)
    with pytest.raises(error, match=says):
        call(shop)
    assert left(rows) == before


@pytest.mark.parametrize(
    ("define", "says"),
    [
        (lambda app: app.task(name="x" * 300)(lambda_free(1)), "name"),
        (lambda app: app.task(name="a\0")(lambda_free(1)), "NUL"),
        (lambda app: app.task(name="v", version=0)(lambda_free(1)), "version"),
        (lambda app: app.task(name="v", version="1")(lambda_free(1)), "version"),
        (lambda app: app.task(name="v", version=1.0)(lambda_free(1)), "version"),
        (lambda app: app.task(name="keep")(lambda_free(1)), "keep"),
        (lambda app: crontab("61 * * * *"), "61"),
        (lambda app: crontab("* * * * * *"), "field"),
        (lambda app: crontab("0 0 31 2 *"), "31 2"),
        (lambda app: crontab("@evry"), "@evry"),
        (lambda app: crontab("0 0 * * *", tz="Mars/Olympus"), "Mars/Olympus"),
    ],
    ids=["44-long", "44-nul", "45-zero", "45-text", "45-float", "44-twice", "46-61", "46-six", "46-never", "46-evry",
         "46-zone"],
)  # fmt: skip
def test_a_wrong_definition_is_refused(shop: Durable, define: Callable[[Durable], Any], says: str) -> None:
    with pytest.raises((DefinitionError, ValidationError, ConfigError), match=says):
        define(shop)


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (lambda: None, "returned None"),
        (lambda: {"a": 1}, "returned dict"),
        (lambda: Next("nowhere"), "has no step 'nowhere'"),
        (lambda: Next("go", delay=-1), "delay"),
        (lambda: Next("go", delay=NAN), "delay"),
        (lambda: Next("go", delay=1e15), "delay"),
        (lambda: Next("go", delay=True), "delay"),
        (lambda: Await([], then="go"), "name"),
        (lambda: Await([1], then="go"), "name"),  # type: ignore[list-item]
        (lambda: Await(["n"] * 1 + [f"n{i}" for i in range(1000)], then="go"), "name"),
        (lambda: Next("go", {"x": NAN}), "NaN|nan"),
        (lambda: Next("go", [1]), "expected a dict"),
        (lambda: Done(object()), "can't be written"),
    ],
    ids=["15-none", "15-dict", "15-step", "16-negative", "16-nan", "16-far", "16-bool", "17-empty", "17-int", "17-many",
         "19-nan", "19-list", "11-object"],
)  # fmt: skip
def test_a_wrong_outcome_fails_its_instance_by_name(shop: Durable, outcome: Callable[[], Any], says: str) -> None:
    @shop.machine(name="wrong")
    class Wrong(Machine):
        @step(initial=True)
        def go(self, ctx: Any) -> Any:
            return outcome()

    result = shop.insert("wrong")
    drain(shop)
    with pytest.raises(TaskFailed, match=says):
        result.get(timeout=10)


# The command line


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("call", "keep", "--args", "[1"), 2),
        (("call", "keep", "--args", "[NaN]"), 2),
        (("call", "keep", "--args", '{"a": 1}'), 2),
        (("call", "keep", "--args", '["\\u0000"]'), 2),
        (("call", "keep", "--args", '["\\ud800"]'), 2),
        (("call", "keep", "--queue", "q'"), 2),
        (("call", "keep", "--countdown", "nan"), 2),
        (("call", "keep", "--countdown", "-5"), 2),
        (("call", "kep"), 2),
        (("call", "keep", "--args", "[1, 2]"), 2),
        (("signal", "4711", "paid"), 1),
        (("signal", "1,2", "paid"), 2),
        (("signal", "99999999999999999999", "paid"), 2),
        (("signal", "1", ""), 2),
        (("result", "abc"), 2),
        (("cancel", "1", "2,"), 2),
        (("list", "--status", "finnished"), 2),
        (("pause", "no good"), 2),
        (("worker", "-c", "0"), 2),
        (("worker", "-c", "10000"), 2),
        (("worker", "-c", "two"), 2),
        (("worker", "-Q", ""), 2),
        (("worker", "--nonsense"), 2),
        (("-A", "nosuch", "status"), 3),
        (("-A", "tasks:nothing", "status"), 3),
        (("-A", "../tasks", "status"), 3),
        (("check", "--limit", "-1"), 2),
        (("doctor", "--max-age", "nan"), 2),
        (("doctor", "--max-xids", "-1"), 2),
    ],
    ids=lambda value: " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, tuple) else "",
)
def test_a_wrong_command_is_one_line_and_an_exit_code_and_writes_nothing(
    app: Durable,
    tasks_module: Callable[[str], Path],
    durable: Callable[..., Ran],
    rows: Rows,
    arguments: tuple[str, ...],
    code: int,
) -> None:
    tasks_module("@app.task(name='keep')\ndef keep(value=None):\n    return value\n")
    ran = durable(*arguments)
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert ran.error
    assert left(rows) == 0


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DURABLE_LEASE_TTL", "twenty"),
        ("DURABLE_LEASE_TTL", "nan"),
        ("DURABLE_LEASE_TTL", "inf"),
        ("DURABLE_LEASE_TTL", ""),
        ("DURABLE_LEASE_TTL", "6"),
        ("DURABLE_NOTIFY", "ture"),
        ("DURABLE_MAX_ATTEMPTS", "1e3"),
        ("DURABLE_MAX_ATTEMPTS", "0"),
        ("DURABLE_FLUSH_BATCH", "-1"),
        ("DURABLE_ACCEPT_CONTENT", "json,nosuch"),
        ("DURABLE_SERIALIZER", "pickle"),
        ("DURABLE_COMPRESSION", "nosuch"),
        ("DURABLE_PAYLOAD_KEYS", "k1:short"),
        ("DURABLE_PAYLOAD_ENCRYPTION", "1"),
    ],
)
def test_a_wrong_variable_is_named_and_nothing_starts(
    app: Durable,
    tasks_module: Callable[[str], Path],
    durable: Callable[..., Ran],
    rows: Rows,
    variable: str,
    value: str,
) -> None:
    tasks_module("@app.task(name='keep')\ndef keep(value=None):\n    return value\n")
    ran = durable("call", "keep", **{variable: value})
    assert (ran.code, ran.out) == (3, ""), ran.err
    name = variable.removeprefix("DURABLE_").lower()
    assert variable in ran.error or name in ran.error, ran.error
    assert left(rows) == 0


# Rows that somebody wrote by hand (62)


@pytest.mark.parametrize(
    "change",
    [
        "state = '5'",
        "state = 'null'",
        "state = '[]'",
        "state = '\\xff'",
        "state = ''",
        "state_type = 'nosuch'",
        "state_type = 'json+nosuch'",
        "state_type = ''",
        "state_type = 'pickle'",
        "step = 'nowhere'",
        "state = convert_to(repeat('[', 100000), 'UTF8')",
    ],
)
def test_a_row_edited_by_hand_fails_alone(shop: Durable, rows: Rows, change: str) -> None:
    keep = shop.find_task("keep")
    before, edited, after = (shop.insert("order") if "step" in change else keep.delay(n) for n in (1, 2, 3))
    rows.fetch(f"UPDATE {{schema}}.instances SET {change} WHERE id = %s", [edited.id])
    drain(shop)
    with pytest.raises(TaskFailed) as failure:
        edited.get(timeout=10)
    assert failure.value.error_type in ("CorruptRowError", "ValidationError")
    assert {before.status, after.status} <= {"done", "awaiting_signal"}


@pytest.mark.parametrize(
    "change",
    [
        "eligible_at = 'infinity'",
        "eligible_at = '-infinity'",
        "attempt = -1",
        "token = -1",
        "crashes = -1",
        "status = 'executing'",
        "status = 'done'",
        "weight = 0",
        "correlation_key = ''",
        "machine_version = 0",
        "children_pending = -1",
        "status = 'awaiting_signal'",
    ],
)
def test_the_database_refuses_what_no_worker_could_read_or_would_write(shop: Durable, rows: Rows, change: str) -> None:
    """63, 65: the second wall."""
    shop.find_task("keep").delay(1)
    with pytest.raises(psycopg.errors.CheckViolation):
        rows.fetch(f"UPDATE {{schema}}.instances SET {change}")


def test_every_error_of_a_refusal_is_one_of_ours() -> None:
    assert issubclass(ValidationError, DurableError)
    assert issubclass(PayloadError, DurableError)
