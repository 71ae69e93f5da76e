"""Every form of SHIWU_REDIS_URL on real servers, with all three who read it: client, Celery's broker, its results."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from celery import chain

from shiwu import Client
from shiwu.broker.connection import connect
from shiwu.broker.redis_errors import RedisCode, classify
from shiwu.broker.redis_url import read_redis_url
from shiwu.contract import Lane
from shiwu_worker.celery_worker.callback_app import make_callback_app
from shiwu_worker.celery_worker.worker_app import make_app
from shiwu_worker.config.settings import Settings
from shiwu_worker.stages.claim.notifier import LaneNotifier
from tests.conftest import StartWorker
from tests.support import pictures
from tests.support.both_clients import OpenClient
from tests.support.celery_client import celery_client
from tests.support.certificates import Certificate
from tests.support.failover import NAME, Failover
from tests.support.processes import LOOPBACK
from tests.support.redis_server import RedisServer, valkey_binary
from tests.support.tls_front import TlsFront
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.xdist_group(__name__),
    pytest.mark.filterwarnings("ignore:Call to deprecated setex"),  # Celery's result backend
]
PASSWORD = "p@s/s:w#o?r&d;%"
QUOTED = "p%40s%2Fs%3Aw%23o%3Fr%26d%3B%25"
FORMS = {
    "plain": "redis://{host}:{port}",
    "valkey": "valkey://{host}:{port}/3",
    "db": "redis://{host}:{port}?db=3",
    "password": f"redis://:{QUOTED}@{{host}}:{{port}}/0",
    "user": f"redis://us%40er:{QUOTED}@{{host}}:{{port}}/3",
    "socket": "unix://{socket}",
    "socket-db": f"unix://us%40er:{QUOTED}@{{socket}}?db=3",
    "socket-celery": "redis+socket://{socket}?virtual_host=3",
    # The chart's form.
    "tls": f"rediss://us%40er:{QUOTED}@localhost:{{tls}}/3?ssl_ca_certs={{ca}}",
    "tls-valkeys": "valkeys://localhost:{tls}?ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={ca}",
    "tls-other-name": "rediss://{host}:{tls}/0?ssl_ca_certs={ca}&ssl_check_hostname=false",
    "tls-unchecked": "rediss://{host}:{tls}/0?ssl_cert_reqs=none",
    "tls-client": "rediss://localhost:{mutual}/0?ssl_ca_certs={ca}&ssl_certfile={ca}&ssl_keyfile={key}",
}
SENTINEL_FORMS = {
    "sentinel": "sentinel://{hosts}/{name}",
    # The chart's form.
    "sentinel-login": f"sentinel://us%40er:{QUOTED}@{{hosts}}/{{name}}/3?sentinel_password=s%26s",
}


@dataclass(frozen=True)
class Parts:
    """One server by all its doors, for the forms above to be filled in."""

    doors: dict[str, str | int]

    def url(self, form: str) -> str:
        """A form with addresses."""
        return FORMS[form].format(**self.doors)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """A server with two users, on a port, a socket, behind TLS, and behind TLS that wants a client's certificate."""
    folder = tmp_path_factory.mktemp("parts") / "with blank"
    folder.mkdir()
    certificate = Certificate.make(folder, name="localhost")
    mutual = certificate.server_context()
    mutual.verify_mode = ssl.CERT_REQUIRED
    mutual.load_verify_locations(certificate.path)
    path = folder / "redis.sock"
    with RedisServer(
        folder=folder.parent / "server", binary=valkey_binary(), config={"unixsocket": f'"{path}"'}
    ) as server:
        with server.client() as client:
            add_user(client)
        with TlsFront(server.port, certificate.server_context()) as tls, TlsFront(server.port, mutual) as strict:
            quoted = str(folder).replace(" ", "%20")
            doors = {"host": LOOPBACK, "port": server.port, "socket": f"{quoted}/redis.sock", "tls": tls.port}
            files = {"ca": f"{quoted}/localhost.pem", "key": f"{quoted}/localhost.key"}
            yield Parts({**doors, **files, "mutual": strict.port})


def add_user(client: redis.Redis) -> None:
    """A user whose name and password hold what a URL gives a meaning; the default one takes any password, too."""
    client.acl_setuser("us@er", enabled=True, passwords=[f"+{PASSWORD}"], keys="*", channels="*", categories=["+@all"])


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failover]:
    """A primary with the same user, and sentinels."""
    with Failover(folder=tmp_path_factory.mktemp("servers"), replicas=0) as running:
        with redis.Redis(host=LOOPBACK, port=running.primary()) as client:
            add_user(client)
        yield running


def agree(open_client: OpenClient, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three write into one database, and the one of the URL."""
    monkeypatch.setenv("SHIWU_REDIS_URL", url)
    monkeypatch.setenv("SHIWU_CALLBACK_TASKS", "theirs.*")
    settings = Settings()
    callbacks, admin = make_callback_app(settings), make_app(settings)
    with open_client(url) as client, connect(url, timeout_s=5) as near:
        near.flushall()
        client.enqueue("s3://b/k")
        callbacks.send_task("theirs.task", queue="celery")
        callbacks.backend.store_result("job", {"a": 1}, "SUCCESS")
        assert callbacks.backend.get_result("job") == {"a": 1}
        with admin.connection_for_read() as connection, connection.channel() as channel:
            assert channel.queue_declare("celery", passive=True).message_count == 1
        assert {b"shiwu.interactive", b"celery", b"celery-task-meta-job"} <= set(near.keys())
        assert near.info("keyspace").keys() == {f"db{read_redis_url(url).database}"}
    callbacks.backend.client.close()
    for app in (callbacks, admin):
        app.close()


@pytest.mark.parametrize("form", ["user", "socket-db", "tls", "tls-client"])
def test_idle_worker_is_notified_by_every_kind_of_url(parts: Parts, form: str) -> None:
    """By RESP3, with logins, sockets and TLS, whose records may hold more than one reply."""
    url = parts.url(form)
    with connect(url, timeout_s=5, max_connections=1, has_pushes=True) as client, connect(url, timeout_s=5) as other:
        other.delete(*Lane.BULK.keys, *Lane.INTERACTIVE.keys)
        notifier = LaneNotifier(client)
        for _ in range(20):
            assert notifier.wait(0.0) is False
            producer = threading.Timer(0.01, other.lpush, (Lane.BULK.queue, "message"))
            producer.start()
            assert notifier.wait(20.0) is True
            producer.join(20.0)
            assert other.lpop(Lane.BULK.queue) == b"message"
        notifier.close()


@pytest.mark.parametrize("form", FORMS)
def test_redis_url_serves_client_broker_and_backend(
    open_client: OpenClient, parts: Parts, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ports, sockets and TLS, users and passwords that need escaping, database numbers in path and query."""
    if form == "password":
        with connect(parts.url("plain"), timeout_s=5) as near:
            near.acl_setuser("default", enabled=True, reset_passwords=True, passwords=[f"+{PASSWORD}"])
        try:
            agree(open_client, parts.url(form), monkeypatch)
        finally:
            with connect(parts.url("user"), timeout_s=5) as near:
                near.acl_setuser("default", enabled=True, nopass=True)
        return
    agree(open_client, parts.url(form), monkeypatch)


@pytest.mark.parametrize("form", SENTINEL_FORMS)
def test_sentinel_url_serves_client_broker_and_backend(
    open_client: OpenClient, servers: Failover, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a login at the primary, and another at the sentinels."""
    hosts = servers.url.removeprefix("sentinel://").partition("/")[0]
    url = SENTINEL_FORMS[form].format(hosts=hosts, name=NAME)
    if form == "sentinel":
        agree(open_client, url, monkeypatch)
        return
    with ExitStack() as stack:
        for host in hosts.split(","):
            sentinel = stack.enter_context(redis.Redis.from_url(f"redis://{host}", socket_timeout=5))
            # On one connection, which stays logged in.
            one = stack.enter_context(sentinel.client())  # type: ignore[no-untyped-call]  # redis' own
            one.execute_command("ACL", "SETUSER", "default", "resetpass", ">s&s")
            stack.callback(one.execute_command, "ACL", "SETUSER", "default", "nopass")
        agree(open_client, url, monkeypatch)
        with pytest.raises(redis.ConnectionError) as caught, open_client(url.replace("s%26s", "wrong")) as client:
            client.queue_state()
        assert classify(caught.value) is RedisCode.LOGIN


def test_worker_over_tls_handles_callbacks_and_revokes(parts: Parts, start_worker: StartWorker, tmp_path: Path) -> None:
    """A real worker: what follows in a chain runs, and Celery's revoke cancels a job that waits for its time."""
    (tmp_path / "x.png").write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    image = (tmp_path / "x.png").as_uri()
    with connect(parts.url("plain"), timeout_s=5) as near:
        near.flushall()
    url = parts.url("tls-valkeys")
    start_worker(redis_url=url, allow_folders=tmp_path, loaders=1)
    near_url = parts.url("plain")
    with celery_client(near_url) as app, Client(near_url) as client:
        sign = app.signature("shiwu.tag", args=[image], queue="shiwu.bulk")
        follower = app.signature("shiwu.tag", kwargs={"image": image}, queue="shiwu.bulk", immutable=True)
        result = chain(sign, follower).apply_async()
        assert client.wait(result.id, timeout_s=30).ok
        later = client.enqueue(image, countdown_s=600)
        wait_until(lambda: client.queue_state().delayed == 1, timeout_s=10)
        app.control.revoke(later)
        assert client.wait(later, timeout_s=10).status == "cancelled"
