"""An OpenTelemetry collector on loopback that keeps the spans it is sent over OTLP/HTTP."""

from __future__ import annotations

import gzip
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.support.processes import LOOPBACK


@dataclass(frozen=True, slots=True)
class KeptSpan:
    """One span as it came; ids in hex."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    is_error: bool
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    resource: dict[str, Any]
    links: tuple[str, ...]
    """Ids of the spans that it links to."""


class Collector:
    """Listens from `start` to `stop`; `requests` counts what it was asked, spans or not."""

    def __init__(self) -> None:
        self.requests = 0
        self._spans: list[KeptSpan] = []
        self._lock = threading.Lock()
        self._server = _Server((LOOPBACK, 0), self)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="collector", daemon=True
        )

    @property
    def env(self) -> dict[str, str]:
        """Variables that send a worker's spans here, without the usual pause of five seconds."""
        url = f"http://{LOOPBACK}:{self._server.server_address[1]}"
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_SCHEDULE_DELAY": "100"}

    def spans(self) -> list[KeptSpan]:
        """What has come up to now."""
        with self._lock:
            return list(self._spans)

    def of_job(self, job_id: str) -> KeptSpan | None:
        """The span of a job, if it has come."""
        return next((span for span in self.spans() if span.attributes.get("messaging.message.id") == job_id), None)

    def take(self, path: str, body: bytes) -> int:
        """Keep a request's spans; return the HTTP status. Called by the handlers."""
        with self._lock:
            self.requests += 1
            if path != "/v1/traces":
                return 404
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                resource = _plain(group.resource.attributes)
                self._spans += [_kept(span, resource) for scope in group.scope_spans for span in scope.spans]
        return 200

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


def _kept(span: Any, resource: dict[str, Any]) -> KeptSpan:
    return KeptSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        is_error=span.status.code == span.status.STATUS_CODE_ERROR,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_plain(span.attributes),
        resource=resource,
        links=tuple(link.span_id.hex() for link in span.links),
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], collector: Collector) -> None:
        self.collector = collector
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.send_response(self.server.collector.take(self.path, body))
        reply = ExportTraceServiceResponse().SerializeToString()
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
