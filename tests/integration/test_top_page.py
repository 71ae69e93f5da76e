"""`shiwu top --serve`: the page and the JSON, who may ask, and what it costs."""

from __future__ import annotations

import http.client
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from shiwu.broker.connection import connect
from shiwu.cli.http_server import serve_app
from shiwu.top.look import Look
from shiwu.top.page import TopPage
from shiwu.top.reader import LookReader
from tests.support import top_states
from tests.support.health_port import probe
from tests.support.processes import LOOPBACK, Process, clean_environment, free_ports
from tests.support.waiting import wait_until


class CountingReader(LookReader):
    """Counts its looks."""

    count = 0

    def look(self) -> Look:
        """Read the service."""
        self.count += 1
        return super().look()


@pytest.fixture
def reader(redis_url: str, redis_client: redis.Redis) -> Iterator[CountingReader]:
    """A reader of a busy service."""
    top_states.fill(redis_client, redis_url)
    top_states.add_worker(redis_client, "<script>x</script>", top_states.GPU_WORKER)
    with connect(redis_url, timeout_s=1) as client:
        yield CountingReader(client)


def ask(port: int, *, method: str = "GET", path: str = "/", host: str = LOOPBACK) -> tuple[int, dict[str, str], str]:
    """Status, headers and body."""
    client = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
    try:
        client.request(method, path, headers={"Host": host})
        reply = client.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read().decode()
    finally:
        client.close()


def test_page_shows_the_look_and_asks_redis_once(reader: CountingReader) -> None:
    """Names of workers become text, not HTML; Redis is asked again after the interval."""
    now_s = [0.0]
    page = TopPage(reader, where="redis:6379/0", host=LOOPBACK, every_s=2.0, clock=lambda: now_s[0])
    with serve_app(page, host=LOOPBACK, port=0) as port:
        status, headers, body = ask(port)
        assert status == 200
        for text in ("redis:6379/0", "interactive", "source_unavailable", "gpu-host-0", "night", 'content="2"'):
            assert text in body
        assert "<script>" not in body
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        look = json.loads(ask(port, path="/look")[2])
        assert {lane["lane"]: lane["waiting"] for lane in look["lanes"]} == {"interactive": 3, "bulk": 40}
        assert reader.count == 1
        now_s[0] = 2.0
        ask(port)
        assert reader.count == 2


def test_page_refuses_what_is_not_meant_for_it(reader: CountingReader) -> None:
    """Names of the web that lead to this machine, other methods and paths; a public address takes any name."""
    page = TopPage(reader, where="x", host=LOOPBACK, every_s=2.0)
    with serve_app(page, host=LOOPBACK, port=0) as port:
        assert ask(port, host="evil.example")[0] == 403
        assert ask(port, host=f"localhost:{port}")[0] == 200
        assert ask(port, host="[::1]:1")[0] == 200
        assert ask(port, method="POST")[0] == 405
        assert ask(port, path="/other")[0] == 404
    public = TopPage(reader, where="x", host="0.0.0.0", every_s=2.0)
    with serve_app(public, host=LOOPBACK, port=0) as port:
        assert ask(port, host="top.example")[0] == 200


def test_outage_is_told_on_the_page(reader: CountingReader, redis_client: redis.Redis) -> None:
    """With the figures of the last look."""
    now_s = [0.0]
    page = TopPage(reader, where="x", host=LOOPBACK, every_s=2.0, clock=lambda: now_s[0])
    with serve_app(page, host=LOOPBACK, port=0) as port:
        assert "does not answer" not in ask(port)[2]
        redis_client.client_pause(1500)
        now_s[0] = 2.0
        body = ask(port)[2]
        assert "Redis does not answer" in body
        assert "source_unavailable" in body


def test_command_serves_until_sigterm(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """On loopback; exit code 0."""
    top_states.fill(redis_client, redis_url)
    [port] = free_ports(1)
    command = [sys.executable, "-m", "shiwu.cli", "--redis-url", redis_url, "top", "--serve", str(port)]
    with Process(command, name="top", folder=tmp_path, env=clean_environment({})) as process:
        wait_until(lambda: probe(port, "/look")[0] == 200, timeout_s=30)
        assert f"http://127.0.0.1:{port}/" in process.log_text()
        process.signal(signal.SIGTERM)
        assert process.wait(timeout_s=20) == 0
