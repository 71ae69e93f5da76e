"""Errors of real servers, and their rows in the table of Redis errors."""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import redis
from click.testing import CliRunner

from shiwu.broker.answers import wait_replicated
from shiwu.broker.connection import connect
from shiwu.broker.migration import check_names
from shiwu.broker.redis_errors import REDIS_ERRORS, RedisCode, RedisFault, classify, explain, info_of
from shiwu.broker.sharding import PoolOptions, keep_shard_count, open_shards
from shiwu.cli import main
from tests.conftest import StartWorker
from tests.support.certificates import Certificate
from tests.support.processes import LOOPBACK, Process, clean_environment, free_ports
from tests.support.raw_server import RawServer
from tests.support.redis_server import RedisServer, valkey_binary
from tests.support.tls_front import TlsFront
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group(__name__)


@dataclass(frozen=True)
class Parts:
    """Servers for one test, which it may damage."""

    folder: Path
    stack: ExitStack

    def server(self, **config: str) -> RedisServer:
        """A server with these settings; `_` stands for `-`."""
        settings = {name.replace("_", "-"): value for name, value in config.items()}
        return self.stack.enter_context(
            RedisServer(folder=self.folder / "server", binary=valkey_binary(), config=settings)
        )

    def client(self, url: str, **options: Any) -> redis.Redis:
        """A client as shiwu makes them."""
        return self.stack.enter_context(connect(url, **({"timeout_s": 2.0} | options)))


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    """Everything is stopped in the end."""
    with ExitStack() as stack:
        yield Parts(tmp_path, stack)


def away(parts: Parts) -> None:
    parts.client(f"redis://{LOOPBACK}:{free_ports(1)[0]}").ping()


def loading(parts: Parts) -> None:
    server = parts.server(save='""', enable_debug_command="yes")
    parts.client(server.url).execute_command("DEBUG", "POPULATE", "20000")
    parts.client(server.url).save()
    server.stop()
    server.config |= {"key-load-delay": "1000", "loading-process-events-interval-bytes": "1024"}
    server.start(is_loading_enough=True)
    parts.client(server.url).get("x")


def busy(parts: Parts) -> None:
    server = parts.server(busy_reply_threshold="10")
    endless = server.client()
    thread = Thread(target=refusal, args=[lambda: endless.eval("while true do end", 0)])
    thread.start()
    parts.stack.callback(endless.close)
    parts.stack.callback(thread.join)
    parts.stack.callback(parts.stack.enter_context(server.client()).script_kill)
    wait_until(lambda: refusal(parts.client(server.url).ping), timeout_s=10)
    parts.client(server.url).get("x")


def refusal(do: Callable[[], object]) -> redis.RedisError | None:
    """What Redis refuses with."""
    try:
        do()
    except redis.RedisError as error:
        return error
    return None


def read_only(parts: Parts) -> None:
    client = parts.client(parts.server().url)
    client.replicaof(LOOPBACK, 1)
    client.set("x", 1)


def full(parts: Parts) -> None:
    client = parts.client(parts.server(maxmemory="1").url)
    client.eval("return redis.call('SET', 'x', 'y')", 0)


def not_saved(parts: Parts) -> None:
    client = parts.client(parts.server(save="1 1").url)
    shutil.rmtree(parts.folder / "server")
    client.set("x", 1)
    wait_until(lambda: refusal(lambda: client.set("x", 1)), timeout_s=20)
    client.set("x", 1)


def not_replicated(parts: Parts) -> None:
    parts.client(parts.server(min_replicas_to_write="1").url).set("x", 1)


def not_confirmed(parts: Parts) -> None:
    with parts.client(parts.server().url).client() as other:  # type: ignore[no-untyped-call]  # redis' own
        wait_replicated(other, replicas=1, timeout_s=0.1)


def pool_is_empty(parts: Parts) -> None:
    client = parts.client(parts.server().url, timeout_s=0.2, max_connections=1)
    with client.pubsub() as pubsub:  # type: ignore[no-untyped-call]  # redis' own
        pubsub.subscribe("x")
        client.ping()


def server_is_full(parts: Parts) -> None:
    server = parts.server()
    parts.client(server.url).config_set("maxclients", 1)
    parts.client(server.url).ping()


def no_login(parts: Parts) -> None:
    server = parts.server()
    with server.client() as client:
        client.config_set("requirepass", "secret")
    parts.client(server.url).ping()


def wrong_login(parts: Parts) -> None:
    parts.client(parts.server().url.replace("://", "://nobody:wrong@")).ping()


def permission(parts: Parts) -> None:
    server = parts.server()
    with server.client() as client:
        client.acl_setuser("low", enabled=True, nopass=True, commands=["+ping", "+select", "+client"])
    parts.client(server.url.replace("://", "://low:x@")).get("x")


def cluster(parts: Parts) -> None:
    parts.client(parts.server(cluster_enabled="yes").url).ping()


def moved(parts: Parts) -> None:
    # Behind our own greeting, as a proxy without one would show it.
    client = parts.server(cluster_enabled="yes").client()
    parts.stack.callback(client.close)
    client.get("x")


def not_a_cluster(parts: Parts) -> None:
    [client] = open_shards(f"{parts.server().url.replace('redis', 'cluster', 1)}?shards=1", PoolOptions(timeout_s=2))
    parts.stack.enter_context(client).ping()


def shards(parts: Parts) -> None:
    client = parts.client(parts.server().url)
    keep_shard_count(client, shards=16)
    keep_shard_count(client, shards=8)


def old_names(parts: Parts) -> None:
    client = parts.client(parts.server().url)
    client.rpush("shiwu:suspects", "shiwu.bulk|x")
    check_names(client)


def sentinel(parts: Parts) -> None:
    [port] = free_ports(1)
    config = parts.folder / "sentinel.conf"
    config.write_text(f"port {port}\nbind {LOOPBACK}\n")
    command = [str(valkey_binary()), str(config), "--sentinel"]
    parts.stack.enter_context(Process(command, name="sentinel", folder=parts.folder, env=clean_environment({})))
    wait_until(lambda: socket.socket().connect_ex((LOOPBACK, port)) == 0, timeout_s=10)
    parts.client(f"redis://{LOOPBACK}:{port}").get("x")


def database(parts: Parts) -> None:
    parts.client(parts.server().url[:-1] + "99").ping()


def tls(parts: Parts) -> None:
    context = Certificate.make(parts.folder, name="localhost").server_context()
    front = parts.stack.enter_context(TlsFront(parts.server().port, context))
    parts.client(f"rediss://localhost:{front.port}").ping()


def protocol(parts: Parts) -> None:
    server = parts.stack.enter_context(RawServer(lambda: [b"HTTP/1.1 400 Bad Request\r\n\r\n"]))
    parts.client(f"redis://{LOOPBACK}:{server.port}").ping()


def unsupported(parts: Parts) -> None:
    parts.client(parts.server(rename_command='EVALSHA ""').url).evalsha("0" * 40, 0)


def wrong_type(parts: Parts) -> None:
    client = parts.client(parts.server().url)
    client.set("x", 1)
    client.eval("return redis.call('HLEN', KEYS[1])", 1, "x")


def unknown(parts: Parts) -> None:
    client = parts.client(parts.server().url)
    client.set("x", "a")
    client.incr("x")


CASES: list[tuple[Callable[[Parts], None], RedisCode]] = [
    (away, RedisCode.UNAVAILABLE),
    (loading, RedisCode.LOADING),
    (busy, RedisCode.BUSY),
    (read_only, RedisCode.READ_ONLY),
    (full, RedisCode.FULL),
    (not_saved, RedisCode.NOT_SAVED),
    (not_replicated, RedisCode.NOT_REPLICATED),
    (not_confirmed, RedisCode.NOT_REPLICATED),
    (pool_is_empty, RedisCode.CONNECTIONS),
    (server_is_full, RedisCode.CONNECTIONS),
    (no_login, RedisCode.LOGIN),
    (wrong_login, RedisCode.LOGIN),
    (permission, RedisCode.PERMISSION),
    (cluster, RedisCode.CLUSTER),
    (moved, RedisCode.CLUSTER),
    (not_a_cluster, RedisCode.NO_CLUSTER),
    (shards, RedisCode.SHARDS),
    (old_names, RedisCode.OLD_NAMES),
    (sentinel, RedisCode.SENTINEL),
    (database, RedisCode.DATABASE),
    (tls, RedisCode.TLS),
    (protocol, RedisCode.PROTOCOL),
    (unsupported, RedisCode.UNSUPPORTED),
    (wrong_type, RedisCode.WRONG_TYPE),
    (unknown, RedisCode.UNKNOWN),
]


@pytest.mark.parametrize(("provoke", "code"), CASES, ids=[provoke.__name__ for provoke, _ in CASES])
def test_redis_error_has_its_code(parts: Parts, provoke: Callable[[Parts], None], code: RedisCode) -> None:
    """Real servers and proxies cause the errors; the text has the code and what to do."""
    with pytest.raises((redis.RedisError, OSError)) as caught:
        provoke(parts)
    assert classify(caught.value) is code
    assert explain(caught.value).startswith(f"{code.value}: {REDIS_ERRORS[code].meaning}")


def test_redis_codes_have_a_row_and_a_case_each() -> None:
    """Every row is shown by a case; only errors that the operator must fix end the start."""
    assert set(REDIS_ERRORS) == {code for _, code in CASES} == set(RedisCode)
    for info in REDIS_ERRORS.values():
        assert info.meaning.endswith(".")
        assert info.remedy.endswith(".")
        assert info.is_temporary == (info.fault is RedisFault.SERVER)
        assert info.ends_start == (info.fault is RedisFault.SETTINGS)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        # Redis 6.2, inside a script.
        (
            "Error running script (call to f_1): @user_script:12: WRONGTYPE Operation against a key",
            RedisCode.WRONG_TYPE,
        ),
        ("Command # 1 (LPUSH NOAUTH x) of pipeline caused error: value is not an integer", RedisCode.UNKNOWN),
        ("Command # 1 (LPUSH a x) of pipeline caused error: OOM command not allowed", RedisCode.FULL),
        ("EXECABORT Transaction discarded because of previous errors.", RedisCode.BUSY),
        ("MASTERDOWN Link with MASTER is down", RedisCode.READ_ONLY),
        ("SELECT is not allowed in cluster mode", RedisCode.CLUSTER),
    ],
)
def test_error_text_has_its_code(text: str, code: RedisCode) -> None:
    """The word of the code is not always the first one, and words of the command do not count."""
    assert classify(redis.ResponseError(text)) is code


@pytest.mark.parametrize(
    ("url", "exit_code", "words"),
    [
        ("", 64, "invalid_redis_url"),
        ("amqp://host", 64, "got amqp://"),
        ("redis://127.0.0.1?socket_timeout=3", 64, "SHIWU_REDIS_TIMEOUT_S"),
        ("redis://127.0.0.1:1", 4, "redis_away"),
    ],
)
@pytest.mark.parametrize("command", ["status", "sweep"])
def test_cli_reports_redis_errors_in_one_line(url: str, exit_code: int, words: str, command: str) -> None:
    """No traceback; exit code 64 where only another setting helps, 4 where Redis may become available."""
    arguments = [command] if command == "status" else [command, "--once"]
    result = CliRunner().invoke(main, arguments, env={"SHIWU_REDIS_URL": url})
    assert result.exit_code == exit_code, result.output
    assert words in result.output
    assert result.output.count("\n") == 1


def test_cli_wrong_password_exits_with_64(parts: Parts) -> None:
    """Also for the command that otherwise goes on while Redis is unavailable."""
    url = parts.server().url.replace("://", "://nobody:wrong@")
    for arguments in (["status"], ["sweep"], ["results"]):
        result = CliRunner().invoke(main, ["--redis-url", url, *arguments])
        assert (result.exit_code, result.output.count("redis_login")) == (64, 1), result.output


@pytest.mark.parametrize("cause", [OSError("gone"), ssl.SSLEOFError("end"), ssl.SSLSyscallError("I/O"), TimeoutError()])
def test_lost_connection_is_retried(cause: OSError) -> None:
    """A TLS connection that is lost in the middle is not a certificate error."""
    error = redis.ConnectionError("lost")
    error.__cause__ = cause
    assert info_of(error).is_temporary
    assert info_of(cause).is_temporary


def test_worker_with_wrong_redis_exits_before_loading(parts: Parts, start_worker: StartWorker) -> None:
    """It reports once, in one line, where only another setting helps."""
    worker = start_worker(redis_url=parts.server().url[:-1] + "99", ready=False, model="/no/such/model")
    assert worker.wait(timeout_s=60) == 64
    text = worker.log_text()
    assert text.count("redis_database") == 1
    assert "Traceback" not in text


def test_worker_refused_by_late_redis_exits_with_64(parts: Parts, start_worker: StartWorker) -> None:
    """A worker that starts before its Redis waits for it, and only then sees that the login is wrong."""
    server = parts.server(requirepass="secret")
    url = server.url.replace("://", "://:wrong@")
    server.stop()
    worker = start_worker(redis_url=url, ready=False, redis_timeout_s=1)
    wait_until(lambda: '"where": "claim"' in worker.log_text(), timeout_s=60)
    assert '"where": "start"' in worker.log_text()
    server.start()
    assert worker.wait(timeout_s=30) == 64
    assert "redis_login" in worker.log_text()
    assert "Traceback" not in worker.log_text()
