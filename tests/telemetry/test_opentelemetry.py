"""Traces and metrics, as the real SDK exports them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from durable import Await, Context, Done, Durable, Machine, Next, ScheduleChildren, chain, every, step, tracing
from durable.adapters import opentelemetry as adapter
from durable.runtime.periodic import Firing
from durable.runtime.step_transaction import StepAgain
from tests.fix_db import wait_until
from tests.machines.driver import Driver, View

PAGE = Path(__file__).parents[2] / "docs" / "telemetry.md"


class Traced:
    """A provider, and what it has exported."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    @property
    def spans(self) -> list[ReadableSpan]:
        """Every finished span, in the order of their ends."""
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        """The one span of that name."""
        (span,) = (span for span in self.spans if span.name == name)
        return span

    def tree(self) -> list[tuple[str, str | None]]:
        """(span, its parent) by name."""
        names = {span.context.span_id: span.name for span in self.spans if span.context}
        return [(span.name, names[span.parent.span_id] if span.parent else None) for span in self.spans]


@pytest.fixture
def traced() -> Iterator[Traced]:
    """Tracing by an SDK in memory."""
    traced = Traced()
    stop = adapter.instrument(tracer_provider=traced.provider, measurements=False)
    yield traced
    stop()
    assert tracing.tracer() is None


def define(app: Durable) -> Any:
    """A machine that waits for a signal, has a child, and delays a task on its way."""

    @app.task(name="child")
    def child() -> None: ...

    @app.task(name="aside")
    async def aside() -> None:
        assert trace.get_current_span().is_recording()

    @app.machine(name="Order", queue="default")
    class Order(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Await("paid", then=self.ship)

        @step
        def ship(self, ctx: Context) -> Any:
            aside.delay()
            return ScheduleChildren([child], then=self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done()

    return Order


def test_one_trace_follows_an_instance_through_steps_children_and_what_it_delays(
    app: Durable, driver: Driver, traced: Traced
) -> None:
    order = define(app)
    with traced.tracer.start_as_current_span("request"):
        instance = order.delay()
    driver.drain()
    with traced.tracer.start_as_current_span("webhook"):
        app.signal(instance.id, "paid")
    driver.drain()

    assert sorted(traced.tree()) == [
        ("Order end", "request"),
        ("Order ship", "request"),
        ("Order start", "request"),
        ("aside run", "Order ship"),
        ("child run", "Order ship"),
        ("request", None),
        ("webhook", None),
    ]
    trace_ids = {span.context.trace_id for span in traced.spans if span.name != "webhook" and span.context}
    assert len(trace_ids) == 1


def test_a_signal_is_linked_to_the_step_that_is_handed_it_and_to_no_other(
    app: Durable, driver: Driver, traced: Traced
) -> None:
    instance = define(app).delay()
    driver.drain()
    with traced.tracer.start_as_current_span("webhook"):
        app.signal(instance.id, "paid")
        app.signal(instance.id, "noise")
    driver.drain()

    (link,) = traced.named("Order ship").links
    webhook = traced.named("webhook").context
    assert webhook is not None
    assert (link.context.trace_id, link.context.span_id) == (webhook.trace_id, webhook.span_id)
    assert link.attributes is not None
    assert link.attributes["durable.signal"] == "paid"
    assert not traced.named("Order start").links
    assert not traced.named("Order end").links


def test_where_no_span_is_current_one_is_made_so_that_an_instance_is_one_trace_all_the_same(
    app: Durable, driver: Driver, traced: Traced
) -> None:
    instance = define(app).delay()
    driver.drain()
    app.signal(instance.id, "paid")
    driver.drain()
    tree = dict(traced.tree())
    assert tree["insert Order"] is None
    assert tree["signal paid"] is None
    assert {tree[f"Order {name}"] for name in ("start", "ship", "end")} == {"insert Order"}
    assert traced.named("insert Order").kind == SpanKind.PRODUCER


def test_the_span_of_a_step_says_which_step_it_was_and_what_came_of_it(
    app: Durable, driver: Driver, traced: Traced
) -> None:
    @app.task(name="flaky", version=2, backoff=lambda attempt: 0)
    def flaky(secret: str) -> None:
        raise ValueError("not today")

    instance = app.insert(flaky, args=("sesame",), max_attempts=2)
    driver.drain()
    first, second = (span for span in traced.spans if span.name == "flaky run")
    assert dict(first.attributes or {}) == {
        "durable.id": instance.id,
        "durable.fsm": "flaky",
        "durable.version": 2,
        "durable.step": "run",
        "durable.attempt": 0,
        "durable.queue": "default",
        "durable.outcome": "retry",
    }
    assert first.kind == SpanKind.CONSUMER
    assert first.status.status_code == StatusCode.ERROR
    assert first.status.description == "ValueError: not today"
    assert dict(second.attributes or {})["durable.outcome"] == "stop"
    assert "sesame" not in "".join(span.to_json() for span in traced.spans)


def test_every_way_to_insert_keeps_the_trace(app: Durable, driver: Driver, traced: Traced, view: View) -> None:
    define(app)
    with traced.tracer.start_as_current_span("request") as span:
        app.insert("child")
        app.insert_many([("child", {}), ("aside", {})])
        with app.batch():
            app.find_task("child").delay()  # type: ignore[union-attr]
    ((trace_parent,),) = view.rows("SELECT DISTINCT trace FROM {schema}.instances")
    where = span.get_span_context()
    assert trace_parent.startswith(f"00-{where.trace_id:032x}-{where.span_id:016x}-")
    driver.drain()
    assert view.rows("SELECT trace, count(*) FROM {schema}.history GROUP BY trace") == [(trace_parent, 4)]


def test_an_instance_keeps_its_trace_when_it_is_retried_by_hand(
    app: Durable, driver: Driver, traced: Traced, view: View
) -> None:
    @app.task(name="fails", max_attempts=1)
    def fails() -> None:
        raise ValueError

    instance = fails.delay()
    driver.drain()
    assert app.retry(instance.id)
    driver.drain()
    assert [parent for name, parent in traced.tree() if name == "fails run"] == ["insert fails"] * 2


def test_without_tracing_nothing_is_stored_and_a_traced_worker_begins_a_trace_of_its_own(
    app: Durable, driver: Driver, view: View
) -> None:
    instance = define(app).delay()
    app.signal(instance.id, "paid")
    assert view.rows("SELECT trace FROM {schema}.instances UNION ALL SELECT trace FROM {schema}.signals") == [
        (None,),
        (None,),
    ]
    traced = Traced()
    stop = adapter.instrument(tracer_provider=traced.provider, measurements=False)
    with traced.tracer.start_as_current_span("not the cause"):
        driver.drain()
    stop()
    assert dict(traced.tree())["Order start"] is None
    assert not traced.named("Order ship").links


def test_without_an_sdk_nothing_is_stored(app: Durable, driver: Driver, view: View) -> None:
    stop = adapter.instrument(tracer_provider=trace.NoOpTracerProvider(), measurements=False)
    define(app).delay()
    driver.drain()
    stop()
    assert view.rows("SELECT trace FROM {schema}.instances") == [(None,)]


def test_inline_hops_are_spans_of_the_same_trace(app: Durable, driver: Driver, traced: Traced) -> None:
    @app.machine(name="Hops", inline=True)
    class Hops(Machine):
        @step(initial=True)
        def start(self, ctx: Context) -> Any:
            return Next(self.end)

        @step
        def end(self, ctx: Context) -> Any:
            return Done()

    Hops.delay()
    driver.drain()
    assert [entry for entry in traced.tree() if entry[1]] == [
        ("Hops start", "insert Hops"),
        ("Hops end", "insert Hops"),
    ]


def test_a_step_that_did_not_happen_is_a_span_without_an_outcome(app: Durable, driver: Driver, traced: Traced) -> None:
    tries: list[int] = []

    @app.task(name="work")
    def work() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise StepAgain("deadlock")

    work.delay()
    driver.drain()
    outcomes = [(span.attributes or {})["durable.outcome"] for span in traced.spans if span.name == "work run"]
    assert outcomes == ["again", "done"]


def test_each_occurrence_of_periodic_work_is_a_trace_of_its_own_and_a_declaration_is_none(
    app: Durable, driver: Driver, traced: Traced, connection: Any
) -> None:
    @app.periodic(every(3600))
    @app.task(name="hourly")
    def hourly() -> None: ...

    firing = Firing(app, driver.engine._link)
    firing.declare()
    assert traced.spans == []
    for _ in range(2):
        connection.execute(f"UPDATE {app.schema}.schedules SET next_at = now() - interval '1 s'")
        assert firing.fire() == 1
    driver.drain()
    assert traced.tree() == [("insert hourly", None)] * 2 + [("hourly run", "insert hourly")] * 2
    steps = [span for span in traced.spans if span.name == "hourly run"]
    assert len({span.context.trace_id for span in steps if span.context}) == 2


def test_a_canvas_is_one_trace(app: Durable, driver: Driver, traced: Traced) -> None:
    @app.task(name="add")
    def add(a: int, b: int) -> int:
        return a + b

    with traced.tracer.start_as_current_span("request"):
        chain(add.s(1, 2), add.s(3)).delay()
    driver.drain()
    runs = [span for span in traced.spans if span.name == "add run"]
    assert len(runs) == 2
    assert len({span.context.trace_id for span in traced.spans if span.context}) == 1


class Broken:
    """A tracer that fails in one place."""

    def __init__(self, place: str) -> None:
        self.place = place

    def context(self, kind: str, name: str) -> str:
        return self._maybe("context", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")

    def step(self, *_: Any) -> Any:
        return self._maybe("step", self)

    def end(self, *_: Any) -> None:
        self._maybe("end", None)

    def _maybe(self, place: str, value: Any) -> Any:
        if place == self.place:
            raise RuntimeError("broken")
        return value


@pytest.mark.parametrize("place", ["context", "step", "end"])
def test_a_tracer_that_fails_is_switched_off_and_nothing_else_happens(
    place: str, app: Durable, driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task(name="work")
    def work() -> int:
        return 3

    tracing.trace_with(Broken(place))
    result = work.delay()
    driver.drain()
    assert result.get(timeout=5) == 3
    assert tracing.tracer() is None
    assert "tracing failed" in caplog.text


def test_the_events_become_metrics(app: Durable, driver: Driver) -> None:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    adapter.instrument(meter_provider=provider, traces=False)
    stop = adapter.instrument(meter_provider=provider, traces=False)  # once more, which must not count twice

    @app.task(name="work")
    def work() -> None: ...

    app.insert_many([(work, {})] * 3)
    driver.engine._saturation.report()
    driver.drain()
    stop()

    data = reader.get_metrics_data()
    assert data is not None
    metrics = {m.name: m for r in data.resource_metrics for scope in r.scope_metrics for m in scope.metrics}
    (steps,) = metrics["durable.step_duration"].data.data_points
    assert (steps.count, dict(steps.attributes or {})) == (3, {"fsm": "work", "step": "run", "kind": "done"})  # type: ignore[union-attr]
    assert metrics["durable.step_duration"].unit == "s"
    (claimed,) = metrics["durable.claimed"].data.data_points
    assert (claimed.value, dict(claimed.attributes or {})) == (3, {"queue": "default"})  # type: ignore[union-attr]
    (slots,) = metrics["durable.slots"].data.data_points
    assert slots.value == 1  # type: ignore[union-attr]
    provider.shutdown()


def test_real_workers_set_up_as_the_page_says_export_what_they_trace_and_measure(
    tasks_module: Callable[[str], Path], durable_worker: Any, tmp_path: Path, connection: Any, schema: str
) -> None:
    (example,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    folder = tasks_module("""
        import os, pathlib
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        def to_file(kind, exporter):
            out = pathlib.Path(__file__).with_name(f"{kind}-{os.getpid()}.jsonl").open("w")
            return exporter(out=out, formatter=lambda thing: thing.to_json(indent=None) + "\\n")

        OTLPSpanExporter = lambda: to_file("spans", ConsoleSpanExporter)
        OTLPMetricExporter = lambda: to_file("metrics", ConsoleMetricExporter)

        # example

        @app.task
        def inner():
            pass

        @app.task
        def outer():
            inner.delay()

        app.migrate()
        app.close()
    """)
    tasks = folder / "tasks.py"
    tasks.write_text(tasks.read_text().replace("# example", example))
    worker = durable_worker("worker", "-c", "2")
    call = durable_worker("call", "tasks.outer", "--wait", wait=False)
    assert call.process.wait(20) == 0, call.output()
    wait_until(lambda: connection.execute(f"SELECT count(*) FROM {schema}.history").fetchone() == (2,))
    worker.stop()
    assert "fork" not in worker.output()

    def lines(kind: str) -> list[Any]:
        text = "".join(path.read_text() for path in tmp_path.glob(f"{kind}-*.jsonl"))
        return [json.loads(line) for line in text.splitlines()]

    spans = {span["name"]: span for span in lines("spans")}
    inner, outer = spans["tasks.inner run"], spans["tasks.outer run"]
    assert inner["parent_id"] == outer["context"]["span_id"]
    assert inner["context"]["trace_id"] == outer["context"]["trace_id"]
    points = [
        point
        for data in lines("metrics")
        for resource in data["resource_metrics"]
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
        if metric["name"] == "durable.step_duration"
        for point in metric["data"]["data_points"]
    ]
    assert sorted((point["attributes"]["fsm"], point["count"]) for point in points) == [
        ("tasks.inner", 1),
        ("tasks.outer", 1),
    ]
