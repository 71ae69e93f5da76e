"""Waits for answers: for each shard one task and one connection that listens serve any number of waits.

An announcement may be lost with a connection, but the key of the answer stays. So the task looks for the keys of all
waiting ids when it begins to wait for them, and every two seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextvars import Context

import redis
import redis.asyncio

from shiwu.aio.run_steps import run
from shiwu.aio.subscription import Subscription
from shiwu.broker.chunks import chunks
from shiwu.broker.redis_errors import info_of
from shiwu.broker.sharding import by_shard
from shiwu.client.results import TagResult, read_result
from shiwu.client.waiter import CHUNK_SIZE, LISTENING_POLL_S, RETRY_PAUSE_S, look_steps


class _Wait:
    """One call that waits for answers."""

    def __init__(self) -> None:
        self.found: deque[tuple[str, bytes]] = deque()
        """Answers that the call has not taken yet; at most one for each of its ids."""
        self.missing = 0
        """Ids without an answer."""
        self.unlooked = 0
        """Shards whose keys were not looked for yet, or could not be."""
        self.error: Exception | None = None
        self.has_changed = asyncio.Event()

    def end(self, error: Exception) -> None:
        """Let the call raise this error."""
        self.error = error
        self.has_changed.set()


class Waiter:
    """The waits of one client. Belongs to one event loop.

    Args:
        clients: look for keys; they do not retry by themselves.
        listeners: give the connections that listen.
        timeout_s: how long one command may take; a wait may end this much later than it should.
    """

    def __init__(
        self, clients: Sequence[redis.asyncio.Redis], listeners: Sequence[redis.asyncio.Redis], *, timeout_s: float
    ) -> None:
        self._shards = [
            _ShardWaiter(client, listener, timeout_s=timeout_s)
            for client, listener in zip(clients, listeners, strict=True)
        ]
        self._timeout_s = timeout_s

    async def as_answered(self, ids: Sequence[str], *, timeout_s: float) -> AsyncGenerator[tuple[str, TagResult], None]:
        """Yield (id, answer) in the order in which answers come; end after the last one or after `timeout_s`.

        Raises:
            redis.RedisError: an error that a retry cannot cure (see `shiwu.broker.redis_errors`).
            ForeignResult: another Celery task has one of the ids.
        """
        until_s = time.monotonic() + timeout_s
        wait = _Wait()
        groups = by_shard(ids, shards=len(self._shards), id_of=str)
        for shard, group in groups.items():
            self._shards[shard].add(wait, group)
        try:
            while True:
                while wait.found:
                    job_id, raw = wait.found.popleft()
                    yield job_id, read_result(raw)
                if wait.error is not None:
                    raise wait.error
                if not wait.missing or not await self._has_news(wait, until_s=until_s):
                    return
        finally:
            for shard, group in groups.items():
                self._shards[shard].remove(wait, group)

    async def aclose(self) -> None:
        """End the tasks, close their connections, and let all waits raise redis.ConnectionError."""
        for shard in self._shards:
            await shard.aclose()

    async def _has_news(self, wait: _Wait, *, until_s: float) -> bool:
        """Wait until something has changed; False after `until_s`, once the keys were looked for."""
        while not wait.has_changed.is_set():
            left_s = until_s - time.monotonic()
            if left_s <= 0 and not wait.unlooked:
                return False
            try:
                async with asyncio.timeout(left_s if left_s > 0 else self._timeout_s):
                    await wait.has_changed.wait()
            except TimeoutError:
                if left_s <= 0:
                    return False
        wait.has_changed.clear()
        return True


class _ShardWaiter:
    """The waits for answers of one shard. Its task runs while there are any.

    Args:
        client: looks for keys; it does not retry by itself.
        listener: gives the connection that listens.
        timeout_s: how long one command may take.
    """

    def __init__(self, client: redis.asyncio.Redis, listener: redis.asyncio.Redis, *, timeout_s: float) -> None:
        self._client = client
        self._subscription = Subscription(listener, timeout_s=timeout_s)
        self._waits: dict[str, dict[_Wait, None]] = {}
        """Id → the calls that wait for its answer."""
        self._added: dict[str, None] = {}
        """Ids to subscribe to and to look for."""
        self._removed: dict[str, None] = {}
        """Ids to unsubscribe from."""
        self._unlooked: dict[_Wait, None] = {}
        """Calls whose keys were not looked for yet."""
        self._task: asyncio.Task[None] | None = None
        self._is_stale = False
        """Whether the task has to subscribe or unsubscribe before it goes on reading."""
        self._reading: asyncio.Timeout | None = None
        self._has_worked = False
        """Whether the connection has served for a while since the last error."""

    async def aclose(self) -> None:
        """End the task, close its connection, and let all waits raise redis.ConnectionError."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            # A task that was cancelled before its first step does not do it itself.
            self._task = None
        await self._subscription.close()
        self._end_all(redis.ConnectionError("the client was closed during the wait"))

    # -------------------------------------------------------------------------------- what is waited for
    def add(self, wait: _Wait, ids: Sequence[str]) -> None:
        """Let a call wait for these ids, each of them once."""
        for job_id in ids:
            self._waits.setdefault(job_id, {})[wait] = None
            self._removed.pop(job_id, None)
        self._added.update(dict.fromkeys(ids))
        self._unlooked[wait] = None
        wait.missing += len(ids)
        wait.unlooked += 1
        self._interrupt()
        if self._task is None:
            # Without the context of the call that happens to be the first, as its trace.
            self._task = asyncio.create_task(self._serve(), name="shiwu-waiter", context=Context())

    def remove(self, wait: _Wait, ids: Sequence[str]) -> None:
        """Forget a call that ends, with those of its ids that it still waits for."""
        is_waiting = False
        for job_id in ids:
            waits = self._waits.get(job_id, {})
            if wait in waits:
                is_waiting = True
                del waits[wait]
                if not waits:
                    self._forget(job_id)
        if is_waiting:
            self._unlooked.pop(wait, None)
            self._interrupt()

    def _forget(self, job_id: str) -> None:
        del self._waits[job_id]
        self._added.pop(job_id, None)
        self._removed[job_id] = None

    def _deliver(self, job_id: str, raw: bytes) -> None:
        waits = self._waits.get(job_id)
        if waits is None:
            return
        self._forget(job_id)
        for wait in waits:
            wait.missing -= 1
            wait.found.append((job_id, raw))
            wait.has_changed.set()

    def _end_all(self, error: Exception) -> None:
        for waits in self._waits.values():
            for wait in waits:
                wait.end(error)

    def _interrupt(self) -> None:
        """Let the task go on with what has changed."""
        self._is_stale = True
        if self._reading is not None and not self._reading.expired():
            self._reading.reschedule(asyncio.get_running_loop().time())

    # -------------------------------------------------------------------------------- the task
    async def _serve(self) -> None:
        """Serve the waits until there are none. Then the connection stays open, without subscriptions."""
        try:
            while self._waits or (self._removed and self._subscription.is_open):
                try:
                    await self._listen()
                except (redis.RedisError, OSError) as error:
                    await self._subscription.close()
                    self._end_look(list(self._unlooked))
                    if not info_of(error).is_temporary:
                        self._end_all(error)
                        return
                    # The server may just have closed a connection that was idle for long.
                    pause_s = 0.0 if self._has_worked else RETRY_PAUSE_S
                    self._has_worked = False
                    await asyncio.sleep(pause_s)
        except Exception as error:  # noqa: BLE001 boundary of the task: a defect must not leave waits without an end
            self._end_all(error)
        finally:
            self._task = None

    async def _listen(self) -> None:
        """Read announcements and look for keys, until no wait is left."""
        if not self._subscription.is_open:
            await self._subscription.open()
            self._added = dict.fromkeys(self._waits)
            self._removed.clear()
        poll_at_s = time.monotonic() + LISTENING_POLL_S
        while self._waits or self._removed:
            await self._update()
            await self._read(until_s=poll_at_s)
            if time.monotonic() >= poll_at_s:
                await self._subscription.ping()
                await self._look(list(self._waits))
                poll_at_s = time.monotonic() + LISTENING_POLL_S
                self._has_worked = True
        self._has_worked = True

    async def _update(self) -> None:
        """Subscribe before looking, so that an answer in between is not missed."""
        self._is_stale = False
        added, self._added = self._added, {}
        removed, self._removed = self._removed, {}
        unlooked = list(self._unlooked)
        await self._subscription.remove(removed)
        await self._subscription.add(added)
        await self._look(list(added))
        self._end_look(unlooked)

    def _end_look(self, waits: Iterable[_Wait]) -> None:
        for wait in waits:
            if self._unlooked.pop(wait, wait) is None:
                wait.unlooked -= 1
                wait.has_changed.set()

    async def _look(self, ids: Sequence[str]) -> None:
        for portion in chunks(ids, CHUNK_SIZE):
            for job_id, raw in await run(self._client, look_steps(portion)):
                self._deliver(job_id, raw)

    async def _read(self, *, until_s: float) -> None:
        """Deliver announced answers until it is time to look for keys, or subscriptions have to change."""
        while self._waits and not self._is_stale and len(self._removed) < CHUNK_SIZE:
            try:
                async with asyncio.timeout(until_s - time.monotonic()) as self._reading:
                    found = await self._subscription.read()
            except TimeoutError:
                return
            finally:
                self._reading = None
            if found is not None:
                self._deliver(*found)
