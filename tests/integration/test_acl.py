"""docs/redis-acl.conf on a real server: each user can do its work, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery, chord
from redis.exceptions import NoPermissionError

from shiwu import Client, Status, WaitTimeout
from shiwu.contract import CLAIMS, LEASES, QUEUE_SNAPSHOT, RESULT_STREAM, WORKER_STATE, Lane, result_key
from shiwu.watch.keys import taken_key, watchers_key
from shiwu.watch.sources.redis_list import RedisList
from tests.support import pictures
from tests.support.backfills import BackfillProcess, rows_of
from tests.support.both_clients import open_asyncio_client
from tests.support.celery_client import celery_client
from tests.support.hooks import HooksProcess, commit, write_endpoints
from tests.support.hooks import answer as hooks_answer
from tests.support.processes import LOOPBACK, ROOT, free_ports
from tests.support.redis_parts import message
from tests.support.redis_server import RedisServer, redis_binary, valkey_binary
from tests.support.redis_users import CONFIG, CONFIG_6, users_for
from tests.support.servers import WorkerProcess
from tests.support.waiting import wait_until
from tests.support.watch import KEY, access_event, lines, record, run_watch, total, watch_process, write_rules
from tests.support.webhook_receiver import Answered, WebhookReceiver

pytestmark = pytest.mark.xdist_group(__name__)
CONTROL = "/0.celery.pidbox"
LANE = Lane.INTERACTIVE.queue


@dataclass(frozen=True)
class Guarded:
    """A server with only these users."""

    server: RedisServer
    image: str
    has_selectors: bool

    def url(self, user: str) -> str:
        """The URL of this user."""
        return self.server.url.replace("://", f"://shiwu-{user}:change-me-{user}@")

    def client(self, user: str) -> redis.Redis:
        """A plain client of this user."""
        return redis.Redis.from_url(self.url(user), socket_timeout=5)

    def refused(self) -> list[tuple[str, str]]:
        """(user, command) of each refusal that the server has logged.

        Redis 6.2 logs the CLIENT SETINFO of client libraries, a command that it does not know, as a refused CLIENT.
        """
        with self.client("admin") as admin:
            entries: Any = admin.acl_log()
        refused = [(str(entry["username"]), str(entry["object"])) for entry in entries]
        return [(user, command) for user, command in refused if command != "client"]


@pytest.fixture(scope="module", params=["valkey", pytest.param("redis", marks=pytest.mark.slow)])
def guarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The server with the users of the file, and one image."""
    folder = tmp_path_factory.mktemp("acl")
    (folder / "x.png").write_bytes(pictures.png(pictures.picture().resize((64, 64))))
    binary = redis_binary() if request.param == "redis" else valkey_binary()
    users = folder / "users.conf"
    users.write_text(users_for(binary), encoding="utf-8")
    with RedisServer(folder=folder / "server", binary=binary, config={"include": str(users)}) as server:
        yield Guarded(
            server, (folder / "x.png").as_uri(), users.read_text(encoding="utf-8") == CONFIG.read_text("utf-8")
        )


@pytest.fixture(scope="module")
def worker(guarded: Guarded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A real worker with its user, with all features that use Redis."""
    folder = tmp_path_factory.mktemp("acl-worker")
    options = {"allow_folders": Path(guarded.image.removeprefix("file://")).parent, "max_batch": 8, "loaders": 1}
    options |= {"http_port": free_ports(1)[0], "http_host": LOOPBACK, "callback_tasks": "theirs.*"}
    with WorkerProcess(
        redis_url=guarded.url("worker"), folder=folder, by_celery=True, celery_args="-E", torch_threads=1, **options
    ) as running:
        yield running.wait_ready()


def test_acl_user_can_run_a_backfill(guarded: Guarded, worker: WorkerProcess, tmp_path: Path) -> None:
    """Start, go on, another pass, pause, resume, cancel and list: the server refuses no command."""
    images = tmp_path / "list.jsonl"
    images.write_text("".join(json.dumps({"image": guarded.image, "n": number}) + "\n" for number in range(20)))

    def run(*args: str) -> BackfillProcess:
        with BackfillProcess(*args, redis_url=guarded.url("backfill"), folder=tmp_path) as process:
            assert process.wait(timeout_s=60) == 0, process.log_tail()
            return process

    start = ("start", "mine", str(images), "--out", str(tmp_path / "out"))
    with guarded.client("admin") as admin:
        admin.acl_log_reset()
        run(*start)
        run(*start, "--missing")
        with BackfillProcess(
            *("start", "slow", str(images), "--rate", "1/s"), redis_url=guarded.url("backfill"), folder=tmp_path
        ) as slow:
            wait_until(lambda: admin.hget("shiwu:backfill:slow", "sent") not in {None, b"0"}, timeout_s=30)
            run("pause", "slow")
            run("resume", "slow")
            run("cancel", "slow")
            assert slow.wait(timeout_s=30) == 0, slow.log_tail()
        listed = run("list")
        assert guarded.refused() == []
    assert len(rows_of(tmp_path / "out")) == 20
    assert "cancelled" in listed.log_text()
    assert worker.is_running


def test_acl_user_can_deliver_webhooks(guarded: Guarded, tmp_path: Path) -> None:
    """A failed try, a dead delivery, its revival and a stop: the server refuses no command."""
    replies = iter([Answered(500), Answered(500)])
    with WebhookReceiver(lambda _: next(replies, Answered())) as receiver, guarded.client("admin") as admin:
        admin.acl_log_reset()
        file = write_endpoints(tmp_path, [{"name": "orders", "url": receiver.url, "named_only": True}])
        url = guarded.url("hooks")
        with HooksProcess(redis_url=url, file=file, schedule="0s,0.1s") as process:
            process.wait_started()
            commit(admin, hooks_answer("hooked", callback="orders"))
            wait_until(lambda: process.events("delivery_dead"), timeout_s=30)
            for command in (("list",), ("status",), ("retry", "--all")):
                subprocess.run(
                    [sys.executable, "-m", "shiwu.cli", "--redis-url", url, "hooks", *command], check=True, timeout=60
                )
            wait_until(lambda: process.events("delivered"), timeout_s=30)
            assert process.stop() == 0
        assert guarded.refused() == []
    assert receiver.ids() == ["hooked.0"] * 3


def test_acl_user_can_watch_events(guarded: Guarded, tmp_path: Path) -> None:
    """Of both formats of MinIO, with what a crashed watcher took and what cannot be read: no command is refused."""
    rules = str(write_rules(tmp_path))
    url = guarded.url("watcher")
    with guarded.client("admin") as admin:
        admin.acl_log_reset()
        admin.rpush(KEY, access_event("a.jpg"), "no JSON")
        admin.rpush(taken_key(KEY, "crashed"), access_event("b.jpg"))
        admin.zadd(watchers_key(KEY), {"crashed": 1})
        listed = run_watch(url, f"{url}?key={KEY}", "--rules", rules, "--once")
        assert run_watch(url, "--unread").stdout.count("no JSON") == 1
        admin.hset(f"{KEY}:hash", "photos/c.jpg", json.dumps({"Records": [record("c.jpg")]}))
        hashed = run_watch(url, f"{url}?key={KEY}:hash", "--rules", rules, "--once")
        assert run_watch(url, f"{url}?key={KEY}:hash", "--rules", rules, "--check").exit_code == 0
        admin.rpush(KEY, access_event("d.jpg"))
        with guarded.client("watcher") as client:
            source = RedisList(client, key=KEY, name="events", watcher="w")
            source.give_back(source.take(5, wait_s=0.1))
            assert source.take(5, wait_s=0.1)
            assert source.take(5, wait_s=0.1) == []
            client.wait(0, 1)  # as with --replicas
        with watch_process(url, f"{url}?key={KEY}", "--name", "running", folder=tmp_path) as running:
            wait_until(lambda: admin.zscore(watchers_key(KEY), "running"), timeout_s=30, what="a watcher")
            assert running.stop() == 0
        assert guarded.refused() == []
        assert [total(lines(ran.stdout), "enqueued") for ran in (listed, hashed)] == [2, 1], listed.output


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # Celery's result backend
def test_acl_users_can_do_their_work(guarded: Guarded, worker: WorkerProcess) -> None:
    """Enqueue, wait, cancel, link, follow, sweep and revoke: the server refuses no command."""
    with guarded.client("admin") as admin:
        admin.acl_log_reset()
        admin.xtrim(RESULT_STREAM, maxlen=0)  # answers of other tests
        with Client(guarded.url("producer")) as producer, Client(guarded.url("client")) as client:
            ids = [producer.enqueue(guarded.image, id="one", answer_by_s=60), *producer.enqueue_many([guarded.image])]
            waited = client.wait_many(ids, timeout_s=30)
            assert {answer.status for answer in waited.values()} == {Status.TAGGED}
            later = client.enqueue(guarded.image, countdown_s=60)
            assert client.cancel(later) == [later]
            with Client(guarded.url("consumer")) as consumer:
                items = list(consumer.results(group="g", block_s=0.1, stop_when_idle=True))
            # The jobs of the other tests here have ids that begin so.
            found = {item.result.id for item in items if not item.result.id.startswith(("bf.", "ev."))}
            assert found == {*ids, later}
            for item in items:
                item.ack()
            if guarded.has_selectors:
                assert client.running_workers() == (waited["one"].worker,)
        _by_celery(guarded, admin)
        _sweep(guarded, admin)
        wait_until(lambda: admin.exists(QUEUE_SNAPSHOT), timeout_s=15, what="the worker's look at the lanes")
        wait_until(lambda: admin.exists(f"{WORKER_STATE}{waited['one'].worker}"), timeout_s=10, what="its state")
        assert guarded.refused() == []
    assert worker.is_running
    assert '"level": "error"' not in worker.log_text()


def test_acl_users_serve_the_asyncio_client(guarded: Guarded, worker: WorkerProcess) -> None:
    """Its connections, its one subscription and what else it sends: the server refuses no command."""
    with guarded.client("admin") as admin:
        admin.acl_log_reset()
        with (
            open_asyncio_client(guarded.url("producer")) as producer,
            open_asyncio_client(guarded.url("client")) as client,
            open_asyncio_client(guarded.url("consumer")) as consumer,
        ):
            ids = [producer.enqueue(guarded.image, answer_by_s=60), *producer.enqueue_many([guarded.image])]
            waited = client.wait_many(ids, timeout_s=30)
            assert {answer.status for answer in waited.values()} == {Status.TAGGED}
            later = client.enqueue(guarded.image, countdown_s=60)
            with pytest.raises(WaitTimeout):
                client.wait(later, timeout_s=2.5)
            assert client.cancel(later) == [later]
            read = set()
            for item in consumer.results(group="asyncio", block_s=0.1, stop_when_idle=True):
                read.add(item.result.id)
                item.ack()
            assert read >= {*ids, later}
        assert guarded.refused() == []
    assert worker.is_running


def _by_celery(guarded: Guarded, admin: redis.Redis) -> None:
    """A plain Celery producer sends a job with a link, and an operator revokes one."""
    with (
        celery_client(guarded.url("producer"), has_results=False) as plain,
        celery_client(guarded.url("client")) as app,
        celery_client(guarded.url("admin"), has_results=False) as operator,
    ):
        _send_and_revoke(plain, app, operator, guarded.image, admin)


def _send_and_revoke(plain: Celery, app: Celery, operator: Celery, image: str, admin: redis.Redis) -> None:
    kwargs = {"image": image}
    plain.send_task("shiwu.tag", kwargs=kwargs, queue="shiwu.bulk", task_id="sent")
    link = app.signature("theirs.task", queue="celery", immutable=True)
    app.send_task("shiwu.tag", kwargs=kwargs, queue=LANE, task_id="linked", link=link)
    for job_id in ("sent", "linked"):
        result = app.AsyncResult(job_id)
        assert result.get(timeout=30)["status"] == "tagged"
        result.forget()
    header = [app.signature("shiwu.tag", kwargs=kwargs, queue=lane.queue) for lane in Lane]
    chord(header, app.signature("theirs.body", queue="celery"), app=app).apply_async(task_id="body")
    wait_until(lambda: admin.llen("celery") == 2, timeout_s=10, what="the callback and the body of the chord")
    plain.send_task("shiwu.tag", kwargs=kwargs, queue=LANE, task_id="later", countdown=60)
    wait_until(lambda: admin.hexists("shiwu:delayed:messages", "later"), timeout_s=10)
    wait_until(admin.pubsub_numpat, timeout_s=20, what="the worker listens to revokes")
    operator.control.revoke("later")
    wait_until(lambda: admin.exists(result_key("later")), timeout_s=10, what="the answer of a revoked job")


def _sweep(guarded: Guarded, admin: redis.Redis) -> None:
    """A job of a crashed worker, one out of time, one expired, and a stream that is too long."""
    admin.hset(CLAIMS, "of-the-dead", b"dead.1|1|shiwu.bulk|" + message("of-the-dead"))
    admin.zadd(LEASES, {"of-the-dead": 1.0})
    admin.hset("shiwu:retention", "stream_length", 1)
    with admin.pipeline() as pipe:
        for _ in range(1200):
            pipe.xadd(RESULT_STREAM, {"id": "old", "answer": "{}"})
        pipe.execute()
    with Client(guarded.url("sweep")) as sweep:
        assert sweep.sweep().did_something
        assert sweep.queue_state().counters["answered"] > 0
    assert admin.xlen(RESULT_STREAM) <= 1010  # the least length that is believed


FORBIDDEN: list[tuple[str, tuple[Any, ...]]] = [
    *((user, ("PUBLISH", CONTROL, "{}")) for user in ("producer", "client", "consumer", "sweep")),
    *((user, ("RPOP", LANE)) for user in ("producer", "client", "consumer", "sweep")),
    *((user, ("BRPOP", LANE, 1)) for user in ("producer", "client", "consumer", "sweep")),
    *((user, ("LMOVE", LANE, LANE, "RIGHT", "LEFT")) for user in ("producer", "client", "consumer", "sweep", "worker")),
    *((user, ("LRANGE", LANE, 0, -1)) for user in ("producer", "client", "consumer")),
    *((user, ("SUBSCRIBE", CONTROL)) for user in ("producer", "client", "consumer", "sweep")),
    ("producer", ("EVAL", "return 1", 0)),
    ("producer", ("GET", "celery-task-meta-x")),
    ("producer", ("DEL", LANE)),
    ("producer", ("LPUSH", "celery", "{}")),
    ("client", ("EVAL", f"return redis.call('RPOP', '{LANE}')", 0)),
    ("client", ("GET", "key-of-another")),
    ("consumer", ("XADD", RESULT_STREAM, "*", "id", "x")),
    ("consumer", ("XTRIM", RESULT_STREAM, "MAXLEN", 0)),
    ("watcher", ("RPOP", LANE)),
    ("watcher", ("LRANGE", "key-of-another", 0, -1)),
    ("watcher", ("PUBLISH", CONTROL, "{}")),
    ("worker", ("FLUSHALL",)),
    ("worker", ("CONFIG", "SET", "maxmemory", 1)),
    ("worker", ("KEYS", "*")),
    ("worker", ("GET", "key-of-another")),
    ("worker", ("ACL", "LIST")),
]


@pytest.mark.parametrize(
    ("user", "command"), FORBIDDEN, ids=[f"{user}-{'-'.join(map(str, command[:2]))}" for user, command in FORBIDDEN]
)
def test_acl_users_are_refused_other_commands(guarded: Guarded, user: str, command: tuple[Any, ...]) -> None:
    """They cannot take jobs, write to Celery's control channel, or read keys of other roles."""
    with guarded.client(user) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command)


@pytest.mark.parametrize("command", ["LRANGE {} 0 -1", "LMOVE {} bucketevents RIGHT LEFT", "LTRIM {} 1 0"])
def test_acl_watcher_takes_no_jobs(guarded: Guarded, command: str) -> None:
    """Its commands for lists are for its own lists, where the server can pair commands and keys."""
    with guarded.client("watcher") as client:
        for key in (LANE, "key-of-another", "shiwu:claims"):
            if guarded.has_selectors or key != LANE:
                with pytest.raises(NoPermissionError):
                    client.execute_command(*command.format(key).split())


def test_acl_applies_inside_scripts(guarded: Guarded) -> None:
    """A script cannot run commands that its user may not run."""
    with guarded.client("admin") as admin:
        sha = admin.script_load(f"return redis.call('RPOP', '{LANE}')")
    for user in ("client", "sweep"):
        with (
            guarded.client(user) as client,
            pytest.raises(redis.ResponseError, match=r"(?i)permission|ACL|can't run this command"),
        ):
            client.evalsha(sha, 0)


def test_acl_default_user_is_off(guarded: Guarded) -> None:
    """The default user is off."""
    with redis.Redis.from_url(guarded.server.url, socket_timeout=5) as client, pytest.raises(redis.RedisError):
        client.ping()


def acl_lines(admin: redis.Redis) -> list[str]:
    """The server's users; Redis shows the default `sanitize-payload` where a user was reset by command."""
    return [str(line).replace(" sanitize-payload", "") for line in admin.acl_list()]


def test_acl_loads_without_a_restart(guarded: Guarded) -> None:
    """By the command in docs/operations.md; the users are then those that a server reads at its start."""
    [script] = re.findall(r"sed -n '(.+?)' redis-acl.conf", (ROOT / "docs/operations.md").read_text(encoding="utf-8"))
    sed = ["sed", "-n", script, guarded.server.config["include"]]
    commands = subprocess.run(sed, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    with guarded.client("admin") as admin:
        before = acl_lines(admin)
        admin.acl_setuser("shiwu-producer", enabled=True, commands=["+get"], keys=["*"])
        assert acl_lines(admin) != before
        for command in commands:
            admin.execute_command(*command.split())
        assert acl_lines(admin) == before


SCRIPTS = {
    "client": ["producer/shiwu/broker/scripts/commit.lua"],
    "hooks": [f"producer/shiwu/hooks/scripts/{name}.lua" for name in ("records", "add", "take", "settle", "revive")],
    "backfill": ["producer/shiwu/broker/scripts/commit.lua", "producer/shiwu/backfill/scripts/write.lua"],
    "watcher": [f"producer/shiwu/watch/scripts/{name}.lua" for name in ("return_taken", "forget_fields")],
    "sweep": [
        f"producer/shiwu/broker/scripts/{name}.lua"
        for name in ("commit", "maintain", "move_foreign", "trim", "trim_dead", "take_late", "drop_answered")
    ],
    "worker": [
        *(
            f"producer/shiwu/broker/scripts/{name}.lua"
            for name in ("commit", "maintain", "move_foreign", "trim", "trim_dead", "revoke", "note_labels")
        ),
        *(f"producer/shiwu/broker/scripts/{name}_callbacks.lua" for name in ("take", "hold", "drop")),
        *(
            f"worker/shiwu_worker/stages/claim/scripts/{name}.lua"
            for name in ("claim", "end_claims", "renew", "release")
        ),
    ],
}


@pytest.mark.parametrize("config", [CONFIG, CONFIG_6], ids=["selectors", "flat"])
@pytest.mark.parametrize("user", SCRIPTS)
def test_acl_allows_all_commands_of_scripts(user: str, config: Path) -> None:
    """Every command that a script of a user may call, also in branches that no test above reaches."""
    called = set()
    for path in SCRIPTS[user]:
        found = re.findall(r"redis\.p?call\('(\w+)'(?:, '(GROUPS)')?", (ROOT / path).read_text(encoding="utf-8"))
        called |= {"|".join(filter(None, names)).lower() for names in found}
    [line] = [
        line for line in config.read_text(encoding="utf-8").splitlines() if line.startswith(f"user shiwu-{user} ")
    ]
    optional = {"rename"} if user in {"client", "backfill"} else set()  # moves a stream that takes no more entries
    assert called - optional - {word.strip("()").removeprefix("+") for word in line.split()} == set()
