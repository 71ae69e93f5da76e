"""Receives events over HTTP: a token, limits on size, time and number of requests, and 202 once the jobs are enqueued.

Importing this module needs starlette and uvicorn.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

import redis
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from shiwu.broker.redis_errors import info_of
from shiwu.errors import QueueFull
from shiwu.watch.formats import MAX_BYTES, read_cloud_event
from shiwu.watch.intake import Intake, Message, Outcome, Plan
from shiwu.watch.watcher import Reports, wait_reason

MAX_REQUESTS: Final = 32
"""Requests whose body is read or whose jobs are enqueued at the same time; further ones get 503."""
MAX_CONNECTIONS: Final = 256
HEAD_S: Final = 10.0
"""How long the head of a request may take, from the connection or from the first byte after an earlier request."""
BODY_S: Final = 10.0
IDLE_S: Final = 5
"""How long an idle connection is kept."""
GRACE_S: Final = 10
RETRY_FULL_S: Final = 10
RETRY_AWAY_S: Final = 5
RETRY_BUSY_S: Final = 1
ALIYUN_TOKEN_HEADER: Final = "x-eventbridge-signature-token"  # noqa: S105 a name, no secret
"""Where Aliyun's EventBridge sends the token of an HTTP target."""
MAX_HEAD_BYTES: Final = 16 * 1024
STOP_POLL_S: Final = 0.5


class ReceiverReports(Reports, Protocol):
    """Where the receiver says what it does."""

    def refused(self, status: int) -> None:
        """A request was refused."""


class Receiver:
    """The application behind the port.

    Args:
        tokens: each of them lets a request in; empty lets every request in.
        stop: set where a report cannot be written.
    """

    def __init__(
        self, intake: Intake, reports: ReceiverReports, *, path: str, tokens: Sequence[bytes], stop: threading.Event
    ) -> None:
        self._intake = intake
        self._reports = reports
        self._tokens = tuple(tokens)
        self._stop = stop
        self._running = 0
        self.output_error: OSError | None = None
        """Why a report could not be written, as where the reader of standard output has exited."""
        self.app = Starlette(routes=[Route(path, self._receive, methods=["POST"])])

    async def _receive(self, request: Request) -> JSONResponse:
        if not self._is_allowed(request.headers):
            return self._refuse(401, "expected Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        if self._running >= MAX_REQUESTS:
            return self._refuse(503, f"{MAX_REQUESTS} requests run already", _retry(RETRY_BUSY_S))
        self._running += 1
        try:
            return await self._deliver(request)
        finally:
            self._running -= 1

    async def _deliver(self, request: Request) -> JSONResponse:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(BODY_S):
                body = await _read_body(request)
        except TimeoutError:
            return self._refuse(408, f"expected the body within {BODY_S:g} s")
        except ClientDisconnect:
            return self._refuse(400, "the connection was closed within the body")
        if body is None:
            return self._refuse(413, f"expected a body of at most {MAX_BYTES} bytes")
        try:
            plan = await run_in_threadpool(self._enqueue, dict(request.headers), body)
        except QueueFull as error:
            self._report(partial(self._reports.lanes, wait_reason(error)))
            return self._refuse(429, "the lane is full", _retry(RETRY_FULL_S))
        except redis.RedisError as error:
            self._report(partial(self._reports.lanes, wait_reason(error)))
            return self._refuse(503, f"Redis: {info_of(error).meaning}", _retry(RETRY_AWAY_S))
        self._report(self._reports.lanes)
        duration_s = time.monotonic() - began_s
        self._report(partial(self._reports.portion, messages=1, plan=plan, duration_s=duration_s))
        counts = {str(outcome): count for outcome, count in plan.counts.items()}
        return JSONResponse({Outcome.ENQUEUED: 0, **counts}, status_code=202)

    def _enqueue(self, headers: dict[str, str], body: bytes) -> Plan:
        plan = self._intake.plan([Message(body, read_cloud_event(headers, body))])
        self._intake.carry_out(plan)
        return plan

    def _report(self, report: Callable[[], None]) -> None:
        """Report, and let the process end where that fails: the reply says what became of the jobs in any case."""
        try:
            report()
        except OSError as error:
            self.output_error = error
            self._stop.set()

    def _is_allowed(self, headers: Mapping[str, str]) -> bool:
        if not self._tokens:
            return True
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = (bearer if scheme.lower() == "bearer" else "", headers.get(ALIYUN_TOKEN_HEADER, ""))
        # All are compared, so that the time tells nothing.
        matches = [
            hmac.compare_digest(token.strip().encode(), expected) for token in given for expected in self._tokens
        ]
        return any(matches)

    def _refuse(self, status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
        self._reports.refused(status)
        # What is left of the body is not read, so the connection cannot carry another request.
        return JSONResponse({"error": text}, status_code=status, headers={**(headers or {}), "Connection": "close"})


def _retry(seconds: int) -> dict[str, str]:
    return {"Retry-After": str(seconds)}


async def _read_body(request: Request) -> bytes | None:
    """The body; None where it is too large."""
    declared = request.headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdecimal() or int(declared[:20]) > MAX_BYTES:
        return None
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            return None
    return bytes(body)


class _Protocol(H11Protocol):
    """Closes a connection whose request head does not arrive in time, which uvicorn itself waits for without limit."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._cancel_timer()

    def _watch_head(self) -> None:
        """Start the timer where a head is awaited, and keep a timer that runs: its time counts from the first byte."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._give_up)

    def _give_up(self) -> None:
        self._head_timer = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()

    def _cancel_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def serve_events(receiver: Receiver, listener: socket.socket, stop: threading.Event) -> None:
    """Answer requests until `stop` is set; those under way are finished within `GRACE_S`."""
    config = uvicorn.Config(
        receiver.app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=GRACE_S,
    )
    asyncio.run(_serve(uvicorn.Server(config), listener, stop))


async def _serve(server: uvicorn.Server, listener: socket.socket, stop: threading.Event) -> None:
    async def end() -> None:
        while not await asyncio.to_thread(stop.wait, STOP_POLL_S):
            pass
        server.should_exit = True

    ending = asyncio.create_task(end())
    try:
        await server.serve(sockets=[listener])
    finally:
        ending.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        OSError: the address is not local, or the port is in use.
    """
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    return socket.create_server((host, port), family=family, backlog=MAX_CONNECTIONS)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to this address."""
    return host in ("localhost", "::1") or host.startswith("127.")
