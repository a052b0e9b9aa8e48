"""When periodic work is due; what is declared, and what is refused."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from durable import Durable, Machine, crontab, every, step
from durable.errors import ConfigError, DefinitionError, ValidationError
from durable.instance import Payload
from durable.schedules import Schedule, from_template, parse, template
from durable.storage.schedules import AT_ONCE, fire, occurrences_due


def after(schedule: Schedule, moment: str, count: int = 3) -> list[str]:
    """The next occurrences as local text."""
    found = []
    at = datetime.fromisoformat(moment)
    for _ in range(count):
        following = schedule.next_after(at)
        assert following is not None
        assert following > at
        at = following
        found.append(f"{at:%d %H:%M}Z")
    return found


@pytest.mark.parametrize(
    ("schedule", "expression"),
    [
        (crontab(), "* * * * *"),
        (crontab(minute=0, hour="*/3"), "0 */3 * * *"),
        (crontab(minute=[30, 0], hour={9}, day_of_week="mon-fri"), "0,30 9 * * mon-fri"),
        (crontab(minute="0", hour="0", day_of_month=1, month_of_year="1,4"), "0 0 1 1,4 *"),
        (crontab("*/5  8-18 * * 1-5"), "*/5 8-18 * * 1-5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_crontab_is_written_as_celery_writes_it_or_as_cron_does(schedule: Schedule, expression: str) -> None:
    assert schedule.text == expression
    assert parse(schedule.text, schedule.tz) == schedule


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: crontab(minute=61), "bad minute"),
        (lambda: crontab(minute=True), "crontab's minute must be"),
        (lambda: crontab(minute=[]), "crontab's minute must be"),
        (lambda: crontab(hour=1.5), "crontab's hour must be"),
        (lambda: crontab("* * * * * *"), "five fields"),
        (lambda: crontab("* * * * *", hour=1), "one expression of five fields, or the fields by name"),
        (lambda: crontab(day_of_month=13, day_of_week=5), "Celery means days that are both"),
        (lambda: crontab(day_of_month=30, month_of_year=2), "bad day-of-month"),
        (lambda: crontab(tz="Europe/Atlantis"), "unknown time zone 'Europe/Atlantis'"),
        (lambda: crontab(tz="../etc/passwd"), "unknown time zone"),
        (lambda: every(0), "from 0.1 seconds"),
        (lambda: every(float("nan")), "from 0.1 seconds"),
        (lambda: every(timedelta(days=4000)), "to ten years"),
        (lambda: every("1"), "from 0.1 seconds"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else "make",
)
def test_a_schedule_that_makes_no_sense_is_refused(make: Any, complaint: str) -> None:
    with pytest.raises(DefinitionError, match=complaint):
        make()


def test_an_interval_is_due_at_its_multiples_whoever_computes_it() -> None:
    assert after(every(3600), "2026-11-24T10:20:00+01:00") == ["24 10:00Z", "24 11:00Z", "24 12:00Z"]
    assert every(timedelta(minutes=1)) == every(60)
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    tenth = every(0.1)
    for _ in range(1000):
        moment = tenth.next_after(moment) or moment
    assert moment == datetime(2026, 1, 1, 0, 1, 40, tzinfo=UTC)
    assert parse(tenth.text, "UTC") == tenth


@pytest.mark.parametrize(
    ("schedule", "moment", "due"),
    [
        # 02:30 does not exist on the 29th: the first moment after the gap is 03:00 summer time.
        (crontab("30 2 * * *", tz="Europe/Berlin"), "2026-03-28T12:00Z", ["29 01:00Z", "30 00:30Z", "31 00:30Z"]),
        # 02:30 comes twice on the 25th: once, the first time.
        (crontab("30 2 * * *", tz="Europe/Berlin"), "2026-10-24T12:00Z", ["25 00:30Z", "26 01:30Z", "27 01:30Z"]),
        (crontab("30 * * * *", tz="Europe/Berlin"), "2026-03-29T00:00Z", ["29 00:30Z", "29 01:30Z", "29 02:30Z"]),
        # By elapsed time: both of the hours that come twice.
        (crontab("30 * * * *", tz="Europe/Berlin"), "2026-10-25T00:00Z", ["25 00:30Z", "25 01:30Z", "25 02:30Z"]),
        (crontab("30 2 * * *", tz="America/New_York"), "2026-03-07T12:00Z", ["08 07:00Z", "09 06:30Z", "10 06:30Z"]),
        (crontab("30 1 * * *", tz="America/New_York"), "2026-10-31T12:00Z", ["01 05:30Z", "02 06:30Z", "03 06:30Z"]),
    ],
    ids=["gap", "twice", "hourly gap", "hourly twice", "new york gap", "new york twice"],
)
def test_what_is_due_when_clocks_change(schedule: Schedule, moment: str, due: list[str]) -> None:
    assert after(schedule, moment) == due


@pytest.mark.parametrize(
    ("schedule", "moment", "due"),
    [
        (crontab("15 2 * * *", tz="Europe/Berlin"), "2026-10-25T01:04:34Z", "26 01:15Z"),
        (crontab("15,45 1-3 * * *", tz="Europe/Berlin"), "2026-10-25T01:30:00Z", "25 02:15Z"),
        (crontab("45 1 * * *", tz="Australia/Lord_Howe"), "2026-04-04T15:00:51Z", "05 15:15Z"),
        (crontab("15 2 * * *", tz="Antarctica/Troll"), "2026-10-25T01:50:50Z", "26 02:15Z"),
    ],
    ids=["once a day", "lists", "half an hour", "two hours"],
)
def test_whoever_asks_in_the_second_of_two_hours_hears_of_none_in_the_first(
    schedule: Schedule, moment: str, due: str
) -> None:
    assert after(schedule, moment, 1) == [due]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe"])
@pytest.mark.parametrize("text", ["30 2 * * *", "0,30 1,2 * * *", "*/20 * * * *", "*/30 1,2 * * *"])
def test_what_follows_does_not_depend_on_where_one_looks_from(zone: str, text: str) -> None:
    """A beat that starts, or a schedule that is enabled, in an hour that comes twice fires nothing a second time."""
    found = crontab(text, tz=zone)
    for day in ((3, 7, 22), (3, 28, 22), (4, 4, 12), (10, 3, 12), (10, 24, 20), (10, 31, 22)):
        begin = datetime(2026, *day, tzinfo=UTC)
        chain = [begin]
        while chain[-1] < begin + timedelta(hours=16):
            following = found.next_after(chain[-1])
            assert following is not None
            chain.append(following)
        assert chain == sorted(set(chain))
        for minutes in range(0, 16 * 60, 7):
            moment = begin + timedelta(minutes=minutes, seconds=13)
            assert found.next_after(moment) == next(at for at in chain if at > moment)


@pytest.mark.parametrize(
    ("given", "days"),
    [
        ("fri-mon", "0,1,5,6"),
        ("sat-sun", "0,6"),
        ("5-1", "0,1,5,6"),
        ("Sunday", "sun"),
        ("monday,thursday", "mon,thu"),
        ("mon-fri", "mon-fri"),
    ],
)
def test_weekdays_are_taken_as_celery_takes_them(given: str, days: str) -> None:
    assert crontab(minute=0, hour=0, day_of_week=given).text == f"0 0 * * {days}"


@pytest.mark.parametrize("given", ["fry-mon", "fri-mon-tue", "fri-", "-", "someday", "7-8"])
def test_wrong_weekdays_are_refused(given: str) -> None:
    with pytest.raises(DefinitionError, match="bad day-of-week"):
        crontab(minute=0, hour=0, day_of_week=given)


MINUTE = every(60)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("misfire", "late", "fired", "following"),
    [
        ("once", 1, [0], 60),
        ("once", 200, [180], 240),
        ("once", 86_400, [86_400], 86_460),
        ("skip", 1, [0], 60),
        ("skip", 200, [180], 240),
        ("all", 200, [0, 60, 120, 180], 240),
        ("all", 86_400, [n * 60 for n in range(AT_ONCE)], AT_ONCE * 60),
    ],
)
def test_what_was_missed_is_made_up_for_as_declared(
    misfire: str, late: float, fired: list[int], following: int
) -> None:
    found, next_at = occurrences_due(MINUTE, misfire, NOON, NOON + timedelta(seconds=late))
    assert [(moment - NOON).total_seconds() for moment in found] == fired
    assert next_at == NOON + timedelta(seconds=following)


def test_an_occurrence_that_is_too_late_is_skipped_if_that_was_asked_for() -> None:
    daily = crontab(hour=12, minute=0)
    assert occurrences_due(daily, "skip", NOON, NOON + timedelta(hours=1)) == ([], NOON + timedelta(days=1))
    assert occurrences_due(daily, "once", NOON, NOON + timedelta(hours=1)) == ([NOON], NOON + timedelta(days=1))


@pytest.mark.parametrize("misfire", ["once", "skip", "all"])
def test_several_that_are_merely_late_are_fired_each(misfire: str) -> None:
    """A beat that stood still for a moment, or was restarted, has missed nothing."""
    found, next_at = occurrences_due(every(0.25), misfire, NOON, NOON + timedelta(seconds=1.1))
    assert [(moment - NOON).total_seconds() for moment in found] == [0, 0.25, 0.5, 0.75, 1]
    assert next_at == NOON + timedelta(seconds=1.25)


@pytest.fixture
def app() -> Durable:
    app = Durable("unit", dsn="postgresql://nobody@127.0.0.1:1/none")

    @app.task(name="add", queue="sums")
    def add(a: int, b: int = 1) -> int:
        return a + b

    return app


def test_declarations_of_both_kinds_are_the_same_thing(app: Durable) -> None:
    (add,) = app.tasks.values()
    assert app.periodic(every(30), args=(1,), kwargs={"b": 2}, priority=3, overlap="skip")(add) is add

    @app.periodic(crontab(hour=3, minute=0), name="nightly")
    @app.machine(name="m")
    class M(Machine):
        @step
        def go(self, ctx: Any) -> None: ...

    app.conf.beat_schedule = {
        "celery's": {"task": "add", "schedule": 30.0, "args": (1,), "options": {"queue": "other", "expires": 5}}
    }
    one, two, three = app.schedules()
    assert (one.name, one.schedule, one.overlap, one.new.queue, one.new.priority) == (
        "add",
        every(30),
        "skip",
        "sums",
        3,
    )
    assert (two.name, two.new.machine, two.new.step) == ("nightly", "m", "go")
    assert (three.name, three.schedule, three.new.queue, three.new.expires_in) == ("celery's", every(30), "other", 5.0)
    for entry in (one, two, three):
        assert from_template(template(entry.new), entry.new.state) == entry.new


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"misfire": "never"}, "misfire must be one of"),
        ({"overlap": True}, "overlap must be one of"),
        ({"countdown": 5}, "countdown makes no sense"),
        ({"expires": datetime.now(UTC) + timedelta(days=1)}, "expires must be a number of seconds"),
        ({"queue": "No"}, "queue must be"),
        ({"name": ""}, "a schedule's name"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_declaration_that_makes_no_sense_is_refused(app: Durable, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises((DefinitionError, ValidationError), match=complaint):
        app.periodic(every(1), args=(1,), **options)(app.find_task("add"))
    with pytest.raises(TypeError, match="missing"):
        app.periodic(every(1))(app.find_task("add"))
    assert app.schedules() == []


def test_a_plain_function_is_refused_with_the_remedy(app: Durable) -> None:
    with pytest.raises(DefinitionError, match=r"stands above @app\.task"):
        app.periodic(every(1))(print)


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"task": "ad", "schedule": 1}, "did you mean 'add'"),
        ({"task": "add", "schedule": 1}, "missing"),
        ({"task": "add", "schedule": 0, "args": (1,)}, "from 0.1 seconds"),
        ({"task": "add", "args": (1,)}, "needs 'task' and 'schedule'"),
        ({"task": "add", "schedule": 1, "arg": (1,)}, "unknown key 'arg'; did you mean 'args'"),
        ("add", "must be a mapping"),
    ],
    ids=["unknown task", "arguments", "interval", "no schedule", "unknown key", "no mapping"],
)
def test_a_wrong_entry_of_beat_schedule_is_named(app: Durable, entry: Any, complaint: str) -> None:
    app.conf.beat_schedule = {"mine": entry}
    with pytest.raises(ConfigError, match=f"entry 'mine': .*{complaint}"):
        app.schedules()


def test_a_name_is_declared_once(app: Durable) -> None:
    app.periodic(every(1), args=(1,))(app.find_task("add"))
    app.conf.beat_schedule = {"add": {"task": "add", "schedule": 1, "args": (1,)}}
    with pytest.raises(ConfigError, match=r"'add' is declared by @app\.periodic too"):
        app.schedules()
    with pytest.raises(ConfigError, match="beat_schedule must map names"):
        app.conf.beat_schedule = [1]  # type: ignore[assignment]


def test_two_declarations_of_one_name_are_refused_and_the_same_module_again_is_not(app: Durable) -> None:
    add = app.find_task("add")
    app.periodic(every(1), args=(1,))(add)
    app.periodic(every(1), args=(1,))(add)
    with pytest.raises(DefinitionError, match="'add' is declared twice; give one of them name="):
        app.periodic(every(2), args=(1,))(add)
    assert [entry.schedule for entry in app.schedules()] == [every(1)]


def test_settings_that_are_set_after_a_declaration_count(app: Durable) -> None:
    app.periodic(every(1), args=(1,))(app.find_task("add"))
    app.conf.serializer = "msgpack"
    (entry,) = app.schedules()
    assert entry.new.state.type == app.prepare("add", {"args": (1,)}).state.type == "msgpack"


def test_wrong_entries_are_told_apart_from_the_right_ones(app: Durable) -> None:
    app.periodic(every(1), args=(1,))(app.find_task("add"))
    app.periodic(every(1), name="big", args=("x" * 2_000_000,))(app.find_task("add"))
    app.conf.beat_schedule = {
        "typo": {"task": "ad", "schedule": 1},
        "fine": {"task": "add", "schedule": 1, "args": (1,)},
    }
    found, wrong = app.declared()
    assert [entry.name for entry in found] == ["add", "fine"]
    for error, said in zip(wrong, ["schedule 'big': ", "entry 'typo': no task 'ad'"], strict=True):
        assert said in str(error)


def test_a_template_of_newer_code_is_not_read_wrongly() -> None:
    with pytest.raises(TypeError):
        from_template({"machine": "m", "of_the_future": 1}, Payload("json", b"{}"))


def test_what_is_due_two_seconds_ago_is_not_an_hour_late_when_clocks_go_forward() -> None:
    """psycopg returns times in the session's zone, and Python subtracts those by their wall clocks."""
    berlin = ZoneInfo("Europe/Berlin")
    due = datetime(2026, 3, 29, 0, 59, 59, tzinfo=UTC).astimezone(berlin)  # 01:59:59
    now = datetime(2026, 3, 29, 1, 0, 1, tzinfo=UTC).astimezone(berlin)  # 03:00:01
    firing = fire([])
    assert next(firing)[0] == "due_schedules"
    row = ("s", "every 86400000000 us", "UTC", "skip", "all", due, {"machine": "m"}, "json", b"{}", now, False, None)
    assert firing.send([row])[0] == "insert_many"
