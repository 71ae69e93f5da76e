"""Label sets that change while a real worker runs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import redis

from shiwu import Client
from shiwu.contract import RESULT_STREAM, Answer, Status
from tests.support import pictogram, pictures
from tests.support.processes import free_ports
from tests.support.servers import S3Server, Valkey, WorkerProcess
from tests.support.waiting import wait_until

OLD = "name: mine\nlabels: [猫, 狗, 鸟]\n"
NEW = "version: 2\nname: mine\nlabels: [猫, {label: 狗, aliases: [dog]}, 鸟, 汽车]\nunknown: 其他\n"


def swap(folder: Path, text: str, number: int) -> None:
    """Change the file as Kubernetes changes a ConfigMap: a new folder, and one link that is replaced."""
    data = folder / f"..{number}"
    data.mkdir()
    for path in pictogram.LABELS_DIR.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "mine.yaml").write_text(text, encoding="utf-8")
    (folder / "..tmp").symlink_to(data.name)
    os.replace(folder / "..tmp", folder / "..data")
    for path in data.iterdir():
        if not (folder / path.name).is_symlink():
            (folder / path.name).symlink_to(f"..data/{path.name}")


class Traffic:
    """A producer that asks for the set all the time until it is stopped."""

    def __init__(self, url: str, image: str) -> None:
        self._url, self._image = url, image
        self._is_over = threading.Event()
        self.ids: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with Client(self._url) as client:
            while not self._is_over.wait(0.02):
                self.ids.append(client.enqueue(self._image, labels="mine", lane="bulk"))

    def stop(self) -> None:
        """Enqueue nothing more."""
        self._is_over.set()
        self._thread.join(10)


def answers(client: redis.Redis) -> list[Answer]:
    """Every answer of the results stream."""
    entries: Any = client.xrange(RESULT_STREAM)
    return [Answer.from_json(fields[b"answer"]) for _, fields in entries]


def metric(port: int, start: str) -> str:
    """The first line of the metrics that begins so; empty without one."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    return next((line for line in text.splitlines() if line.startswith(start)), "")


def events(worker: WorkerProcess, name: str) -> Callable[[], int]:
    """How often the worker has logged this event."""
    return lambda: worker.log_text().count(f'"{name}"')


def test_label_sets_change_while_jobs_flow(tmp_path: Path, s3: S3Server) -> None:
    """A new label answers without a restart, a broken file changes nothing, and each job has one of the two sets."""
    image = s3.put("reload.jpg", pictures.jpeg(pictures.picture()))
    folder, (port,) = tmp_path / "labels", free_ports(1)
    folder.mkdir()
    swap(folder, OLD, 1)
    with (
        Valkey(folder=tmp_path / "valkey") as server,
        server.client() as client,
        Client(server.url) as producer,
        WorkerProcess(
            redis_url=server.url,
            folder=tmp_path,
            env=s3.env,
            max_batch=8,
            http_port=port,
            labels_dir=str(folder),
            labels_poll_s=0.5,
        ) as worker,
    ):
        worker.wait_ready()
        first = producer.tag(image, labels="mine").labels
        assert first is not None
        traffic = Traffic(server.url, image)
        swap(folder, NEW, 2)
        wait_until(events(worker, "label_sets_reloaded"), timeout_s=60, what="the new set")
        second = producer.tag(image, labels="mine", min_cosine=-1.0)
        assert second.labels is not None
        assert second.labels.digest != first.digest
        assert {tag.label for tag in second.tags or ()} == {"猫", "狗", "鸟", "汽车"}
        swap(folder, "name: mine\nlabels: [猫, 猫]\n", 3)
        wait_until(events(worker, "label_sets_not_reloaded"), timeout_s=60, what="the error")
        assert producer.tag(image, labels="mine").labels == second.labels
        os.kill(worker.pid, signal.SIGHUP)
        wait_until(lambda: events(worker, "label_sets_not_reloaded")() == 2, timeout_s=60, what="the error once more")
        traffic.stop()
        wait_until(lambda: client.xlen(RESULT_STREAM) >= len(traffic.ids) + 3, timeout_s=120, what="all answers")
        found = answers(client)
        assert sorted(answer.id for answer in found if answer.id in set(traffic.ids)) == sorted(traffic.ids)
        assert {answer.status for answer in found} == {Status.TAGGED}
        assert {answer.labels and answer.labels.digest for answer in found} == {first.digest, second.labels.digest}
        assert metric(port, f'shiwu_label_set_info{{digest="{second.labels.digest}",name="mine"}}').endswith(" 1.0")
        assert metric(port, f'shiwu_label_set_info{{digest="{first.digest}"') == ""
        assert metric(port, 'shiwu_label_reloads_total{result="failed"}').endswith(" 2.0")
        assert worker.is_running
