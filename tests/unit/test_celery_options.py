"""Celery's options on `@app.task` and on base classes, and what of them is refused."""

from __future__ import annotations

from typing import Any

import pytest

from durable import Durable, Task
from durable.errors import DefinitionError, ValidationError


@pytest.fixture
def app() -> Durable:
    return Durable("options", dsn="postgresql://nobody@127.0.0.1:1/none")


def define(app: Durable, **options: Any) -> Task[..., Any]:
    return app.task(name="task", **options)(lambda: None)  # type: ignore[no-any-return, call-overload]


def test_max_retries_counts_attempts_after_the_first(app: Durable) -> None:
    assert define(app, max_retries=0).options.max_attempts == 1


def test_no_max_retries_means_as_good_as_without_end(app: Durable) -> None:
    assert define(app, max_retries=None).options.max_attempts == 1_000_000


def test_autoretry_for_and_its_opposite_are_retry_for(app: Durable) -> None:
    policy = define(app, autoretry_for=(OSError,), dont_autoretry_for=(ConnectionError,)).options.retry
    assert policy.retries(OSError())
    assert not policy.retries(ConnectionError())
    assert not policy.retries(ValueError())


@pytest.mark.parametrize(
    ("options", "delays"),
    [
        ({"retry_backoff": True, "retry_jitter": False}, [1, 2, 4, 8]),
        ({"retry_backoff": 3, "retry_jitter": False, "retry_backoff_max": 10}, [3, 6, 10, 10]),
        ({"retry_backoff": True, "retry_jitter": False, "retry_backoff_max": 10**8}, [1, 2, 4, 8]),
        ({"default_retry_delay": 5}, [5, 5, 5, 5]),
        ({"default_retry_delay": 0}, [0, 0, 0, 0]),
    ],
)
def test_backoff_without_jitter_is_exact(app: Durable, options: dict[str, Any], delays: list[float]) -> None:
    policy = define(app, **options).options.retry
    assert [policy.delay(attempt) for attempt in range(4)] == delays
    policy.delay(10_000)


def test_backoff_with_jitter_spreads_below_the_whole(app: Durable) -> None:
    policy = define(app, retry_backoff=8).options.retry
    delays = [policy.delay(2) for _ in range(200)]
    assert all(0 <= delay <= 32 for delay in delays)
    assert max(delays) - min(delays) > 8


def test_what_is_always_so_may_be_said(app: Durable) -> None:
    define(app, acks_late=True, reject_on_worker_lost=True, track_started=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"acks_late": False}, "max_attempts=1"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": "3"}, "max_retries"),
        ({"max_retries": 3, "max_attempts": 4}, "give one of them"),
        ({"autoretry_for": OSError, "retry_for": OSError}, "give one of them"),
        ({"retry_backoff": True, "backoff": float}, "not both"),
        ({"retry_jitter": 3}, "True or False"),
        ({"retry_kwargs": {"max_retries": 5}}, "give max_retries"),
        ({"throws": (OSError,)}, "dont_retry_for"),
        ({"autoretry": OSError}, "'autoretry_for'"),
        ({"base": int}, "subclass of durable.Task"),
    ],
)
def test_what_can_not_be_had_is_refused_with_what_to_do(app: Durable, options: dict[str, Any], text: str) -> None:
    with pytest.raises((DefinitionError, ValidationError), match=text):
        define(app, **options)
    assert not app.tasks


class Patient(Task[..., Any]):
    autoretry_for = (OSError,)
    max_retries = 5
    retry_backoff = True
    retry_jitter = False


class More(Patient):
    max_retries = 7
    queue = "slow"  # type: ignore[assignment]


def test_a_base_class_sets_options_that_the_decorator_overrides(app: Durable) -> None:
    task = define(app, base=More, retry_backoff=2)
    assert isinstance(task, More)
    assert task.options.max_attempts == 8
    assert task.queue == task.options.queue == "slow"
    assert task.options.retry.retries(OSError())
    assert not task.options.retry.retries(ValueError())
    assert [task.options.retry.delay(attempt) for attempt in range(3)] == [2, 4, 8]


def test_a_coroutine_function_keeps_its_base(app: Durable) -> None:
    async def work() -> int:
        return 1

    task = app.task(base=Patient, name="work")(work)
    assert isinstance(task, Patient)
    assert task.is_async
    assert task.options.max_attempts == 6
