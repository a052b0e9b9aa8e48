"""OpenTelemetry: metrics from the events, and one trace that follows an instance. Extra `opentelemetry`.

    from durable.adapters.opentelemetry import instrument
    instrument()

An instance belongs to the trace in which it was inserted: to the span that was current there, or to one made for it.
Each step it takes is a span, child of that one. What a step inserts belongs to the step's span; a step that is handed a
signal is linked to the span in which it was sent. Steps carry instance, step, attempt, queue and outcome, no payload.

Providers are OpenTelemetry's global ones unless given. Exporters have threads and sockets: in workers make them in a
callback of `telemetry.on_process_start`, after the fork.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opentelemetry import context as contexts
from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from durable import telemetry, tracing
from durable._version import __version__
from durable.adapters.metrics import ROWS, SECONDS, Metric, by_event, labels
from durable.telemetry import Handler

NAME = "durable"
_PROPAGATOR = TraceContextTextMapPropagator()
_HEADER = "traceparent"
_running: list[Callable[[], None]] = []
"""What ends what `instrument` did in this process."""


def instrument(
    tracer_provider: trace.TracerProvider | None = None,
    meter_provider: metrics.MeterProvider | None = None,
    *,
    traces: bool = True,
    measurements: bool = True,
) -> Callable[[], None]:
    """Trace and measure this process, and those forked from it; return a function that ends it.

    Producers and workers both call it; called again, it replaces what it did before. Global providers may be set later:
    nothing is asked of them before.
    """
    while _running:
        _running.pop()()
    if traces:
        tracing.trace_with(StepTracer(trace.get_tracer(NAME, __version__, tracer_provider)))
    handlers: list[tuple[str, Handler]] = []
    if measurements:
        meter = metrics.get_meter(NAME, __version__, meter_provider)
        handlers = [(event, _handler(meter, found)) for event, found in by_event()]
    for event, handler in handlers:
        telemetry.attach(event, handler)

    def stop() -> None:
        if traces:
            tracing.trace_with(None)
        for event, handler in handlers:
            telemetry.detach(event, handler)

    _running.append(stop)
    return stop


def _handler(meter: metrics.Meter, found: Sequence[Metric]) -> Handler:
    records = [(metric, _instrument(meter, metric)) for metric in found]

    def handle(event: str, measurements: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        for metric, record in records:
            record(measurements[metric.measurement], labels(metric, metadata))

    return handle


def _instrument(meter: metrics.Meter, metric: Metric) -> Callable[[Any, dict[str, str]], None]:
    name, unit = f"{NAME}.{metric.name}", "s" if metric.seconds else "1"
    if metric.kind == "counter":
        return meter.create_counter(name, unit, metric.meaning).add
    if metric.kind == "gauge":
        return meter.create_gauge(name, unit, metric.meaning).set
    bounds = [float(bound) for bound in (SECONDS if metric.seconds else ROWS)]
    return meter.create_histogram(name, unit, metric.meaning, explicit_bucket_boundaries_advisory=bounds).record


class StepTracer:
    """The tracer that `durable.tracing` asks."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def context(self, kind: str, name: str) -> str | None:
        """Return the `traceparent` of the current span, or of one made for this insert or signal.

        None while OpenTelemetry has no SDK.
        """
        current = trace.get_current_span()
        if current.get_span_context().is_valid:
            return _written(contexts.get_current())
        span = self._tracer.start_span(f"{kind} {name}", kind=SpanKind.PRODUCER)
        span.end()
        return _written(trace.set_span_in_context(span))

    def step(
        self, name: str, attributes: Mapping[str, str | int], parent: str | None, causes: Sequence[tracing.Cause]
    ) -> StepSpan:
        """Begin the span of a step and make it the current one."""
        # Of an instance inserted without tracing: a trace of its own, whatever surrounds the worker's loop.
        context = Context() if parent is None else _read(parent)
        links = [
            Link(_span_context(cause.context), {"durable.signal": cause.name, "durable.signal_id": cause.id})
            for cause in causes
        ]
        given = {f"durable.{key}": value for key, value in attributes.items()}
        span = self._tracer.start_span(name, context, SpanKind.CONSUMER, given, links)
        return StepSpan(span, context)


class StepSpan:
    """The span of a step that runs."""

    def __init__(self, span: Span, context: Context) -> None:
        self._span = span
        self._token = contexts.attach(trace.set_span_in_context(span, context))

    def end(self, outcome: str, error: str | None) -> None:
        """End the span, with what came of the step."""
        contexts.detach(self._token)
        self._span.set_attribute("durable.outcome", outcome)
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


def _written(context: Context) -> str | None:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    return carrier.get(_HEADER)


def _read(text: str) -> Context:
    return _PROPAGATOR.extract({_HEADER: text}, Context())


def _span_context(text: str) -> trace.SpanContext:
    return trace.get_current_span(_read(text)).get_span_context()
