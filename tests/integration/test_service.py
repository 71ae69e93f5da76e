"""A real worker on real parts: every kind of picture, every kind of bad input, every kind of Celery client."""

from __future__ import annotations

import base64
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import redis
from celery.exceptions import TaskRevokedError

from shiwu.broker.message_writer import build_message
from shiwu.contract import (
    DEAD,
    DEAD_MESSAGES,
    RESULT_STREAM,
    ErrorCode,
    Lane,
    Request,
    Stage,
    Status,
    WarningCode,
    result_key,
)
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.ask import ask, read_answer
from tests.support.celery_client import celery_client
from tests.support.servers import PictureServer, S3Server, Valkey, WorkerProcess
from tests.support.waiting import wait_until


@pytest.mark.parametrize(
    "kind",
    ["jpeg", "png", "webp", "gif", "avif", "rgba_png", "cmyk_jpeg", "turned_jpeg", "large_jpeg", "progressive_jpeg"],
)
def test_image_of_every_format_gets_the_right_tag(shared_worker: WorkerProcess, s3: S3Server, kind: str) -> None:
    """One sample in every format and shape, over S3: the same best category."""
    sample = pictures.sample("熊猫")
    data = getattr(pictures, kind)(pictures.picture("熊猫"))
    reference = s3.put(f"formats/{kind}", data)
    answer = ask(shared_worker.redis_url, reference, f"format-{kind}", labels="six-zh", top_k=6)
    assert answer.status is Status.TAGGED
    assert answer.tags is not None
    assert answer.tags[0].label == sample.category
    assert sum(tag.score for tag in answer.tags) == pytest.approx(1.0, abs=1e-4)
    assert answer.image is not None
    assert answer.image.bytes == len(data)


def test_stage_times_of_an_answer_add_up_to_the_total(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """The answer has the time of each stage, and their sum is the total."""
    reference = s3.put("timing", pictures.jpeg(pictures.picture().resize((211, 97))))
    timing = ask(shared_worker.redis_url, reference, "timing").timing
    parts = [getattr(timing, stage.value) for stage in Stage if stage is not Stage.COMMIT]
    assert sum(parts) + (timing.queue or 0.0) == pytest.approx(timing.total, abs=0.01)
    assert min(timing.fetch, timing.decode, timing.encode) > 0


def test_http_images_of_many_sizes_get_their_own_answers(
    shared_worker: WorkerProcess, http_server: PictureServer
) -> None:
    """Pictures sent together in many batches: each answer belongs to its own image, which its size and digest prove."""
    image = pictures.picture("熊猫")
    sizes = [(40 + n, 90 - n) for n in range(40)]
    with redis.Redis.from_url(shared_worker.redis_url) as client:
        for number, size in enumerate(sizes):
            url = http_server.serve(f"/{number}.png", _reply(pictures.png(image.resize(size))))
            client.lpush(
                Lane.BULK.queue,
                build_message(Request(image=url, metadata=number), job_id=f"own-{number}", lane=Lane.BULK),
            )
        for number, (width, height) in enumerate(sizes):
            answer = read_answer(client, f"own-{number}")
            assert answer.image is not None
            assert (answer.metadata, answer.image.width, answer.image.height) == (number, width, height)


def _reply(data: bytes) -> Any:
    from tests.support.picture_server import Reply  # noqa: PLC0415 next to its only use

    return Reply.picture(data, content_type="image/png")


@pytest.mark.parametrize(
    ("key", "make", "code"),
    [
        ("broken.jpg", pictures.truncated, "picture_broken"),
        ("empty.jpg", pictures.empty, "picture_empty"),
        ("page.jpg", pictures.html, "not_a_picture"),
    ],
)
def test_file_that_is_no_image_gets_its_error_code(
    shared_worker: WorkerProcess, s3: S3Server, key: str, make: Any, code: str
) -> None:
    """Truncated, empty, HTML with a picture's name."""
    reference = s3.put(f"bad/{key}", make(pictures.picture()))
    answer = ask(shared_worker.redis_url, reference, f"bad-{key}")
    assert answer.error is not None
    assert (answer.status, answer.error.code.value) == (Status.REJECTED, code)


@pytest.mark.parametrize(
    ("image", "code"),
    [
        ("s3://pictures/never/was.jpg", "source_not_found"),
        ("s3://no-such-bucket/a.jpg", "source_not_found"),
        ("s3://pictures/folder/", "source_not_a_file"),
        ("file:///etc/passwd", "source_forbidden"),
        ("http://10.0.0.1/a.jpg", "source_unavailable"),
        ("http://[::ffff:169.254.169.254]/latest", "source_unavailable"),
    ],
)
def test_missing_or_forbidden_source_gets_its_error_code(shared_worker: WorkerProcess, image: str, code: str) -> None:
    """Missing keys and buckets, folders, files and addresses that the operator did not allow; tried once."""
    answer = ask(shared_worker.redis_url, image, f"source-{abs(hash(image))}")
    assert answer.error is not None
    assert (answer.error.code.value, answer.attempts) == (code, 1)


def test_log_has_details_that_the_answer_omits(shared_worker: WorkerProcess) -> None:
    """Why a source was refused; neither contains the query."""
    answer = ask(shared_worker.redis_url, "http://10.0.0.9/a.jpg?token=hush", "refused-aloud")
    assert answer.error is not None
    assert answer.error.message == "expected a source that can be reached from the worker: http://10.0.0.9/a.jpg"
    lines = [json.loads(line) for line in shared_worker.log_text().splitlines() if '"refused-aloud"' in line]
    assert "refused: 10.0.0.9 is not public: private use" in [line.get("detail") for line in lines]
    assert "hush" not in answer.to_json().decode() + shared_worker.log_text()


BAD_FIELDS = {
    "no-scheme": ({"image": "cat.jpg"}, "invalid_reference"),
    "unknown-set": ({"image": "s3://pictures/x", "labels": "no-such-set"}, "unknown_label_set"),
    "big-metadata": ({"image": "s3://pictures/x", "metadata": "x" * 5000}, "metadata_too_large"),
    "many-labels": ({"image": "s3://pictures/x", "labels": [f"词{n}" for n in range(2000)]}, "invalid_labels"),
    "flood-labels": ({"image": "s3://pictures/x", "labels": [f"词{n}" for n in range(200_000)]}, "message_too_large"),
    "bad-top-k": ({"image": "s3://pictures/x", "top_k": 0}, "invalid_request"),
    "no-image": ({}, "invalid_reference"),
}


@pytest.fixture(scope="module")
def plain(shared_worker: WorkerProcess) -> Any:
    """A Celery application that has none of our code."""
    with celery_client(shared_worker.redis_url) as app:
        yield app


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_request_of_a_celery_client_gets_its_error_code(plain: Any, name: str) -> None:
    """What our client would have refused is answered by the worker, and `get` raises."""
    fields, code = BAD_FIELDS[name]
    result = plain.send_task("shiwu.tag", kwargs=fields, queue=Lane.INTERACTIVE.queue, task_id=f"plain-{name}")
    with pytest.raises(Exception, match=code):
        result.get(timeout=30)
    assert result.result is not None
    assert plain.backend.get_task_meta(result.id)["status"] == "FAILURE"


def test_celery_client_gets_its_result(plain: Any, s3: S3Server) -> None:
    """Keyword and positional arguments, priorities, gzip: `AsyncResult.get()` returns the answer."""
    reference = s3.put("plain", pictures.jpeg(pictures.picture()))
    sent = [
        plain.send_task("shiwu.tag", kwargs={"image": reference}, queue="shiwu.interactive"),
        plain.send_task("shiwu.tag", args=[reference, "pictogram-zh", 2], queue="shiwu.bulk"),
        plain.send_task("shiwu.tag", args=[reference], queue="shiwu.bulk", compression="gzip"),
        *[plain.send_task("shiwu.tag", args=[reference], queue="shiwu.bulk", priority=n) for n in (0, 3, 6, 9)],
    ]
    answers = [result.get(timeout=30) for result in sent]
    assert {answer["status"] for answer in answers} == {"tagged"}
    assert len(answers[1]["tags"]) == 2
    assert [answer["id"] for answer in answers] == [result.id for result in sent]


def test_countdown_and_expires_of_celery_are_kept(plain: Any, s3: S3Server) -> None:
    """A countdown is waited for; what expired is revoked as Celery would."""
    reference = s3.put("later", pictures.jpeg(pictures.picture()))
    began_s = time.monotonic()
    later = plain.send_task("shiwu.tag", args=[reference], queue="shiwu.bulk", countdown=1.5)
    gone = plain.send_task(
        "shiwu.tag", args=[reference], queue="shiwu.bulk", expires=datetime.now(UTC) - timedelta(seconds=1)
    )
    with pytest.raises(TaskRevokedError):
        gone.get(timeout=30)
    assert later.get(timeout=30)["status"] == "tagged"
    assert time.monotonic() - began_s >= 1.4


def test_ignore_result_writes_only_the_results_stream(plain: Any, s3: S3Server) -> None:
    """With `ignore_result` no result is stored; the results stream still has the answer."""
    reference = s3.put("ignored", pictures.jpeg(pictures.picture()))
    plain.send_task("shiwu.tag", args=[reference], queue="shiwu.bulk", ignore_result=True, task_id="ignored-1")
    client = plain.backend.client
    wait_until(lambda: any(fields[b"id"] == b"ignored-1" for _, fields in client.xrange(RESULT_STREAM)), timeout_s=30)
    assert client.get(result_key("ignored-1")) is None


def test_malformed_messages_become_dead_letters(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """Bytes that are no message are stored unchanged as dead letters; the next job is answered."""
    odd = [b"", b"\xff\x00", b"[]", b'{"headers":{"id":"has space","task":"shiwu.tag"}}', b"[" * 5000]
    with redis.Redis.from_url(shared_worker.redis_url) as client:
        before = client.zcard(DEAD)
        client.lpush(Lane.INTERACTIVE.queue, *odd)
        wait_until(lambda: client.zcard(DEAD) >= before + 4, timeout_s=10)
        kept = {record.partition(b"|")[2] for record in client.hvals(DEAD_MESSAGES)}
        assert set(odd) - {b""} <= kept
    answer = ask(shared_worker.redis_url, s3.put("after", pictures.jpeg(pictures.picture())), "after-odd")
    assert answer.status is Status.TAGGED


def test_inline_labels_embedding_and_min_cosine_are_used(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """Labels of the request's own, the raw vector, and only labels that are near enough."""
    reference = s3.put("inline", pictures.jpeg(pictures.picture("熊猫")))
    ways: dict[str, Any] = {"labels": ("汽车", "熊猫"), "want": ("tags", "embedding")}
    answer = ask(shared_worker.redis_url, reference, "inline", **ways)
    assert answer.tags is not None
    assert answer.embedding is not None
    assert [tag.label for tag in answer.tags] == ["熊猫", "汽车"]
    assert sum(x * x for x in answer.embedding) == pytest.approx(1.0, abs=1e-3)
    bound = (answer.tags[0].cosine + answer.tags[1].cosine) / 2
    answer = ask(shared_worker.redis_url, reference, "inline-near", min_cosine=bound, **ways)
    assert answer.tags is not None
    assert [tag.label for tag in answer.tags] == ["熊猫"]


def test_vector_comes_beside_tags_or_alone(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """Float16 in base64: the same vector as the numbers of the embedding."""
    reference = s3.put("vector", pictures.jpeg(pictures.picture("熊猫")))
    answer = ask(shared_worker.redis_url, reference, "vector-all", want=("tags", "embedding", "vector"))
    assert answer.vector is not None
    assert answer.embedding is not None
    assert answer.tags
    halves = np.frombuffer(base64.b64decode(answer.vector), "<f2")
    np.testing.assert_allclose(halves, answer.embedding, atol=3e-4)
    alone = ask(shared_worker.redis_url, reference, "vector-alone", want=("vector",))
    assert (alone.tags, alone.embedding, alone.vector) == (None, None, answer.vector)


def test_unusable_labels_are_rejected(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """Sigmoid with a model that has no bias, and labels with a line break."""
    reference = s3.put("refused", pictures.jpeg(pictures.picture("熊猫")))
    answer = ask(shared_worker.redis_url, reference, "no-bias", labels=("熊猫", "汽车"), head="sigmoid")
    assert answer.error is not None
    assert (answer.error.code, answer.status) == (ErrorCode.INVALID_REQUEST, Status.REJECTED)
    assert "min_cosine" in answer.error.message
    unchecked = Request.model_construct(image=reference, labels=("熊猫\n汽车",))
    with redis.Redis.from_url(shared_worker.redis_url) as client:
        client.lpush(Lane.BULK.queue, build_message(unchecked, job_id="line-break", lane=Lane.BULK))
        answer = read_answer(client, "line-break")
    assert answer.error is not None
    assert (answer.error.code, answer.status) == (ErrorCode.INVALID_LABELS, Status.REJECTED)
    assert "U+000A" in answer.error.message


def test_answer_has_warnings_about_its_tags(shared_worker: WorkerProcess, s3: S3Server) -> None:
    """A label that the model cannot read, and a field that the worker does not know."""
    reference = s3.put("warned", pictures.jpeg(pictures.picture("熊猫")))
    answer = ask(shared_worker.redis_url, reference, "plain-warned")
    assert answer.warnings is None
    fields = {"image": reference, "labels": ["熊猫", "zzz"], "topK": 1}
    with celery_client(shared_worker.redis_url) as app:
        app.send_task("shiwu.tag", kwargs=fields, task_id="odd-warned", queue=Lane.INTERACTIVE.queue)
    with redis.Redis.from_url(shared_worker.redis_url) as client:
        answer = read_answer(client, "odd-warned")
    assert answer.status is Status.TAGGED
    warnings = {one.code: one.message for one in answer.warnings or ()}
    assert set(warnings) == {WarningCode.UNKNOWN_FIELD, WarningCode.LABELS_UNREADABLE}
    assert "'topK' (did you mean 'top_k'?)" in warnings[WarningCode.UNKNOWN_FIELD]
    assert "1 of 2 labels: zzz" in warnings[WarningCode.LABELS_UNREADABLE]
    events = [json.loads(line).get("event") for line in shared_worker.log_text().splitlines() if line.startswith("{")]
    assert "labels_questionable" in events


def test_idle_worker_sends_few_commands(start_worker: StartWorker, redis_url: str, tmp_path: Any) -> None:
    """No more than 20 a second after a job: it waits for messages, and does not poll. `bench latency` has the times."""
    path = tmp_path / "x.png"
    path.write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    start_worker(redis_url=redis_url, allow_folders=tmp_path)
    assert ask(redis_url, path.as_uri(), "idle").status is Status.TAGGED
    with redis.Redis.from_url(redis_url) as client:
        before, since_s = client.info("stats")["total_commands_processed"], time.monotonic()
        client.blpop(["nothing"], timeout=3)
        commands = client.info("stats")["total_commands_processed"] - before
        per_second = commands / (time.monotonic() - since_s)
    assert per_second <= 20


def test_worker_is_an_ordinary_celery_worker(start_worker: StartWorker, redis_url: str, tmp_path: Any) -> None:
    """`celery -A shiwu_worker.app worker` claims and answers as `shiwu-worker` does, and ends with exit code 0."""
    path = tmp_path / "x.png"
    path.write_bytes(pictures.png(pictures.picture()))
    worker = start_worker(redis_url=redis_url, by_celery=True, allow_folders=tmp_path)
    assert ask(redis_url, path.as_uri(), "by-celery").status is Status.TAGGED

    def lines_of_the_job() -> int:
        lines = [json.loads(line) for line in worker.log_text().splitlines() if line.startswith("{")]
        return sum(line.get("id") == "by-celery" for line in lines)

    wait_until(lines_of_the_job, timeout_s=10, what="the line of a job, which follows its answer")
    worker.terminate()
    assert worker.wait(timeout_s=15) == 0, "an idle worker has nothing to wait for"
    assert lines_of_the_job() == 1, "one line per job"


def test_consumer_pauses_while_redis_refuses_it(start_worker: StartWorker, valkey: Valkey) -> None:
    """A user without a command that Celery needs: jobs are answered, and the log does not run away."""
    with valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "worker", "on", ">pw", "~*", "&*", "+@all", "-zrange", "-psubscribe")
        url = valkey.url.replace("redis://", "redis://worker:pw@")
        worker = start_worker(redis_url=url)
        wait_until(lambda: worker.log_text().count("Trying to re") >= 2, timeout_s=20)
        before, began_s = worker.log_text().count("Trying to re"), time.monotonic()
        wait_until(lambda: time.monotonic() - began_s > 4.0, timeout_s=10)
        assert worker.log_text().count("Trying to re") - before <= 20
        assert worker.is_running
