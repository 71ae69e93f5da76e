"""A rendered worker's command, variables and probes, started here on a real Valkey."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from shiwu import Client
from shiwu.contract import CLAIMS, LEASES, Lane, result_key
from tests.chart.metric_labels import BARE, HISTOGRAMS, METRICS, OF_THE_SWEEP
from tests.support.chart import Helm, of_kind, tool
from tests.support.family import family
from tests.support.faulty_worker import FAULT_FILE
from tests.support.pod import PodProcess
from tests.support.processes import LOOPBACK, ROOT, free_ports
from tests.support.promtool import NEEDS_PROMTOOL, check_metrics
from tests.support.redis_server import RedisServer, valkey_binary
from tests.support.waiting import wait_until

StartPod = Callable[..., PodProcess]
STUCK_S = 3.0
LATE_S = 5.0
"""Further time until liveness fails, because the queue monitor counts every few seconds."""
PICTURE = "/etc/shiwu/test/picture.jpg"
JOBS = 400


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Valkey that knows the users of docs/redis-acl.conf only."""
    users = ROOT / "docs" / "redis-acl.conf"
    with RedisServer(folder=tmp_path / "server", binary=valkey_binary(), config={"include": str(users)}) as started:
        yield started


def url(server: RedisServer, user: str) -> str:
    """Return the URL of this user."""
    return server.url.replace("://", f"://shiwu-{user}:change-me-{user}@")


def operator(server: RedisServer) -> Any:
    """A client with all rights."""
    return Redis.from_url(url(server, "admin"), socket_timeout=10)


def values(server: RedisServer, **worker: Any) -> dict[str, Any]:
    """The embedded model on a CPU; everything else as the chart has it."""
    return {
        "redis": {
            "host": LOOPBACK,
            "port": server.port,
            "existingSecret": "shiwu-redis",
            "username": "shiwu-worker",
            "passwordKey": "worker",
        },
        "http": {"port": free_ports(1)[0]},
        "labels": {"sets": {"two": {"labels": ["动物", "建筑"]}}, "default": "two"},
        "worker": {"device": "cpu", "loaders": 1, "torchThreads": 1} | worker,
    }


@pytest.fixture
def start(server: RedisServer, tmp_path: Path) -> Iterator[StartPod]:
    """Renders with these values of `worker`, and starts its container."""
    started: list[PodProcess] = []

    def run(*, module: str | None = None, **worker: Any) -> PodProcess:
        manifests = Helm(tool("helm4")).render(values(server, **worker))
        spec = of_kind(manifests, "Deployment", "-worker")["spec"]["template"]["spec"]
        secrets = {"shiwu-redis": {"worker": "change-me-worker"}}
        pod = PodProcess(spec, manifests, folder=tmp_path, name="trial-worker-0", secrets=secrets, module=module)
        started.append(pod)
        return pod.start()

    yield run
    for pod in started:
        pod.stop()
        print(f"--- {pod.name}, exit code {pod.exit_code} ---\n{pod.log_tail(lines=60)}")  # noqa: T201 pytest shows it beside a failure


def wait_ready(pod: PodProcess) -> None:
    """As the kubelet: first the startup probe, then readiness."""
    startup, readiness = pod.probe("startup"), pod.probe("readiness")

    def passes() -> bool:
        if not pod.is_running:
            raise pod.error("expected to become ready")
        return startup.passes()

    wait_until(passes, timeout_s=min(120.0, startup.patience_s), every_s=0.1, what="the startup probe")
    assert startup.patience_s >= 600, "a large model takes minutes"
    wait_until(readiness.passes, timeout_s=readiness.patience_s, what="the readiness probe")


def asked_and_told(pod: PodProcess) -> None:
    """On the probes' port: all that rules and dashboard ask of a worker, except the GPU, which is missing here."""
    with urllib.request.urlopen(f"http://{LOOPBACK}:{pod.probe('liveness').port}/metrics", timeout=5) as reply:
        text = reply.read()
    exported = {name.removesuffix("_total") for name in re.findall(r"^# TYPE (\w+)", text.decode(), re.M)}
    asked = {
        name.removesuffix("_total")
        for name in {*METRICS, *BARE, *HISTOGRAMS} - OF_THE_SWEEP
        if not name.startswith(("shiwu_gpu_", "shiwu_hooks_", "shiwu_watch_"))
    }
    assert asked - exported == set()
    assert check_metrics(text) == ""


@NEEDS_PROMTOOL
def test_rendered_worker_becomes_ready_answers_and_drains(server: RedisServer, start: StartPod) -> None:
    """With the chart's own label set and image, as its own Redis user; ended by SIGTERM amid a backlog."""
    pod = start(graceS=10)
    readiness, liveness = pod.probe("readiness"), pod.probe("liveness")
    assert not readiness.passes(), "it can't be ready before its model is"
    wait_ready(pod)
    with Client(url(server, "client")) as client:
        answer = client.wait(client.enqueue(pod.path(PICTURE).as_uri()), timeout_s=30)
        assert answer.ok, answer
        assert [tag.label for tag in answer.tags or ()] == ["动物", "建筑"]
        assert answer.worker == pod.name
        assert liveness.passes()
        assert readiness.passes()
        asked_and_told(pod)

        ids = list(client.enqueue_many([pod.path(PICTURE).as_uri()] * JOBS, lane="bulk"))
    with operator(server) as redis:
        wait_until(lambda: redis.exists(*map(result_key, ids)) >= 10, timeout_s=30, what="some answers")
        ended_s = time.monotonic()
        pod.signal(signal.SIGTERM)
        wait_until(lambda: not readiness.passes(), timeout_s=readiness.patience_s, what="that it is not ready")
        assert pod.wait(timeout_s=pod.grace_s) == 0
        took_s = time.monotonic() - ended_s
        assert took_s < pod.grace_s
        answered = int(redis.exists(*map(result_key, ids)))
        waiting = sum(int(redis.llen(key)) for key in Lane.BULK.keys)
        assert answered + waiting == JOBS
        assert (redis.hlen(CLAIMS), redis.zcard(LEASES)) == (0, 0)


@pytest.mark.long
def test_rendered_worker_takes_over_expired_leases(server: RedisServer, start: StartPod) -> None:
    """A pod that is killed all the same costs its jobs a lease: the next one answers every one of them."""
    pod = start(settings={"LEASE_S": 5})
    wait_ready(pod)
    with Client(url(server, "client")) as client, operator(server) as redis:
        ids = list(client.enqueue_many([pod.path(PICTURE).as_uri()] * JOBS, lane="bulk"))
        wait_until(lambda: redis.exists(*map(result_key, ids)) >= 10, timeout_s=30, what="some answers")
        pod.kill()
        assert not pod.probe("liveness").passes()
        pod.start()
        wait_ready(pod)
        wait_until(lambda: redis.exists(*map(result_key, ids)) == JOBS, timeout_s=60, what="all answers")
        assert redis.hlen(CLAIMS) == 0


def stays_live(pod: PodProcess) -> None:
    """An idle worker stays live for any time."""
    ended_s = time.monotonic() + STUCK_S + LATE_S
    wait_until(lambda: time.monotonic() > ended_s or not pod.probe("liveness").passes(), timeout_s=60)
    assert pod.probe("liveness").passes()


@pytest.mark.long
def test_stopped_encode_thread_fails_the_liveness_probe(server: RedisServer, start: StartPod, tmp_path: Path) -> None:
    """On purpose, within a batch."""
    fault = tmp_path / "fault"
    env = [{"name": FAULT_FILE, "value": str(fault)}]
    pod = start(module="tests.support.faulty_worker", settings={"STUCK_S": STUCK_S}, extraEnv=env)
    wait_ready(pod)
    with Client(url(server, "client")) as client:
        assert client.wait(client.enqueue(pod.path(PICTURE).as_uri()), timeout_s=30).ok
        stays_live(pod)
        fault.write_text("hang", encoding="utf-8")
        client.enqueue(pod.path(PICTURE).as_uri())
    turns_503(pod)


@pytest.mark.long
def test_stopped_loaders_fail_the_liveness_probe(server: RedisServer, start: StartPod) -> None:
    """When they continue, so does the worker."""
    pod = start(settings={"STUCK_S": STUCK_S})
    wait_ready(pod)
    loaders = family(pod.pid)[1:]
    assert len(loaders) >= 2, "expected a fork server and a loader"
    try:
        for pid in loaders:
            os.kill(pid, signal.SIGSTOP)
        with Client(url(server, "client")) as client:
            job = client.enqueue(pod.path(PICTURE).as_uri())
            turns_503(pod)
            for pid in loaders:
                os.kill(pid, signal.SIGCONT)
            assert client.wait(job, timeout_s=60).ok
    finally:
        for pid in loaders:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    wait_until(pod.probe("liveness").passes, timeout_s=10, what="that it is live again")


@pytest.mark.long
def test_redis_outage_with_a_backlog_fails_the_liveness_probe(server: RedisServer, start: StartPod) -> None:
    """Not without one: a restart cures no Redis, and an idle worker has nothing to lose by waiting."""
    pod = start(settings={"STUCK_S": STUCK_S, "REDIS_TIMEOUT_S": 1})
    wait_ready(pod)
    with Client(url(server, "client")) as client:
        list(client.enqueue_many([pod.path(PICTURE).as_uri()] * 20_000, lane="bulk"))
        with operator(server) as redis:
            wait_until(lambda: redis.hlen(CLAIMS), timeout_s=30, what="claims")
    server.pause()
    try:
        turns_503(pod, and_also_s=1.0)
        assert pod.probe("readiness").status() == 503
    finally:
        server.resume()
    wait_until(pod.probe("liveness").passes, timeout_s=30, what="that it is live again")
    wait_until(pod.probe("readiness").passes, timeout_s=30, what="that it is ready again")


def turns_503(pod: PodProcess, *, and_also_s: float = 0.0) -> None:
    """Within N s: SHIWU_STUCK_S, and the interval of the checks."""
    limit_s = STUCK_S + LATE_S + and_also_s
    liveness = pod.probe("liveness")
    wait_until(lambda: liveness.status() == 503, timeout_s=limit_s, every_s=0.1, what="/livez turns 503")
