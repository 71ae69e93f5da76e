"""Lets one test run with both clients: `shiwu.aio.Client` with the methods of `shiwu.Client`."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self, cast

from shiwu import Client, aio

CALL_LIMIT_S: Final = 150.0
"""How long one call may take before the test fails."""


class OpenClient(Protocol):
    """Opens a client; the arguments are those of `shiwu.Client`."""

    def __call__(self, redis_url: str, **options: Any) -> Client:
        """Return the client, to be closed by the caller."""
        ...


class AsyncioClient:
    """The asyncio client for tests that block: its event loop runs in a thread of its own.

    Its methods may be called from any number of threads.
    """

    def __init__(self, redis_url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = aio.Client(redis_url, **options)
        self._thread = threading.Thread(target=self._loop.run_forever, name="asyncio-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client and its loop; fails where a task is left."""
        if self._loop.is_closed():
            return
        try:
            self.run(self._client.aclose())
            left = self.run(_other_tasks())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CALL_LIMIT_S)
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
        assert not left, f"expected no task after the client was closed, got {left}"

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The result of a coroutine that runs in the loop."""
        running: Future[Any] = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return running.result(CALL_LIMIT_S)
        except BaseException:  # also Ctrl-C and pytest's time limit: the coroutine must not run on
            running.cancel()
            raise

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        def call(*args: Any, **options: Any) -> Any:
            # A generator of this client's values would block the loop that has to give them.
            args = tuple(list(arg) if name == "requeue" and inspect.isgenerator(arg) else arg for arg in args)
            if callable(report := options.get("on_unreadable")):
                options["on_unreadable"] = lambda item: report(BlockingItem(self, item))
            value: Any = found(*args, **options)
            if inspect.iscoroutine(value):
                return self.run(value)
            return self._each(value) if isinstance(value, AsyncGenerator) else value

        return call

    def _each(self, values: AsyncGenerator[Any, None]) -> Iterator[Any]:
        try:
            while (value := self.run(_next(values))) is not None:
                yield BlockingItem(self, value) if isinstance(value, aio.StreamItem) else value
        finally:
            # A test may drop the iterator after it has closed the client.
            if not self._loop.is_closed():
                self.run(values.aclose())


@dataclass(frozen=True)
class BlockingItem:
    """An item of the results stream whose `ack` blocks."""

    client: AsyncioClient
    item: aio.StreamItem | aio.UnreadableItem

    def ack(self, **options: float) -> None:
        """Acknowledge the answer."""
        self.client.run(self.item.ack(**options))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.item, name)


def open_asyncio_client(redis_url: str, **options: Any) -> Client:
    """An asyncio client that a test uses like a blocking one."""
    return cast("Client", AsyncioClient(redis_url, **options))


def open_blocking_client(redis_url: str, **options: Any) -> Client:
    """A blocking client."""
    return Client(redis_url, **options)


OPENERS: Final[dict[str, OpenClient]] = {"blocking": open_blocking_client, "asyncio": open_asyncio_client}


async def _next(values: AsyncGenerator[Any, None]) -> Any:
    return await anext(values, None)


async def _other_tasks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
