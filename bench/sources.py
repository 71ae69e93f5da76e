"""Sources of a benchmark's images (S3 store, web server, folder), and how the peers read them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, get_args
from urllib.parse import unquote, urlsplit

import boto3
import urllib3
from botocore.config import Config
from tests.support.processes import LOOPBACK, Process, clean_environment, free_ports
from tests.support.servers import S3Server
from tests.support.waiting import wait_until

from shiwu_worker.runtime.cpus import usable_cores

SourceName = Literal["s3", "http", "file"]
SOURCE_NAMES: Final = get_args(SourceName)
CONNECTIONS: Final = 256
_S3_LOCK: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class Source:
    """Images that can be fetched."""

    name: SourceName
    references: tuple[str, ...]
    env: Mapping[str, str]
    """Environment variables that shiwu's worker and the peers need to read them."""
    bytes_mean: float


@contextmanager
def open_source(name: SourceName, files: Sequence[Path], *, folder: Path) -> Iterator[Source]:
    """Serve the files until the block ends."""
    size = sum(path.stat().st_size for path in files) / len(files)
    if name == "file":
        references = tuple(path.resolve().as_uri() for path in files)
        yield Source(name, references, {"SHIWU_ALLOW_FOLDERS": str(files[0].resolve().parent)}, size)
    elif name == "http":
        with _web(files[0].parent, folder) as host:
            references = tuple(f"http://{host}/{path.name}" for path in files)
            yield Source(name, references, {"SHIWU_ALLOW_HOSTS": host}, size)
    else:
        with S3Server(folder=folder) as server:
            references = tuple(server.put(path.name, path.read_bytes()) for path in files)
            yield Source(name, references, server.env, size)


@contextmanager
def _web(pictures: Path, folder: Path) -> Iterator[str]:
    [port] = free_ports(1)
    processes = max(1, usable_cores() // 4)
    ready = folder / "web"
    command = [sys.executable, "-m", "bench.web", str(pictures), str(port), str(processes), str(ready)]
    with Process(command, name="web", folder=folder, env=clean_environment({})) as server:
        wait_until(
            lambda: len(list(folder.glob("web.[0-9]*"))) >= processes or not server.is_running,
            timeout_s=60,
            what="the web server",
        )
        if not server.is_running:
            raise server.error("expected to serve")
        yield f"{LOOPBACK}:{port}"


def fetch(reference: str) -> bytes:
    """Read an image as the peers do: boto3 or urllib3 with kept connections, without retries."""
    parts = urlsplit(reference)
    if parts.scheme == "s3":
        found: bytes = _s3().get_object(Bucket=parts.netloc, Key=parts.path.removeprefix("/"))["Body"].read()
        return found
    if parts.scheme == "file":
        return Path(unquote(parts.path)).read_bytes()
    answer = _http().request("GET", reference)
    if answer.status != 200:
        raise RuntimeError(f"expected 200, got {answer.status} for {reference}")
    return answer.data


def _s3() -> Any:
    with _S3_LOCK:
        return _new_s3()


@lru_cache(maxsize=1)
def _new_s3() -> Any:
    url = os.environ["SHIWU_S3_ENDPOINT_URL"]
    config = Config(max_pool_connections=CONNECTIONS, s3={"addressing_style": "path"})
    return boto3.session.Session().client("s3", endpoint_url=url, config=config)


@lru_cache(maxsize=1)
def _http() -> urllib3.PoolManager:
    return urllib3.PoolManager(maxsize=CONNECTIONS, block=False, retries=False)
