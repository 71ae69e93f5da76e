"""W3C trace context in a message's headers, where OpenTelemetry's instrumentation of Celery writes it too."""

from __future__ import annotations

import sys
from typing import Any, Final

import msgspec

from shiwu.contract import MAX_MESSAGE_BYTES

MAX_CHARS: Final = 512
"""A longer value is left out; the recommendation asks nobody to carry more of a tracestate."""


class _Headers(msgspec.Struct, frozen=True):
    traceparent: Any = None
    tracestate: Any = None


class _Outer(msgspec.Struct, frozen=True):
    headers: _Headers


_OUTER: Final[msgspec.json.Decoder[_Outer]] = msgspec.json.Decoder(_Outer)


def current_headers() -> dict[str, str]:
    """`traceparent`, and perhaps `tracestate`, of the caller's span; empty where there is none.

    OpenTelemetry is never loaded by us: a caller with a span has loaded it, and without it there is no span to find.
    """
    if "opentelemetry.trace" not in sys.modules:
        return {}
    # An import and not what `sys.modules` holds: another thread may be in the midst of importing it.
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    headers: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(headers)
    return _short(headers)


def read_headers(raw: bytes) -> dict[str, str]:
    """The same of a message, valid or not; empty for one without them and for one that can't be read."""
    if len(raw) > MAX_MESSAGE_BYTES:
        return {}
    try:
        headers = _OUTER.decode(raw).headers
    except (ValueError, RecursionError):
        return {}
    return _short({"traceparent": headers.traceparent, "tracestate": headers.tracestate})


def _short(headers: dict[str, Any]) -> dict[str, str]:
    return {name: text for name, text in headers.items() if isinstance(text, str) and len(text) <= MAX_CHARS}
