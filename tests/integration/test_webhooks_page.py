"""docs/webhooks.md: its receiver runs, its file of endpoints is read, and its tables name what there is."""

from __future__ import annotations

import re
import sys
import urllib.request
from pathlib import Path

import click
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from shiwu.hooks.__main__ import main
from shiwu.hooks.endpoints import read_endpoints
from tests.support.hooks import SECRET, SEED, HooksProcess, answer, commit, write_endpoints
from tests.support.processes import LOOPBACK, ROOT, Process, clean_environment, free_ports
from tests.support.waiting import wait_until

PAGE = (ROOT / "docs" / "webhooks.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first block of this language."""
    return PAGE.split(f"```{language}\n")[1].split("```")[0]


def test_receiver_of_the_page_gets_answers(redis_url: str, redis_client: redis.Redis, tmp_path: Path) -> None:
    """A delivery with its signature is printed, one with another secret is refused."""
    [port, metrics_port] = free_ports(2)
    (tmp_path / "receiver.py").write_text(block("python"), encoding="utf-8")
    receiver = Process(
        [sys.executable, str(tmp_path / "receiver.py")],
        name="receiver",
        folder=tmp_path,
        env=clean_environment({"ORDERS_SECRET": SECRET, "PORT": str(port)}),
    )
    url = f"http://{LOOPBACK}:{port}/"
    named = [
        {"name": "orders", "url": url},
        {"name": "wrong", "url": url, "secret_file": "old"},
    ]
    hooks = HooksProcess(
        redis_url=redis_url, file=write_endpoints(tmp_path, named), schedule="0s,0.2s,0.2s", metrics_port=metrics_port
    )
    with receiver, hooks:
        hooks.wait_started()
        commit(redis_client, answer("k1"), answer("k2"))
        wait_until(lambda: len(receiver.log_text().splitlines()) >= 2 and "猫" in receiver.log_text(), timeout_s=30)
        wait_until(lambda: len(hooks.events("delivery_dead")) == 2, timeout_s=30)
        printed = [line for line in receiver.log_text().splitlines() if "猫" in line]
        assert sorted(printed) == ["k1 猫", "k2 猫"]
        assert {(event["endpoint"], event["status"]) for event in hooks.events("delivery_dead")} == {("wrong", 401)}
        assert metrics_of(metrics_port) == page_metrics()


def metrics_of(port: int) -> dict[str, str]:
    """Name → type of what the process exports, with the suffix of counters."""
    with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=10) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    return {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in families
        if family.samples and family.type != "unknown" and not family.name.endswith("_created")
    }


def page_metrics() -> dict[str, str]:
    """The table of metrics."""
    return dict(re.findall(r"^\| `(shiwu_\w+)` \| (\w+) \|", PAGE, re.M))


def test_endpoints_of_the_page_are_read(tmp_path: Path) -> None:
    """With all their options."""
    for name, text in {
        "orders.secret": SECRET,
        "orders.old": SECRET,
        "urls.secret": SECRET,
        "moderation.seed": SEED,
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "endpoints.yaml").write_text(block("yaml"), encoding="utf-8")
    found = read_endpoints(tmp_path / "endpoints.yaml")
    assert [(each.key, each.style, each.batch) for each in found.named] == [
        ("orders", "standard", 100),
        ("moderation", "aliyun", 1),
    ]
    assert found.for_urls is not None


OPTIONS = {
    each.opts[0]: each for each in main.params if isinstance(each, click.Option) and isinstance(each.envvar, str)
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_option_is_on_the_page(name: str) -> None:
    """With its variable and its default."""
    [(variable, default)] = re.findall(rf"^\| `{name}` \| `(\w+)` \| (.*) \|$", PAGE, re.M)
    option = OPTIONS[name]
    assert variable == option.envvar
    if isinstance(option.default, int | float) and not isinstance(option.default, bool):
        assert float(default) == option.default
    elif isinstance(option.default, str):
        assert default == option.default
