"""An image that crashes its worker, not its loader, fails after three crashes; all other images are tagged."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import redis
from PIL import Image

from shiwu import Client, Status
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.deadly_worker import DEADLY
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until

OTHER_IMAGES = 40


@pytest.mark.slow
@pytest.mark.timeout(300)  # four workers start, one after the other
def test_image_that_crashes_its_worker_fails_alone(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Three workers crash and a fourth is started: the image is a dead letter and all others are tagged."""
    Image.new("RGB", (64, 64), DEADLY).save(tmp_path / "deadly.png")
    (tmp_path / "good.png").write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    options = {"module": "tests.support.deadly_worker", "allow_folders": tmp_path, "lease_s": 1, "max_batch": 8}
    options |= {"loaders": 1, "loader_spares": 1, "torch_threads": 1, "slots": 16}
    good, deadly = (tmp_path / "good.png").as_uri(), (tmp_path / "deadly.png").as_uri()
    with Client(redis_url) as client:
        requests = [{"image": good, "id": f"good-{number}"} for number in range(OTHER_IMAGES)]
        requests.insert(5, {"image": deadly, "id": "deadly"})
        ids = list(client.enqueue_many(requests))
        codes: list[int] = []
        # A worker may crash within a moment of being ready, so the test does not wait for that.
        worker: list[WorkerProcess] = [start_worker(redis_url=redis_url, ready=False, **options)]

        def answered() -> bool:
            if worker[-1].exit_code is not None:
                codes.append(worker[-1].exit_code)
                worker.append(start_worker(redis_url=redis_url, ready=False, **options))
            return client.queue_state().counters.get("answered", 0) >= len(ids)

        wait_until(answered, timeout_s=240, every_s=0.05)
        answers = client.wait_many(ids, timeout_s=5)
        assert codes == [-signal.SIGABRT] * 3
        assert {job_id for job_id, answer in answers.items() if answer.status is not Status.TAGGED} == {"deadly"}
        error = answers["deadly"].error
        assert error is not None
        assert error.code == "attempts_exhausted"
        [letter] = client.dead_letters()
        assert letter.id == "deadly"
        assert client.queue_state().quarantined == 0
