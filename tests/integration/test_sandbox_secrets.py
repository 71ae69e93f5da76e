"""A worker with every secret there is: none of them is in the memory of the process that decodes images."""

from __future__ import annotations

from pathlib import Path

import redis

from shiwu import Client, Status
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.family import children, loaders_of
from tests.support.process_memory import found_in_memory

PASSWORD = "redis-password-90ab"
OF_SOURCES = {
    "HTTPS_PROXY": "http://user:environment-proxy-password-11d2@127.0.0.1:9",
    "AWS_ACCESS_KEY_ID": "access-key-2b7f",
    "AWS_SECRET_ACCESS_KEY": "secret-access-key-7c1e",
    "AWS_SESSION_TOKEN": "session-token-88aa",
    "SHIWU_PROXY_URL": "http://user:proxy-password-4411@127.0.0.1:9",
    "SHIWU_S3_ENDPOINT_URL": "http://store-endpoint-51c0.test:9000",
    "SHIWU_S3_REGION": "region-6ad9",
    "SHIWU_USER_AGENT": "user-agent-e0f3",
    "SHIWU_ALLOW_HOSTS": "allowed-host-90c1.test",
    "SHIWU_ONLY_HOSTS": "only-host-4d1b.test",
    "SHIWU_DENY_HOSTS": "denied-host-7d22.test",
    "SHIWU_ALLOW_NETWORKS": "10.213.117.0/24",
    "SHIWU_DENY_NETWORKS": "10.213.118.0/24",
    "SHIWU_ALLOW_BUCKETS": "allowed-bucket-0e55",
    "SHIWU_DENY_BUCKETS": "denied-bucket-3f61",
}
"""Variables that the loaders need."""
OF_WORKER = {
    "OTEL_EXPORTER_OTLP_HEADERS": "authorization=collector-token-99d4",
    "HF_TOKEN": "model-hub-token-5e7a",
    "SHIWU_CALLBACK_TASKS": "callback-task-b3b3",
    "SOME_OTHER_SECRET": "another-secret-d8d8",
}
"""Variables that no loader needs."""


def test_no_secret_of_a_worker_is_in_its_sandboxes(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Neither in a sandbox that has decoded, nor in the fork server; the loader has those of the sources."""
    redis_client.acl_setuser(
        "w", enabled=True, passwords=[f"+{PASSWORD}"], keys="*", channels="*", categories=["+@all"]
    )
    folder = tmp_path / "allowed-folder-c4c4"
    folder.mkdir()
    (folder / "image-name-f5f5.png").write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    environment = OF_SOURCES | OF_WORKER | {"SHIWU_ALLOW_FOLDERS": str(folder)}
    options = {"loaders": 1, "loader_spares": 1, "loader_threads": 2, "slots": 16, "max_bytes": 100_000}
    worker = start_worker(
        redis_url=redis_url.replace("redis://", f"redis://w:{PASSWORD}@"),
        env=environment,
        allow_hosts=OF_SOURCES["SHIWU_ALLOW_HOSTS"],
        **options,
    )
    with Client(redis_url) as client:
        ids = [client.enqueue((folder / "image-name-f5f5.png").as_uri()) for _ in range(8)]
        assert {answer.status for answer in client.wait_many(ids, timeout_s=30).values()} == {Status.TAGGED}
    sources = {*OF_SOURCES.values(), "allowed-folder-c4c4"}
    secrets = {PASSWORD, "image-name-f5f5", *sources, *OF_WORKER.values()}
    [fork_server] = children(worker.pid)
    loaders = loaders_of(worker.pid)
    sandboxes = [sandbox for loader in loaders for sandbox in children(loader)]
    assert len(sandboxes) == 2
    assert [found_in_memory(pid, secrets) for pid in (fork_server, *sandboxes)] == [set()] * 3
    for loader in loaders:
        found = found_in_memory(loader, secrets)
        assert sources <= found, "the search finds what is there"
        assert not found & {PASSWORD, *OF_WORKER.values()}
