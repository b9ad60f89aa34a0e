"""Traces in OpenTelemetry's terms: one span a request, a span below it for each stage.

Off unless `ICM_LORA_OTLP_ENDPOINT` is set; the packages are those of the extra `otel`. Stages are
measured anyway (answers and metrics state them), so their spans are made from these numbers when
a stage group is over: laid end to end, the last one ending then. No span holds a description, a
prompt, a completion or a key.
"""

import asyncio
import importlib.util
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from service.errors import MissingDependencyError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

SERVICE_NAME = "icm-lora"
_TRACES_PATH = "/v1/traces"
_PROPAGATED_HEADERS = ("traceparent", "tracestate")  # W3C Trace Context
_NANOSECONDS = 1_000_000_000

Attribute = str | int | float | bool


@dataclass
class TracedSpan:
    """What a block of code may say about itself; where nothing is traced it goes nowhere.

    Attributes:
        attributes: bounded facts, such as how the cache took part.
        seconds: stages of the block in the order in which they ran.
        name: replaces the span's first name where set.
    """

    attributes: dict[str, Attribute] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class _Position:
    """Where in a trace the current task is."""

    tracer: "Tracer"
    parent: "Context"


_position: ContextVar[_Position | None] = ContextVar("icm_lora_trace", default=None)


class Tracing:
    """Sends spans away in batches, from a thread of its own.

    Args:
        exporter: where to.
        version: of the service.
    """

    def __init__(self, exporter: "SpanExporter", version: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": SERVICE_NAME, "service.version": version})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SERVICE_NAME, version)

    @contextmanager
    def trace_request(self, name: str, headers: Mapping[str, str]) -> Iterator[TracedSpan]:
        """The root span of a request, below the caller's where it sent a `traceparent`."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {key: headers[key] for key in _PROPAGATED_HEADERS if key in headers}
        parent = TraceContextTextMapPropagator().extract(carrier)
        span = self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER)
        with _follow(self._tracer, span) as traced:
            yield traced

    def close(self) -> None:
        """Sends what is left; blocks for as long as the exporter takes."""
        self._provider.shutdown()


def open_tracing(endpoint: str, version: str) -> Tracing:
    """Traces that go to a collector by OTLP over HTTP.

    The exporter's and sampler's other settings are OpenTelemetry's own `OTEL_*` variables.

    Args:
        endpoint: the collector's base URL, such as `http://127.0.0.1:4318`.
        version: of the service.

    Raises:
        MissingDependencyError: the extra is not installed.
    """
    for package in ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # not even its parent is there
            found = None
        if found is None:
            raise MissingDependencyError(
                f"ICM_LORA_OTLP_ENDPOINT is set, but {package} is not installed: "
                "pip install 'icm-lora[otel]', or leave the setting empty"
            )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return Tracing(OTLPSpanExporter(endpoint=endpoint.rstrip("/") + _TRACES_PATH), version)


@contextmanager
def trace(name: str, *, nests: bool = True) -> Iterator[TracedSpan]:
    """A span below the current task's; without a traced request it costs next to nothing.

    Args:
        name: of the block.
        nests: spans that begin in the block lie below this one. Not for the body of a generator,
            which may be closed by another task than the one that runs it.
    """
    position = _position.get()
    if position is None:
        yield TracedSpan()
        return
    span = position.tracer.start_span(name, context=position.parent)
    with _follow(position.tracer, span, nests) as traced:
        yield traced


@contextmanager
def _follow(tracer: "Tracer", span: "Span", nests: bool = True) -> Iterator[TracedSpan]:
    """Makes a span the parent of what follows in the block, and ends it with the block."""
    from opentelemetry.trace import StatusCode, set_span_in_context

    below, traced = set_span_in_context(span), TracedSpan()
    token = _position.set(_Position(tracer, below)) if nests else None
    try:
        yield traced
    except (asyncio.CancelledError, GeneratorExit):
        span.set_attribute("icm_lora.abandoned", True)
        raise
    except BaseException as error:
        # Its type only: the message may quote a prompt.
        span.set_attribute("error.type", type(error).__qualname__)
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        if token is not None:
            _position.reset(token)
        end = time.time_ns()
        start = end - round(sum(traced.seconds.values()) * _NANOSECONDS)
        for stage, seconds in traced.seconds.items():
            child = tracer.start_span(stage, context=below, start_time=start)
            start += round(seconds * _NANOSECONDS)
            child.end(start)
        if traced.name is not None:
            span.update_name(traced.name)
        span.set_attributes(traced.attributes)
        span.end(end)
