"""`shiwu sweep --metrics-port`: the state of the queues while no worker runs, from a real sweep process."""

from __future__ import annotations

import math
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from shiwu import Client
from shiwu.contract import COUNTERS
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import LOOPBACK, ROOT, Process, clean_environment, free_ports
from tests.support.promtool import NEEDS_PROMTOOL, check_metrics
from tests.support.waiting import wait_until

pytestmark = NEEDS_PROMTOOL


class Sweep:
    """A sweep process and its metrics."""

    def __init__(self, process: Process, port: int) -> None:
        self.process, self._port = process, port

    def text(self) -> str:
        """The metrics page, or an empty text while the port is closed."""
        try:
            with urllib.request.urlopen(f"http://{LOOPBACK}:{self._port}/metrics", timeout=5) as reply:
                return str(reply.read().decode())
        except OSError:
            return ""

    def sample(self, name: str, **labels: str) -> float:
        """A sample's value; NaN where there is no such series."""
        for family in text_string_to_metric_families(self.text()):
            for sample in family.samples:
                if (sample.name, sample.labels) == (name, labels):
                    return sample.value
        return math.nan


@pytest.fixture
def proxy(redis_url: str) -> Iterator[FaultProxy]:
    """Between the sweep and Redis."""
    with FaultProxy(redis_url) as proxy:
        yield proxy


@pytest.fixture
def sweep(proxy: FaultProxy, tmp_path: Path) -> Iterator[Sweep]:
    """A sweep that expects two workers."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "shiwu.cli", "--redis-url", proxy.url, "sweep", "--every", "0.1"]
    command += ["--metrics-host", LOOPBACK, "--metrics-port", str(port), "--expect-workers", "2"]
    with Process(command, name="sweep", folder=tmp_path, env=clean_environment({})) as process:
        sweep = Sweep(process, port)
        wait_until(lambda: sweep.sample("shiwu_redis_up") == 1, timeout_s=30, what="the sweep's first round")
        yield sweep


def test_sweep_exports_the_queues_without_a_worker(
    sweep: Sweep, proxy: FaultProxy, redis_url: str, redis_client: redis.Redis
) -> None:
    """What waits, since when, and that no worker runs; nothing that is frozen while Redis does not answer."""
    with Client(redis_url) as client:
        client.enqueue("s3://b/k", lane="interactive")
    redis_client.hincrby(COUNTERS, "results_dropped", 3)
    wait_until(
        lambda: sweep.sample("shiwu_queue_waiting", lane="interactive") == 1, timeout_s=20, what="the job is exported"
    )
    assert check_metrics(sweep.text().encode()) == ""
    assert sweep.sample("shiwu_queue_oldest_age_seconds", lane="interactive") >= 0
    assert sweep.sample("shiwu_queue_waiting", lane="bulk") == 0
    assert (sweep.sample("shiwu_workers"), sweep.sample("shiwu_workers_expected")) == (0, 2)
    assert sweep.sample("shiwu_results_dropped_total") == 3
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(shiwu_\w+)` \| (?=.*(?:; sweep|\*all\*) \|)", table, re.M))
    exported = set(re.findall(r"^# TYPE (shiwu_\w+)", sweep.text(), re.M))
    assert exported == documented - {"shiwu_queue_backlog_seconds"} | {"shiwu_redis_up"}
    last_round_s = sweep.sample("shiwu_sweep_last_round_timestamp_seconds")

    proxy.refuse()
    wait_until(lambda: sweep.sample("shiwu_redis_up") == 0, timeout_s=30, what="the sweep sees that Redis is away")
    assert math.isnan(sweep.sample("shiwu_queue_waiting", lane="interactive"))
    assert math.isnan(sweep.sample("shiwu_workers"))
    proxy.heal()
    wait_until(lambda: sweep.sample("shiwu_redis_up") == 1, timeout_s=30, what="the sweep goes on")
    assert sweep.sample("shiwu_sweep_last_round_timestamp_seconds") > last_round_s


def test_sweep_without_prometheus_client_says_what_to_install(redis_url: str, tmp_path: Path) -> None:
    """The producer's side does not depend on it."""
    blocker = "import sys; sys.modules['prometheus_client'] = None; from shiwu.cli import main; main()"
    command = [sys.executable, "-c", blocker, "--redis-url", redis_url, "sweep", "--metrics-port", "9"]
    with Process(command, name="sweep", folder=tmp_path, env=clean_environment({})) as process:
        assert process.wait(timeout_s=20) == 2
        assert "pip install '.[metrics]'" in process.log_tail(lines=5)
