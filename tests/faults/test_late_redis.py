"""A Redis that comes late, or comes back: a worker that reports that it is ready receives revokes."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import StartWorker
from tests.support.celery_client import celery_client
from tests.support.servers import Valkey
from tests.support.waiting import wait_until


def test_ready_worker_hears_revokes_after_an_outage(tmp_path: Path, start_worker: StartWorker) -> None:
    """Celery's half connects later than the pipeline claims; a revoke in between would be lost."""
    with Valkey(folder=tmp_path / "late") as server:
        server.stop()
        worker = start_worker(redis_url=server.url, ready=False, loaders=1, redis_timeout_s=1)
        wait_until(lambda: '"where": "claim"' in worker.log_text(), timeout_s=60)
        for number in range(3):
            assert not worker.is_ready
            server.start()
            worker.wait_ready(timeout_s=30)
            with celery_client(server.url, has_results=False) as app, server.client() as client:
                revoked = f"revoked-{number}"
                app.control.revoke(revoked)
                wait_until(lambda job_id=revoked: client.zscore("shiwu:revoked", job_id), timeout_s=5)  # type: ignore[misc]  # a default binds the loop's value
            server.kill()
            wait_until(lambda: not worker.is_ready, timeout_s=15)
        assert "revokes_not_received" not in worker.log_text()
