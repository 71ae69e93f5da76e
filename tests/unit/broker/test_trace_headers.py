"""The trace context of a message: written where the caller has a span, read whatever stands there."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import redis
from celery import Celery
from celery.signals import before_task_publish
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import propagate
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags, TraceState, use_span

from shiwu import Client
from shiwu.broker.message_writer import build_message
from shiwu.broker.trace_headers import MAX_CHARS, current_headers, read_headers
from shiwu.contract import MAX_MESSAGE_BYTES, Lane, Request

TRACE = 0x0AF7651916CD43DD8448EB211C80319C
SPAN = 0xB7AD6B7169203331


def span(*, is_sampled: bool = True, state: dict[str, str] | None = None) -> NonRecordingSpan:
    """A span with these ids, as the caller of the client has it."""
    flags = TraceFlags(TraceFlags.SAMPLED if is_sampled else TraceFlags.DEFAULT)
    pairs = list((state or {}).items())
    return NonRecordingSpan(SpanContext(TRACE, SPAN, is_remote=False, trace_flags=flags, trace_state=TraceState(pairs)))


def written(span_: Span) -> str:
    """A span's context in W3C's form."""
    context = span_.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def message(trace: dict[str, str] | None) -> bytes:
    """A message of the client with these headers."""
    return build_message(Request(image="s3://b/k"), job_id="j", lane=Lane.BULK, trace=trace)


def sent(client: redis.Redis) -> bytes:
    """The one message of the lanes."""
    keys = [*Lane.BULK.keys, *Lane.INTERACTIVE.keys]
    found: list[Any] = [raw for key in keys if (raw := client.rpop(key))]
    assert len(found) == 1
    return bytes(found[0])


def test_trace_headers_have_the_span_of_the_caller() -> None:
    """In the form of the W3C, with its state and its sampling flag."""
    with use_span(span(state={"vendor": "x"})):
        headers = current_headers()
    assert headers == {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": "vendor=x",
    }
    assert read_headers(message(headers)) == headers
    with use_span(span(is_sampled=False)):
        assert current_headers() == {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}


def test_trace_headers_leave_out_a_long_state() -> None:
    """The trace goes on without it."""
    with use_span(span(state={f"v{n}": "x" * 200 for n in range(3)})):
        assert current_headers().keys() == {"traceparent"}


def test_trace_headers_without_a_span_are_empty() -> None:
    """OpenTelemetry is loaded here, and no span is current."""
    assert current_headers() == {}
    assert "traceparent" not in json.loads(message(current_headers()))["headers"]


def test_client_does_not_load_opentelemetry() -> None:
    """A producer may have it installed and not use it."""
    code = (
        "import sys, shiwu.broker.trace_headers as t; t.current_headers(); "
        "print(any(name.startswith('opentel') for name in sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "False"


def test_client_sends_trace_headers(redis_url: str, redis_client: redis.Redis) -> None:
    """With a span of a real SDK around `enqueue`; without a span there are none."""
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("producer")
    with Client(redis_url) as client:
        with tracer.start_as_current_span("ask") as span_:
            client.enqueue("s3://b/k")
            assert read_headers(sent(redis_client)) == {"traceparent": written(span_)}
        with tracer.start_as_current_span("ask") as span_:
            list(client.enqueue_many(["s3://b/k"]))
            assert read_headers(sent(redis_client)) == {"traceparent": written(span_)}
        client.enqueue("s3://b/k")
        assert read_headers(sent(redis_client)) == {}


def test_celery_instrumentation_uses_the_same_headers(redis_url: str, redis_client: redis.Redis) -> None:
    """It writes into the headers that `before_task_publish` gets."""

    def inject(headers: dict[str, Any], **_: Any) -> None:
        propagate.inject(headers)

    app = Celery("plain", broker=redis_url, set_as_current=False)
    before_task_publish.connect(inject)
    try:
        with use_span(span()):
            app.send_task("shiwu.tag", args=["s3://b/k"], queue=Lane.BULK.queue)
    finally:
        before_task_publish.disconnect(inject)
        app.close()
    assert read_headers(sent(redis_client)) == {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    }


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(["traceparent", "tracestate"]), ANYTHING))
def test_trace_headers_other_than_short_texts_are_ignored(headers: dict[str, Any]) -> None:
    """Any client may have written them."""
    outer = json.loads(message(None))
    outer["headers"] |= headers
    read = read_headers(json.dumps(outer).encode())
    assert read == {name: text for name, text in headers.items() if isinstance(text, str) and len(text) <= MAX_CHARS}


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b'{"headers":7}', b"[" * 100_000, b'{"headers":{"traceparent":"x"}}' + b" " * MAX_MESSAGE_BYTES],
)
def test_unreadable_message_has_no_trace_headers(raw: bytes) -> None:
    """It does not raise either."""
    assert read_headers(raw) == {}
