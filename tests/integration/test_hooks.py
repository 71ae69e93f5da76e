"""`shiwu-hooks` as a real process: answers of a real Valkey reach real HTTP receivers, signed and once or more."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from subprocess import DEVNULL, PIPE
from urllib.parse import parse_qs

import redis
from standardwebhooks import Webhook

from shiwu import Client
from shiwu.contract import HOOKS_DELIVERIES, ErrorCode, ErrorInfo, Lane, Status
from shiwu.hooks.delivery_queue import DeliveryQueue
from tests.support.certificates import Certificate
from tests.support.hooks import (
    OLD_SECRET,
    SECRET,
    SEED,
    HooksProcess,
    StartHooks,
    answer,
    commit,
    unread,
    write_endpoints,
)
from tests.support.tls_front import TlsFront
from tests.support.waiting import wait_until
from tests.support.webhook_receiver import Received, WebhookReceiver


def test_standardwebhooks_verifies_each_delivery(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """With both secrets of a rotation; the body holds the whole answer, and the entries are acknowledged."""
    process = start_hooks({"name": "orders", "url": receiver.url, "secret_old_file": "old"})
    commit(redis_client, answer("k1", metadata={"team": "a"}), answer("k 2/猫", lane=Lane.INTERACTIVE))
    wait_until(lambda: len(receiver.received) == 2, timeout_s=20)
    assert sorted(receiver.ids()) == ["k%202%2F%E7%8C%AB.0", "k1.0"]
    for got in receiver.received:
        for secret in (SECRET, OLD_SECRET):
            body = Webhook(secret).verify(got.body, dict(got.headers))
        assert body["type"] == "answer.tagged"
        assert body["data"]["tags"] == [{"label": "猫", "score": 0.9, "cosine": 0.3}]
        assert got.headers["content-type"] == "application/json"
    wait_until(lambda: redis_client.hlen(HOOKS_DELIVERIES) == 0 and unread(redis_client) == 0, timeout_s=10)
    assert process.stop() == 0
    assert [event["status"] for event in process.events("delivered")] == [204, 204]
    assert SECRET[6:] not in process.log_text()


def test_endpoints_get_what_they_want(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """By status, lane, metadata and the name in the request; thin ones get no tags, Aliyun's a checksum."""
    start_hooks(
        {"name": "failed", "url": f"{receiver.url}/failed", "on": ["failed", "rejected"], "thin": True},
        {"name": "team", "url": f"{receiver.url}/team", "match": {"team": "a"}, "lane": "bulk"},
        {"name": "named", "url": f"{receiver.url}/named", "named_only": True},
        {"name": "aliyun", "url": f"{receiver.url}/aliyun", "style": "aliyun", "uid": "99", "secret_file": "seed"},
    )
    error = ErrorInfo(code=ErrorCode.ENCODE_FAILED, message="m")
    commit(
        redis_client,
        answer("bad", status=Status.FAILED, tags=None, error=error),
        answer("team", metadata={"team": "a"}),
        answer("other", metadata={"team": "a"}, lane=Lane.INTERACTIVE),
        answer("named", callback="named"),
        answer("lost", callback="nowhere"),
    )
    wait_until(lambda: len(receiver.received) == 8, timeout_s=20)
    by_path: dict[str, list[Received]] = {}
    for got in receiver.received:
        by_path.setdefault(got.path.rpartition("/")[2], []).append(got)
    assert {name: sorted(got.id for got in found) for name, found in by_path.items()} == {
        "failed": ["bad.0"],
        "team": ["team.0"],
        "named": ["named.0"],
        "aliyun": ["bad.0", "lost.0", "named.0", "other.0", "team.0"],
    }
    thin = json.loads(by_path["failed"][0].body)
    assert thin["data"] == {"id": "bad", "status": "failed", "lane": "bulk", "error": "encode_failed"}
    form = parse_qs(by_path["aliyun"][0].body.decode())
    [content] = form["content"]
    assert form["checksum"] == [hashlib.sha256(f"99{SEED}{content}".encode()).hexdigest()]
    assert json.loads(content)["data"]["id"]


def test_batch_holds_several_answers_in_one_body(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """At most as many as the endpoint says."""
    start_hooks({"name": "many", "url": receiver.url, "batch": 4})
    commit(redis_client, *(answer(f"k{number}") for number in range(10)))
    wait_until(lambda: unread(redis_client) == 0 and redis_client.hlen(HOOKS_DELIVERIES) == 0, timeout_s=20)
    bodies = [Webhook(SECRET).verify(got.body, dict(got.headers)) for got in receiver.received]
    assert {body["type"] for body in bodies} == {"answers"}
    assert max(len(body["data"]) for body in bodies) == 4
    assert sorted(each["id"] for body in bodies for each in body["data"]) == sorted(f"k{n}" for n in range(10))


def test_requeued_job_has_another_webhook_id(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """The generation distinguishes its answers, so that a receiver that drops known ids gets both."""
    start_hooks({"name": "orders", "url": receiver.url})
    entry = {"id": "k", "answer": answer("k").to_json()}
    redis_client.xadd("shiwu:results", entry)
    redis_client.xadd("shiwu:results", entry | {"generation": 2})
    wait_until(lambda: sorted(receiver.ids()) == ["k.0", "k.2"], timeout_s=20)


def test_url_of_a_request_is_called(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_url: str, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """Over TLS, with the certificate checked, and signed; the log shows no query."""
    certificate = Certificate.make(tmp_path, name="localhost")
    with TlsFront(receiver.port, certificate.server_context()) as front:
        env = {"SHIWU_HOOKS_URLS": "1", "SSL_CERT_FILE": str(certificate.path), "SHIWU_ALLOW_HOSTS": "localhost"}
        process = start_hooks(urls={"secret_file": "secret"}, env=env)
        url = f"https://localhost:{front.port}/hook?token=hidden"
        commit(redis_client, answer("k1", callback=url), answer("k2", callback=url, metadata="x" * 4000))
        wait_until(lambda: sorted(receiver.ids()) == ["k1.0", "k2.0"], timeout_s=20)
        wait_until(lambda: len(process.events("delivered")) == 2, timeout_s=10)
    for got in receiver.received:
        Webhook(SECRET).verify(got.body, dict(got.headers))
        assert got.path == "/hook?token=hidden"
    assert {event["url"] for event in process.events("delivered")} == {f"https://localhost:{front.port}/hook"}
    assert "hidden" not in process.log_text()


def test_url_of_a_server_without_tls_gets_nothing(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """The delivery is dead, and the log shows no query."""
    url = receiver.url.replace("http://", "https://") + "?token=hidden"
    process = start_hooks(urls={"secret_file": "secret"}, env={"SHIWU_HOOKS_URLS": "1"}, schedule="0s")
    commit(redis_client, answer("k", callback=url))
    [event] = wait_until(lambda: process.events("delivery_dead"), timeout_s=20)
    assert (event["reason"], event["endpoint"]) == ("tls", f"https://127.0.0.1:{receiver.port}")
    assert event["url"].endswith("/hook")
    assert "hidden" not in process.log_text()


def test_urls_have_a_small_backlog(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis, deliveries: DeliveryQueue
) -> None:
    """Of a hundred origins, each with a tenth of an endpoint's; they hold up no endpoint of the file."""
    start_hooks(
        {"name": "a", "url": receiver.url},
        urls={"secret_file": "secret"},
        env={"SHIWU_HOOKS_URLS": "1"},
        schedule="0s,9m",
        max_pending=30,
    )
    for part in range(3):
        url = f"https://127.0.0.1:{receiver.port}/{part}"
        commit(redis_client, *(answer(f"one{part}-{number}", callback=url) for number in range(10)))
        wait_until(lambda: unread(redis_client) == 0, timeout_s=20)
    wait_until(lambda: len(receiver.received) == 30, timeout_s=20)
    # A portion may exceed the limit of 3 by its own length.
    assert deliveries.dead_count() >= 10
    origins = [answer(f"many{port}", callback=f"https://127.0.0.1:{port}/") for port in range(10_001, 10_121)]
    commit(redis_client, *origins)
    wait_until(lambda: len(set(receiver.ids())) == 150, timeout_s=30)
    waiting = [name for name in deliveries.endpoints_with_deliveries() if name != "a"]
    assert 90 <= len(waiting) <= 100
    assert {dead.reason for dead in deliveries.dead()} == {"backlog_full"}


def test_url_is_not_called_where_it_is_not_allowed(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """The answer counts as handled."""
    process = start_hooks({"name": "a", "url": receiver.url, "named_only": True})
    commit(redis_client, answer("k", callback="https://127.0.0.1:1/"))
    [event] = wait_until(lambda: process.events("answer_unrouted"), timeout_s=20)
    assert (event["id"], event["reason"]) == ("k", "url_refused")
    wait_until(lambda: unread(redis_client) == 0, timeout_s=10)


def test_new_group_begins_with_new_answers(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_client: redis.Redis
) -> None:
    """Unless `--from-beginning` is given."""
    commit(redis_client, answer("old"))
    process = start_hooks({"name": "a", "url": receiver.url})
    commit(redis_client, answer("new"))
    wait_until(lambda: receiver.ids() == ["new.0"], timeout_s=20)
    process.stop()
    start_hooks({"name": "a", "url": receiver.url}, group="other", args="--from-beginning", name="second")
    wait_until(lambda: sorted(receiver.ids()) == ["new.0", "new.0", "old.0"], timeout_s=20)


def test_real_client_names_the_endpoint(
    start_hooks: StartHooks, receiver: WebhookReceiver, redis_url: str, redis_client: redis.Redis
) -> None:
    """`callback` of a request that is answered by maintenance, as a worker answers it too."""
    start_hooks({"name": "orders", "url": receiver.url, "named_only": True, "on": ["expired"]})
    with Client(redis_url) as client:
        client.enqueue("s3://b/k.jpg", id="k", callback="orders", expires_s=0.001)
        client.enqueue("s3://b/k.jpg", id="other", expires_s=0.001)
        wait_until(lambda: client.sweep() and receiver.ids() == ["k.0"], timeout_s=20)
    assert json.loads(receiver.received[0].body)["data"]["callback"] == "orders"


def test_process_ends_where_its_log_cannot_be_written(
    receiver: WebhookReceiver, redis_client: redis.Redis, redis_url: str, tmp_path: Path
) -> None:
    """Instead of going on without the thread that met the error; a process, because its other threads end with it."""
    file = write_endpoints(tmp_path, [{"name": "orders", "url": receiver.url}])
    hooks = HooksProcess(redis_url=redis_url, file=file)
    with subprocess.Popen(hooks.command, env=hooks.env, cwd=tmp_path, stdout=PIPE, stderr=DEVNULL) as process:
        try:
            assert process.stdout is not None
            assert b'"started"' in process.stdout.readline()
            process.stdout.close()
            commit(redis_client, answer("k1"))
            assert process.wait(30) != 0
        finally:
            process.kill()
    assert receiver.ids() == ["k1.0"]
