"""`self.retry` in its forms, `self.request`, `ignore_result`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from durable import Durable, TaskFailed
from tests.machines.driver import Driver, View


@pytest.mark.parametrize("raised", [True, False])
def test_retry_leaves_the_step_whether_it_is_raised_or_called(app: Durable, driver: Driver, raised: bool) -> None:
    @app.task(name="task", bind=True)
    def task(self: Any) -> int:
        if self.request.retries < 2:
            if raised:
                raise self.retry(countdown=0)
            self.retry(countdown=0)
        return int(self.request.retries)

    result = task.delay()
    driver.drain()
    assert result.get(timeout=1) == 2


def test_max_retries_of_the_call_is_the_limit_and_exc_the_failure(app: Durable, driver: Driver) -> None:
    @app.task(name="task", bind=True, max_retries=None, default_retry_delay=0)
    def task(self: Any) -> None:
        try:
            raise OSError("gone")
        except OSError as exc:
            raise self.retry(exc=exc, max_retries=3) from exc

    result = task.delay()
    driver.drain()
    with pytest.raises(TaskFailed, match="OSError: gone"):
        result.get(timeout=1)
    assert result.attempts == 4


def test_eta_of_a_retry_is_a_moment(app: Durable, driver: Driver, view: View) -> None:
    moment = datetime.now(UTC) + timedelta(minutes=10)

    @app.task(name="task", bind=True)
    def task(self: Any) -> None:
        self.retry(eta=moment)

    result = task.delay()
    driver.drain()
    status, eligible = view.of(result.id, "status", "eligible_at")
    assert status == "scheduled"
    assert abs(eligible - moment) < timedelta(seconds=10)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"countdown": 1, "eta": datetime.now(UTC)}, "not both"),
        ({"max_retries": -1}, "max_retries"),
        ({"eta": datetime(2030, 1, 1)}, "time zone"),
    ],
)
def test_wrong_arguments_of_retry_are_the_failure(
    app: Durable, driver: Driver, arguments: dict[str, Any], text: str
) -> None:
    @app.task(name="task", bind=True, max_retries=0)
    def task(self: Any) -> None:
        self.retry(**arguments)

    result = task.delay()
    driver.drain()
    with pytest.raises(TaskFailed, match=text):
        result.get(timeout=1)


def test_the_request_is_what_celery_s_is(app: Durable, driver: Driver) -> None:
    @app.task(name="task", bind=True, queue="default")
    def task(self: Any) -> list[Any]:
        request = self.request
        return [request.id, request.task, request.retries, request.parent_id, self.name, self.task.name]

    result = task.delay()
    driver.drain()
    assert result.get(timeout=1) == [result.id, "task", 0, None, "task", "task"]


def test_an_ignored_result_is_not_stored_unless_something_waits_for_it(app: Durable, driver: Driver) -> None:
    @app.task(name="task", ignore_result=True)
    def task(x: int) -> int:
        return x + 1

    alone, chained = task.delay(1), (task.s(1) | task.s()).delay()
    driver.drain()
    assert (alone.status, alone.result) == ("done", None)
    assert chained.get(timeout=1) == 3
