"""A real worker's HTTP port: the whole way from its start to its end, and each fault that the probes must see."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from shiwu.broker.message_writer import build_message
from shiwu.contract import CLAIMS, QUEUE_SNAPSHOT, Lane, Request
from shiwu_worker.errors import ExitCode
from tests.conftest import FAILED, StartWorker
from tests.support import pictures
from tests.support.ask import read_answer
from tests.support.family import family
from tests.support.fault_proxy import FaultProxy
from tests.support.faulty_worker import FAULT_FILE
from tests.support.health_port import probe, samples, value
from tests.support.picture_server import Reply
from tests.support.processes import LOOPBACK, ROOT, free_ports
from tests.support.promtool import NEEDS_PROMTOOL, check_metrics
from tests.support.servers import PictureServer, Valkey, WorkerProcess
from tests.support.waiting import wait_until

STUCK_S = 3.0
SLACK_S = 1.0
"""For the way of a probe and of a machine that does other things."""


def becomes(port: int, path: str, status: int, *, why: str = "", timeout_s: float) -> str:
    """Wait until a probe is answered so, and return its body."""

    def body_as_expected() -> str | None:
        found, body = probe(port, path)
        return body if found == status and why in body else None

    what = f"{path} to be {status} {why}"
    return str(wait_until(body_as_expected, timeout_s=timeout_s, every_s=0.05, what=what))


def sent(image: str, *, job_id: str, lane: Lane) -> bytes:
    """A message with the time at which it was sent."""
    return build_message(Request(image=image), job_id=job_id, lane=lane, sent_ms=time.time() * 1000)


@dataclass(frozen=True)
class Watched:
    """A worker that may be broken and is mended after each test."""

    worker: WorkerProcess
    client: redis.Redis
    proxy: FaultProxy
    fault: Path
    image: str
    port: int

    def send(self, count: int, *, lane: Lane = Lane.BULK, prefix: str) -> list[str]:
        """Enqueue the image so many times."""
        ids = [f"{prefix}-{number}" for number in range(count)]
        self.client.lpush(lane.queue, *[sent(self.image, job_id=job_id, lane=lane) for job_id in ids])
        return ids


@pytest.fixture(scope="module")
def _watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    (folder / "x.png").write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    [port] = free_ports(1)
    fault = folder / "fault"
    with Valkey(folder=folder / "valkey") as server, server.client() as client, FaultProxy(server.url) as proxy:
        worker = WorkerProcess(
            redis_url=proxy.url,
            folder=folder,
            module="tests.support.faulty_worker",
            env={FAULT_FILE: str(fault)},
            allow_folders=folder,
            http_port=port,
            http_host=LOOPBACK,
            stuck_s=STUCK_S,
            redis_timeout_s=1,
            max_batch=8,
            loaders=1,
            torch_threads=1,
        )
        with worker:
            yield Watched(worker, client, proxy, fault, (folder / "x.png").as_uri(), port)


@pytest.fixture
def watched(_watched: Watched, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """Ready, without work and without faults."""
    becomes(_watched.port, "/readyz", 200, timeout_s=90)
    left = (CLAIMS, *Lane.INTERACTIVE.keys, *Lane.BULK.keys)
    wait_until(lambda: not _watched.client.exists(*left), timeout_s=30, what="no work of the test before")
    yield _watched
    _watched.fault.unlink(missing_ok=True)
    _watched.proxy.heal()
    for pid in family(_watched.worker.pid):
        os.kill(pid, signal.SIGCONT)
    if request.node.stash.get(FAILED, False):
        print(_watched.worker.log_tail(lines=40))  # noqa: T201 pytest shows it with the failure


def test_hanging_encode_thread_is_detected(watched: Watched) -> None:
    """While a batch on the device does not end the worker is neither live nor ready; later it is live again."""
    assert probe(watched.port, "/livez") == (200, "ok\n")
    watched.fault.write_text("hang", encoding="utf-8")
    ids = watched.send(20, prefix="hang")
    body = becomes(watched.port, "/livez", 503, timeout_s=STUCK_S + SLACK_S)
    assert "the encode thread has been busy with one batch for 3 s" in body or "nothing was claimed" in body
    becomes(watched.port, "/livez", 503, why="nothing was claimed, encoded or answered for", timeout_s=SLACK_S)
    assert probe(watched.port, "/readyz")[0] == 503
    wait_until(lambda: (value(watched.port, "shiwu_progress_age_seconds") or 0) > STUCK_S, timeout_s=5)
    watched.fault.unlink()
    for job_id in ids:
        read_answer(watched.client, job_id)
    becomes(watched.port, "/livez", 200, timeout_s=10)
    wait_until(lambda: value(watched.port, "shiwu_progress_age_seconds") == 0.0, timeout_s=15)


def test_stopped_loaders_are_detected(watched: Watched) -> None:
    """Everything below the worker stands still, with work to do."""
    for pid in family(watched.worker.pid)[1:]:
        os.kill(pid, signal.SIGSTOP)
    watched.send(20, prefix="stopped")
    body = becomes(watched.port, "/livez", 503, why="no loader process", timeout_s=STUCK_S + SLACK_S)
    assert "no loader process has run for 3 s" in body
    for pid in family(watched.worker.pid)[1:]:
        os.kill(pid, signal.SIGCONT)
    becomes(watched.port, "/livez", 200, timeout_s=10)


def test_redis_outage_with_a_backlog_is_detected(watched: Watched) -> None:
    """Not ready immediately, and not live after a while, because jobs were waiting; an idle worker would stay live."""
    watched.fault.write_text("hang", encoding="utf-8")
    watched.send(200, prefix="cut")
    wait_until(lambda: value(watched.port, "shiwu_queue_waiting", lane="bulk"), timeout_s=15, what="a look at the lane")
    watched.proxy.refuse()
    watched.fault.unlink()
    becomes(watched.port, "/readyz", 503, why="Redis has not answered", timeout_s=STUCK_S)
    becomes(watched.port, "/livez", 503, why="Redis has not answered", timeout_s=STUCK_S + SLACK_S)
    watched.proxy.heal()
    becomes(watched.port, "/readyz", 200, timeout_s=20)
    read_answer(watched.client, "cut-199")


def test_redis_outage_without_work_keeps_the_worker_live(watched: Watched) -> None:
    """A restart would not bring Redis back, and no job waits."""
    wait_until(lambda: value(watched.port, "shiwu_queue_claimed", lane="bulk") == 0, timeout_s=15, what="an idle look")
    watched.proxy.refuse()
    body = becomes(watched.port, "/readyz", 503, why=f"for {STUCK_S + 1:.0f} s", timeout_s=STUCK_S + 5)
    assert "Redis has not answered" in body
    assert probe(watched.port, "/livez") == (200, "ok\n")


def test_metrics_count_what_was_done(watched: Watched) -> None:
    """Jobs by lane, status and code, stages, batches, the lanes, the model; each name stands in docs/metrics.md."""
    # Answers are counted in their order: with this one counted, all of the tests before are.
    first: dict[str, str] = {"lane": "interactive", "status": "tagged", "code": ""}
    known = value(watched.port, "shiwu_jobs_total", **first) or 0.0
    watched.send(1, lane=Lane.INTERACTIVE, prefix="first")
    wait_until(lambda: (value(watched.port, "shiwu_jobs_total", **first) or 0.0) > known, timeout_s=10)
    before = samples(watched.port)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return samples(watched.port).get(key, 0.0) - before.get(key, 0.0)

    tagged = watched.send(5, lane=Lane.INTERACTIVE, prefix="counted")
    watched.client.lpush(Lane.BULK.queue, sent("file:///etc/passwd", job_id="refused", lane=Lane.BULK))
    for job_id in (*tagged, "refused"):
        read_answer(watched.client, job_id)
    jobs = "shiwu_jobs_total"
    wait_until(lambda: grown(jobs, lane="bulk", status="rejected", code="source_forbidden") == 1, timeout_s=5)
    wait_until(lambda: grown(jobs, lane="interactive", status="tagged", code="") == 5, timeout_s=5)
    assert grown("shiwu_batch_size_sum") == 5
    assert sum(grown("shiwu_batches_total", reason=why) for why in ("full", "free")) == grown("shiwu_batch_size_count")
    for stage in ("claim", "fetch", "decode", "batch", "encode", "score"):
        assert grown("shiwu_stage_seconds_count", stage=stage) >= 5, stage
        assert 0 < grown("shiwu_stage_seconds_sum", stage=stage) < 30, stage
    assert grown("shiwu_stage_seconds_count", stage="commit") == 6
    assert grown("shiwu_answer_seconds_count", lane="interactive") == 5
    assert grown("shiwu_queue_wait_seconds_count", lane="bulk") == 1
    assert value(watched.port, "shiwu_worker_ready") == 1
    names = {name for name, _ in samples(watched.port) if name == "shiwu_model_info"}
    assert names == {"shiwu_model_info"}
    wait_until(lambda: watched.client.exists(QUEUE_SNAPSHOT), timeout_s=15, what="the look that the worker shares")


@NEEDS_PROMTOOL
def test_promtool_accepts_the_metrics_of_a_worker(watched: Watched) -> None:
    """Names, units, types and help as Prometheus wants them; and it does complain of what is wrong."""
    wait_until(lambda: value(watched.port, "shiwu_queue_backlog_seconds", lane="bulk") is not None, timeout_s=15)
    text = probe(watched.port, "/metrics")[1]
    assert check_metrics(text.encode()) == ""
    assert check_metrics(text.replace("shiwu_jobs_total", "shiwu_jobs").encode()) != ""


ON_CLUSTERS = {"shiwu_shard_away"}


def test_documented_and_exported_metrics_are_the_same(watched: Watched) -> None:
    """docs/metrics.md is the list; those of a card or a cluster are only there with one."""
    wait_until(lambda: value(watched.port, "shiwu_queue_backlog_seconds", lane="bulk") is not None, timeout_s=15)
    text = probe(watched.port, "/metrics")[1]
    exported = set(re.findall(r"^# TYPE (shiwu_\w+)", text, re.M))
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(shiwu_\w+)` \| (?!.*; sweep \|)", table, re.M))
    assert documented - exported == {name for name in documented if name.startswith("shiwu_gpu_")} | ON_CLUSTERS
    assert exported - documented == set()


@pytest.mark.parametrize("kind", ["wrong", pytest.param("nan", marks=pytest.mark.long)])
def test_device_that_computes_wrong_stops_the_worker(
    start_worker: StartWorker, redis_url: str, tmp_path: Path, kind: str
) -> None:
    """Right at the start, wrong at the next canary: the worker takes no more jobs and exits with a code of its own."""
    fault = tmp_path / "fault"
    worker = start_worker(
        redis_url=redis_url,
        module="tests.support.faulty_worker",
        env={FAULT_FILE: str(fault)},
        canary_s=0.2,
        max_batch=4,
        loaders=1,
    )
    fault.write_text(kind, encoding="utf-8")
    assert worker.wait(timeout_s=20) == ExitCode.CANARY == 68
    assert not worker.ready_file.exists()
    assert "the health-check image got a wrong result" in worker.log_text()


def test_probes_from_start_to_exit(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, http_server: PictureServer
) -> None:
    """A port before the model is there; ready; draining with a job in hand; that job answered; gone."""
    [port] = free_ports(1)
    late = Reply.picture(pictures.png(pictures.picture()), content_type="image/png").late(first_pause_s=4)
    image = http_server.serve("/late.png", late)
    worker = start_worker(
        redis_url=redis_url, ready=False, http_port=port, http_host=LOOPBACK, max_batch=4, loaders=1, grace_s=20
    )
    for path in ("/readyz", "/livez"):
        assert "starting for" in becomes(port, path, 503, timeout_s=30)
    assert not worker.is_ready
    assert becomes(port, "/readyz", 200, timeout_s=90) == "ok\n"
    redis_client.lpush(Lane.BULK.queue, sent(image, job_id="late", lane=Lane.BULK))
    wait_until(lambda: redis_client.hlen("shiwu:claims"), timeout_s=10, what="the claim")
    worker.terminate()
    # Before, for a moment: Celery's consumer has closed.
    assert becomes(port, "/readyz", 503, why="draining", timeout_s=3) == "draining\n"
    assert probe(port, "/livez") == (200, "ok\n")
    assert read_answer(redis_client, "late").tags
    assert worker.wait(timeout_s=20) == 0
    assert probe(port, "/livez")[0] == 0
