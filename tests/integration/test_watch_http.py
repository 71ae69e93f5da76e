"""`shiwu watch http://…`: a real watcher process that receives events, and its metrics."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from shiwu.contract import WATCH_UNREAD
from shiwu.watch.formats import MAX_BYTES
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import LOOPBACK, Process, clean_environment, free_ports
from tests.support.promtool import NEEDS_PROMTOOL, check_metrics
from tests.support.servers import Valkey
from tests.support.waiting import wait_until
from tests.support.watch import lines, record, run_watch, total, waiting_jobs, watch_process, write_rules

DATA = Path(__file__).parents[1] / "unit" / "watch" / "data"
TOKEN = "token-0123456789abcdef"
OLD_TOKEN = "token-of-last-month-xyz"
Reply = tuple[int, dict[str, str], dict[str, Any]]


class Receiver:
    """A running watcher."""

    def __init__(self, process: Process, port: int, metrics_port: int, lanes: FaultProxy) -> None:
        self.process, self.port, self.metrics_port, self.lanes = process, port, metrics_port, lanes

    def post(
        self,
        body: bytes,
        *,
        token: str = TOKEN,
        path: str = "/events",
        method: str = "POST",
        headers: dict[str, str] | None = None,
    ) -> Reply:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=30)
        all_headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request(method, path, body=body, headers=all_headers | (headers or {}))
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        content = json.loads(text) if text.startswith(b"{") else {}
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, content

    def connect(self) -> socket.socket:
        """A plain connection."""
        return socket.create_connection((LOOPBACK, self.port), timeout=30)

    @property
    def is_open(self) -> bool:
        """Whether the port takes connections."""
        try:
            self.connect().close()
        except OSError:
            return False
        return True

    def metric(self, name: str, **labels: str) -> float:
        """A sample of the metrics."""
        for family in text_string_to_metric_families(self.metrics()):
            for sample in family.samples:
                if (sample.name, sample.labels) == (name, labels):
                    return sample.value
        return 0.0

    def metrics(self) -> str:
        """The page of the metrics."""
        with urllib.request.urlopen(f"http://{LOOPBACK}:{self.metrics_port}/metrics", timeout=5) as reply:
            return str(reply.read().decode())


@contextmanager
def running_receiver(server_url: str, folder: Path) -> Iterator[Receiver]:
    """A watcher with two tokens and a lane of 20 messages."""
    write_rules(folder)
    (folder / "tokens").write_text(f"{TOKEN}\n\n{OLD_TOKEN}\n", encoding="utf-8")
    port, metrics_port = free_ports(2)
    options = ["--token-file", str(folder / "tokens"), "--max-waiting", "20"]
    options += ["--metrics-port", str(metrics_port), "--metrics-host", LOOPBACK]
    with (
        FaultProxy(server_url) as lanes,
        watch_process(lanes.url, f"http://{LOOPBACK}:{port}/events", *options, folder=folder) as process,
    ):
        running = Receiver(process, port, metrics_port, lanes)

        def is_up() -> bool:
            assert process.is_running, process.log_text()
            return running.is_open

        wait_until(is_up, timeout_s=30)
        yield running


@pytest.fixture(scope="module")
def shared_receiver(valkey_session: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """One watcher for all tests that do not end it."""
    with running_receiver(valkey_session.url, tmp_path_factory.mktemp("receiver")) as running:
        yield running


@pytest.fixture
def receiver(shared_receiver: Receiver, redis_url: str) -> Receiver:
    """The watcher, with empty lanes. It remembers events of earlier tests, so each test makes its own."""
    shared_receiver.lanes.heal()
    return shared_receiver


NUMBERS = itertools.count(1)


def event(key: str = "a.jpg", name: str = "ObjectCreated:Put") -> bytes:
    """A message with one record that no other message has."""
    return json.dumps({"Records": [record(key, name=name, number=next(NUMBERS))]}).encode()


@pytest.mark.parametrize("name", ["minio_webhook", "s3_sqs", "eventbridge", "oss_smq", "oss_eventbridge"])
def test_recorded_request_becomes_a_job(receiver: Receiver, redis_client: redis.Redis, name: str) -> None:
    """202 comes once the job is in its lane."""
    status, _, counts = receiver.post((DATA / f"{name}.json").read_bytes())
    assert (status, counts["enqueued"]) == (202, 1)
    assert len(waiting_jobs(redis_client)) == 1


def test_cloud_event_in_binary_mode_becomes_a_job(receiver: Receiver, redis_client: redis.Redis) -> None:
    """Its attributes are headers; a second delivery adds nothing."""
    data = json.loads((DATA / "oss_eventbridge.json").read_bytes())["data"]
    data["responseElements"]["requestId"] = "binary"
    body = json.dumps(data).encode()
    headers = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "acs.oss", "ce-type": "oss:ObjectCreated:PutObject"}
    headers["Content-Type"] = "application/json"
    assert receiver.post(body, headers=headers)[::2] == (202, {"enqueued": 1})
    assert receiver.post(body, headers=headers)[::2] == (202, {"enqueued": 0, "duplicate": 1})
    assert [image for _, image in waiting_jobs(redis_client)] == ["s3://photos/in/panda.jpg"]


@pytest.mark.parametrize(
    "token", ["", "x", TOKEN[:-1], f"{TOKEN}x", "é" * 20], ids=["none", "x", "short", "long", "odd"]
)
def test_request_without_a_token_is_refused(receiver: Receiver, redis_client: redis.Redis, token: str) -> None:
    """The second line of the file is a token too."""
    headers = {"Authorization": f"Bearer {token}".encode().decode("latin-1")} if token else {}
    refused = receiver.metric("shiwu_watch_requests_refused_total", status="401")
    status, replied, _ = receiver.post(event(), token="", headers=headers)
    assert (status, replied["www-authenticate"]) == (401, "Bearer")
    assert receiver.post(event(), token="", headers={"Authorization": f"Basic {TOKEN}"})[0] == 401
    assert waiting_jobs(redis_client) == []
    assert receiver.post(event(), token=OLD_TOKEN)[0] == 202
    assert receiver.post(event(), token="", headers={"X-EventBridge-Signature-Token": TOKEN})[0] == 202
    assert receiver.post(event(), token="", headers={"X-EventBridge-Signature-Token": "x"})[0] == 401
    assert receiver.metric("shiwu_watch_requests_refused_total", status="401") == refused + 3


def test_other_paths_and_methods_are_refused(receiver: Receiver) -> None:
    """Only POST to the path of the source."""
    assert receiver.post(event(), path="/")[0] == 404
    assert receiver.post(b"", method="GET")[0] == 405


def test_unreadable_request_is_kept(receiver: Receiver, redis_client: redis.Redis) -> None:
    """It is accepted, because the sender would repeat it forever."""
    assert receiver.post(b"no JSON")[::2] == (202, {"enqueued": 0, "unread": 1})
    assert receiver.post(event(), headers={"ce-specversion": "1.0"})[2]["unread"] == 1
    assert redis_client.llen(WATCH_UNREAD) == 2


def test_large_body_is_refused(receiver: Receiver) -> None:
    """By its declared length, or by what comes; exactly 1 MiB is read."""
    assert receiver.post(b" " * MAX_BYTES)[2] == {"enqueued": 0, "unread": 1}
    with receiver.connect() as connection:
        head = f"POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        connection.sendall(f"{head}Content-Length: {MAX_BYTES + 1}\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    with receiver.connect() as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(connection.recv, 4096)
            with contextlib.suppress(OSError):  # it may be refused before all is sent
                for _ in range(17):
                    connection.sendall(chunk)
            assert reply.result(30).startswith(b"HTTP/1.1 413")


def test_slow_requests_are_ended(receiver: Receiver, redis_client: redis.Redis) -> None:
    """One whose head does not come, and one whose body does not; others are served meanwhile."""
    began_s = time.monotonic()
    with receiver.connect() as silent, receiver.connect() as slow_head, receiver.connect() as slow_body:
        slow_head.sendall(b"POST /events HTTP/1.1\r\nHost: x\r\n")
        head = f"POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 10\r\n\r\n"
        slow_body.sendall(f"{head}{{".encode())
        assert receiver.post(event())[0] == 202
        assert slow_body.recv(4096).startswith(b"HTTP/1.1 408")
        assert slow_head.recv(4096) == b""
        assert silent.recv(4096) == b""
    assert 5 < time.monotonic() - began_s < 25
    assert len(waiting_jobs(redis_client)) == 1


def test_connection_carries_several_requests(receiver: Receiver, redis_client: redis.Redis) -> None:
    """One after the other."""
    connection = http.client.HTTPConnection(LOOPBACK, receiver.port, timeout=30)
    for _ in range(5):
        connection.request("POST", "/events", body=event(), headers={"Authorization": f"Bearer {TOKEN}"})
        assert json.loads(connection.getresponse().read()) == {"enqueued": 1}
    connection.close()
    assert len(waiting_jobs(redis_client)) == 5


def test_full_lane_answers_429(receiver: Receiver, redis_client: redis.Redis) -> None:
    """With the time after which to try again; nothing is lost or enqueued twice."""
    statuses = [receiver.post(event())[0] for number in range(20)]
    assert set(statuses) == {202}
    late = event()
    status, headers, content = receiver.post(late)
    assert (status, headers["retry-after"], content) == (429, "10", {"error": "the lane is full"})
    assert receiver.metric("shiwu_watch_waiting") == 1
    redis_client.ltrim("shiwu.bulk", 0, -2)
    assert receiver.post(late)[2] == {"enqueued": 1}
    assert receiver.metric("shiwu_watch_waiting") == 0


def test_redis_away_answers_503(receiver: Receiver, redis_client: redis.Redis) -> None:
    """And 202 once it is back."""
    receiver.lanes.refuse()
    body = event()
    status, headers, _ = receiver.post(body)
    assert (status, headers["retry-after"]) == (503, "5")
    receiver.lanes.heal()
    assert receiver.post(body)[2] == {"enqueued": 1}
    assert len(waiting_jobs(redis_client)) == 1


def test_too_many_requests_at_once_get_503(receiver: Receiver) -> None:
    """Those above the limit, while the others are read."""
    head = f"POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 10\r\n\r\n"
    slow = [receiver.connect() for _ in range(32)]
    for each in slow:
        each.sendall(head.encode())

    def is_refused() -> bool:
        status, headers, _ = receiver.post(event())
        return (status, headers.get("retry-after")) == (503, "1")

    wait_until(is_refused, timeout_s=8)
    for each in slow:
        each.close()
    wait_until(lambda: receiver.post(event())[0] == 202, timeout_s=10, what="a free place")


def test_sigterm_ends_the_receiver_with_zero(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """After the request under way; each has its line."""
    with running_receiver(redis_url, tmp_path) as receiver, receiver.connect() as connection:
        assert receiver.post(event())[0] == 202
        body = event()
        head = (
            f"POST /events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body[:5])
        wait_until(lambda: receiver.post(event())[0] == 202, timeout_s=10, what="the head has been read")
        receiver.process.terminate()
        connection.sendall(body[5:])
        assert connection.recv(4096).startswith(b"HTTP/1.1 202")
        assert receiver.process.wait(timeout_s=20) == 0
        assert total(lines(receiver.process.log_text()), "enqueued") == len(waiting_jobs(redis_client)) == 3


@NEEDS_PROMTOOL
def test_metrics_tell_what_became_of_events(receiver: Receiver) -> None:
    """By the words of the lines."""
    outcomes = ["enqueued", "no_rule", "removed", "duplicate", "unread", "other", "test"]

    def counted() -> list[float]:
        return [receiver.metric("shiwu_watch_events_total", outcome=name) for name in outcomes]

    before, messages = counted(), receiver.metric("shiwu_watch_messages_total")
    for body in (event(), event(key="a.txt"), event(name="ObjectRemoved:Delete")):
        receiver.post(body)
    assert [after - was for after, was in zip(counted(), before, strict=True)] == [1, 1, 1, 0, 0, 0, 0]
    assert receiver.metric("shiwu_watch_messages_total") == messages + 3
    assert receiver.metric("shiwu_watch_source_up") == 1
    assert receiver.metric("shiwu_watch_last_portion_timestamp_seconds") > 1_700_000_000
    assert check_metrics(receiver.metrics().encode()) == ""


def test_port_is_tried_before_it_is_used(redis_url: str, tmp_path: Path) -> None:
    """By --check, and at the start; --once and short tokens are refused."""
    rules = ("--rules", str(write_rules(tmp_path)))
    [port] = free_ports(1)
    address = f"http://{LOOPBACK}:{port}/events"
    result = run_watch(redis_url, address, *rules, "--check")
    assert (result.exit_code, f"source: {LOOPBACK}:{port} is free; 0 tokens" in result.stdout) == (0, True)
    with socket.create_server((LOOPBACK, port)):
        result = run_watch(redis_url, address, *rules, "--check")
        assert (result.exit_code, "expected an address that is free and local" in result.stderr) == (2, True)
    assert "expected a source that can be emptied" in run_watch(redis_url, address, *rules, "--once").stderr
    (tmp_path / "tokens").write_text(f"{'x' * 16}\n\nshort\n", encoding="utf-8")
    result = run_watch(redis_url, address, *rules, "--check", "--token-file", str(tmp_path / "tokens"))
    assert (result.exit_code, "tokens, line 3: expected tokens of at least 16 characters" in result.stderr) == (
        64,
        True,
    )


def test_watcher_ends_where_its_output_cannot_be_written(
    redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """The event that it could not report has its job and its reply, so no sender repeats it forever."""
    write_rules(tmp_path)
    [port] = free_ports(1)
    source = f"http://{LOOPBACK}:{port}/events"
    with FaultProxy(redis_url) as lanes:
        watch = watch_process(lanes.url, source, "--no-token", folder=tmp_path)
        running = Receiver(watch, port, 0, lanes)
        process = subprocess.Popen(watch.command, stdout=subprocess.PIPE, env=clean_environment({}))
        assert process.stdout is not None
        process.stdout.close()
        try:
            wait_until(lambda: running.is_open, timeout_s=30, what="the port is open")
            assert running.post(event())[0] == 202
            assert process.wait(30) == 141
        finally:
            process.kill()
    assert len(waiting_jobs(redis_client)) == 1
