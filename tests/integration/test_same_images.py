"""Real workers and the same image in many jobs: rows of the model, answers, and what is never shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from shiwu.broker.message_writer import build_message
from shiwu.contract import Answer, Cache, ErrorCode, Lane, Request, Status
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.ask import read_answer
from tests.support.health_port import value
from tests.support.picture_server import Reply
from tests.support.processes import LOOPBACK, free_ports
from tests.support.servers import PictureServer, S3Server, WorkerProcess
from tests.support.waiting import wait_until

ROWS = "shiwu_batch_size_sum"
SAVED = "shiwu_images_saved_total"


def start(start_worker: StartWorker, redis_url: str, folder: Path, **settings: Any) -> tuple[WorkerProcess, int]:
    """A worker that shares images, and its HTTP port."""
    [port] = free_ports(1)
    usual: dict[str, Any] = {"share_images": True, "vector_cache": 20_000, "allow_folders": folder}
    usual |= {"http_port": port, "http_host": LOOPBACK}
    return start_worker(redis_url=redis_url, **(usual | settings)), port


def post(client: redis.Redis, references: Sequence[str], *, prefix: str, **fields: Any) -> list[Answer]:
    """Send one job for each reference at once, and wait for the answers."""
    ids = [f"{prefix}-{number}" for number in range(len(references))]
    messages = [
        build_message(Request(image=reference, **fields), job_id=job_id, lane=Lane.BULK)
        for reference, job_id in zip(references, ids, strict=True)
    ]
    client.lpush(Lane.BULK.queue, *messages)
    return [read_answer(client, job_id, timeout_s=120) for job_id in ids]


def write(folder: Path, count: int) -> list[str]:
    """Different images in a folder, as references."""
    image = pictures.picture()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(pictures.png(image.resize((100 + number, 90))))
    return [(folder / f"{number}.png").as_uri() for number in range(count)]


@pytest.mark.parametrize("vector_cache", [pytest.param(20_000, marks=pytest.mark.long), 10])
def test_thousand_posts_of_ten_images_take_ten_rows(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, tmp_path: Path, vector_cache: int
) -> None:
    """Each job has its own answer, equal to that of a worker that shares nothing."""
    references = write(tmp_path, 10)
    sharing, port = start(start_worker, redis_url, tmp_path, loaders=2, vector_cache=vector_cache)
    answers = post(redis_client, references * 100, prefix="post")
    wait_until(lambda: (value(port, ROWS) or 0) >= 10, timeout_s=10)
    kinds = Counter(answer.cache for answer in answers)
    assert kinds[None] == 10
    assert kinds[Cache.JOINED] + kinds[Cache.VECTOR] == 990
    wait_until(lambda: value(port, SAVED, by="vector") == kinds[Cache.VECTOR], timeout_s=10)
    assert value(port, SAVED, by="joined") == kinds[Cache.JOINED]
    assert value(port, ROWS) == 10
    sharing.stop()
    start_worker(redis_url=redis_url, allow_folders=tmp_path, share_images=False)
    fresh = post(redis_client, references, prefix="fresh")
    assert {answer.cache for answer in fresh} == {None}
    for number, answer in enumerate(answers):
        other = fresh[number % 10]
        assert answer.status is Status.TAGGED
        assert answer.image == other.image
        assert answer.tags is not None
        assert other.tags is not None
        assert [tag.label for tag in answer.tags] == [tag.label for tag in other.tags]
        assert [tag.cosine for tag in answer.tags] == pytest.approx([tag.cosine for tag in other.tags], abs=2e-3)
        assert (answer.timing.encode == 0) is (answer.cache is not None)
        parts = msgspec.structs.asdict(answer.timing)
        total = parts.pop("total")
        assert sum(each or 0.0 for each in parts.values()) == pytest.approx(total, abs=0.01)


def test_kept_vector_is_bit_by_bit_the_first_one(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """One image alone, then again with other labels and with the same: equal embeddings, scores of its own labels."""
    [reference] = write(tmp_path, 1)
    start(start_worker, redis_url, tmp_path)
    wanted = {"want": ("tags", "embedding")}
    [first] = post(redis_client, [reference], prefix="first", **wanted)
    [again] = post(redis_client, [reference], prefix="again", **wanted)
    [other] = post(redis_client, [reference], prefix="other", labels=("猫", "狗"), **wanted)
    assert [answer.cache for answer in (first, again, other)] == [None, Cache.VECTOR, Cache.VECTOR]
    assert first.embedding == again.embedding == other.embedding
    assert first.tags == again.tags
    assert other.tags is not None
    assert {tag.label for tag in other.tags} == {"猫", "狗"}
    assert (again.batch_size, again.timing.encode) == (None, 0.0)


def test_failures_are_not_shared(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, http_server: PictureServer, tmp_path: Path
) -> None:
    """Broken files fail one by one; a source that fails and then works gives tags; nothing is counted as saved."""
    (tmp_path / "broken.png").write_bytes(pictures.png(pictures.picture())[:300])
    broken = (tmp_path / "broken.png").as_uri()
    _, port = start(start_worker, redis_url, tmp_path, retry="source_unavailable=3:0.1:0.1")
    for answer in post(redis_client, [broken] * 20, prefix="broken"):
        assert answer.status is Status.REJECTED
        assert answer.error is not None
        assert answer.error.code is ErrorCode.PICTURE_BROKEN
        assert answer.cache is None
    image = pictures.png(pictures.picture())
    late = http_server.serve("/late.png", *[Reply.error(503)] * 3, Reply.picture(image))
    [answer] = post(redis_client, [late], prefix="late")
    assert (answer.status, answer.cache) == (Status.TAGGED, None)
    assert value(port, SAVED, by="vector") == value(port, SAVED, by="joined") == 0


@pytest.mark.long
def test_workers_with_other_preprocessing_share_nothing(
    start_worker: StartWorker, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """A worker with exact decoding encodes the image itself; only the vectors of one process are its own."""
    path = tmp_path / "large.jpg"
    path.write_bytes(pictures.large_jpeg(pictures.picture()))
    usual, _ = start(start_worker, redis_url, tmp_path)
    [first] = post(redis_client, [path.as_uri()], prefix="usual", want=("embedding",))
    usual.stop()
    _, port = start(start_worker, redis_url, tmp_path, exact_decode=True)
    [exact] = post(redis_client, [path.as_uri()], prefix="exact", want=("embedding",))
    assert (first.cache, exact.cache) == (None, None)
    assert first.embedding != exact.embedding
    wait_until(lambda: value(port, ROWS) == 1, timeout_s=10)


@pytest.mark.parametrize("source", ["s3", pytest.param("http", marks=pytest.mark.long)])
def test_source_need_not_send_a_known_image(
    *,
    start_worker: StartWorker,
    redis_url: str,
    redis_client: redis.Redis,
    http_server: PictureServer,
    s3: S3Server,
    tmp_path: Path,
    source: str,
) -> None:
    """It is asked for each job; an image that has changed is fetched and encoded."""
    image = pictures.picture()
    old, new = pictures.png(image.resize((90, 90))), pictures.png(image.resize((91, 91)))

    def publish(data: bytes) -> str:
        if source == "s3":
            return s3.put("known.png", data)
        return http_server.serve("/known.png", Reply.picture(data).tagged(f'"{len(data)}"'))

    reference = publish(old)
    _, port = start(start_worker, redis_url, tmp_path, env=s3.env, loaders=2)
    for number in range(5):
        [answer] = post(redis_client, [reference], prefix=f"old-{number}")
        assert answer.cache == (Cache.VECTOR if number else None)
        assert answer.image is not None
        assert (answer.image.width, answer.image.bytes) == (90, len(old))
    wait_until(lambda: value(port, SAVED, by="not_modified") == 4, timeout_s=10)
    assert value(port, SAVED, by="vector") == 0
    if source == "http":
        assert (http_server.hits["/known.png"], http_server.unmodified["/known.png"]) == (5, 4)
    publish(new)
    [changed] = post(redis_client, [reference], prefix="new")
    assert changed.cache is None
    assert changed.image is not None
    assert changed.image.width == 91
    wait_until(lambda: value(port, ROWS) == 2, timeout_s=10)
