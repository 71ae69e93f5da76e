"""The chart's trial server as its container starts it: each part works as its own user, and no other user gets in."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from bench.autoscaler import Rules
from click.testing import CliRunner, Result

from shiwu.cli import main
from shiwu.contract import DEADLINES, RESULT_STREAM, Lane
from tests.chart.cases import MATRIX
from tests.conftest import StartWorker
from tests.support.chart import CHART, Helm, Manifest, merged, of_kind, pods, tool, variables
from tests.support.processes import LOOPBACK, Process, clean_environment, free_ports
from tests.support.redis_server import valkey_binary
from tests.support.waiting import wait_until

ROLES = ["admin", "producer", "client", "consumer", "backfill", "hooks", "watcher", "sweep", "worker", "scaler"]
DATABASE = 3
pytestmark = pytest.mark.xdist_group(__name__)


@dataclass(frozen=True)
class Trial:
    """The trial server of a rendered chart, started here."""

    manifests: list[Manifest]
    port: int
    pid: int
    passwords: dict[str, str]

    def container(self, part: str) -> dict[str, Any]:
        """The container of a part."""
        [found] = [spec["containers"][0] for where, spec in pods(self.manifests) if where.endswith(f"shiwu-{part}")]
        return dict(found)

    def url(self, part: str) -> str:
        """The URL in a part's variables, with what Kubernetes fills in and this server's address."""
        own = variables(self.container(part))
        key = own["REDIS_PASSWORD"]["secretKeyRef"]["key"]
        text = str(own["SHIWU_REDIS_URL"]).replace("$(REDIS_PASSWORD)", self.passwords[key])
        return re.sub(r"@[^/]+", f"@{LOOPBACK}:{self.port}", text)

    def client(self, role: str | None) -> redis.Redis:
        """A plain client as this user, or without a name."""
        login = f"shiwu-{role}:{self.passwords[role]}@" if role else ""
        return redis.Redis.from_url(f"redis://{login}{LOOPBACK}:{self.port}/{DATABASE}", socket_timeout=5)

    def run(self, part: str, **renamed: str) -> Result:
        """The arguments of a part's container, with paths of this machine, by the command `shiwu`."""
        args = [renamed.get(argument, argument) for argument in self.container(part)["args"]]
        return CliRunner().invoke(main, ["--redis-url", self.url(part), *args])


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """The command, arguments and variables of the rendered StatefulSet, with the rendered Secret and ConfigMap."""
    folder = tmp_path_factory.mktemp("trial")
    more = {"redis": {"database": DATABASE}, "producer": {"enabled": True, "references": ["s3://b/k"]}}
    manifests = Helm(tool("helm4")).render(merged(MATRIX["trial"], more))
    data = of_kind(manifests, "Secret", "-valkey")["data"]
    passwords = {key: base64.b64decode(value).decode() for key, value in data.items()}
    for name, text in of_kind(manifests, "ConfigMap", "-valkey-users")["data"].items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "valkey-server").symlink_to(valkey_binary())
    [port] = free_ports(1)
    container = of_kind(manifests, "StatefulSet", "-valkey")["spec"]["template"]["spec"]["containers"][0]
    renamed = {"/data": str(folder), "6379": str(port)}
    command = [text.replace("/etc/shiwu/users", str(folder)) for text in container["command"]]
    command += [renamed.get(argument, argument) for argument in container["args"]]
    env = {name: passwords[source["secretKeyRef"]["key"]] for name, source in variables(container).items()}
    env |= {"PATH": f"{folder}:/usr/bin:/bin"}
    with Process(command, name="valkey", folder=folder, env=clean_environment(env)) as process:
        found = Trial(manifests, port, process.pid, passwords)
        with found.client("admin") as client:
            wait_until(lambda: answers(client), timeout_s=20, what="the trial server")
        yield found


def answers(client: redis.Redis) -> bool:
    """Whether the server answers."""
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_trial_has_a_password_for_each_user(trial: Trial) -> None:
    """The Secret outlives the release, and its keys are the users of the file that have a password."""
    secret = of_kind(trial.manifests, "Secret", "-valkey")
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert sorted(secret["data"]) == sorted(ROLES)
    assert len(set(trial.passwords.values())) == len(ROLES)
    users = (CHART / "files" / "redis-acl.conf").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^user shiwu-(\w+) on >change-me-\1 ", users, re.M)) == sorted(ROLES)


def test_trial_gets_passwords_by_standard_input(trial: Trial) -> None:
    """No argument of the server holds one."""
    said = Path(f"/proc/{trial.pid}/cmdline").read_text(encoding="utf-8")
    assert "valkey-server" in said
    assert not [role for role, password in trial.passwords.items() if password in said]


def test_trial_default_user_is_off(trial: Trial) -> None:
    """Neither a client without a name, nor one with the passwords that docs/redis-acl.conf prints."""
    with trial.client(None) as client, pytest.raises(redis.AuthenticationError):
        client.ping()
    for role in ROLES:
        with (
            redis.Redis(port=trial.port, username=f"shiwu-{role}", password=f"change-me-{role}") as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()
    with trial.client("admin") as admin:
        listed: list[str] = admin.acl_list()
    assert [line.split()[:3] for line in listed if line.startswith("user default")] == [["user", "default", "off"]]


def test_each_part_of_the_trial_does_its_work(trial: Trial, start_worker: StartWorker, tmp_path: Path) -> None:
    """A real worker, `helm test`, the producer's CronJob, the sweep and KEDA; the server refuses no command."""
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(base64.b64decode(of_kind(trial.manifests, "ConfigMap", "-test")["binaryData"]["picture.jpg"]))
    (tmp_path / "references.txt").write_text(picture.as_uri(), encoding="utf-8")
    with trial.client("admin") as admin:
        admin.acl_log_reset()
        enqueued = trial.run("producer", **{"/etc/shiwu/references/references.txt": str(tmp_path / "references.txt")})
        assert enqueued.exit_code == 0, enqueued.output
        assert admin.llen(Lane.BULK.queue) == 1
        with trial.client("scaler") as scaler:
            rules = Rules.read(of_kind(trial.manifests, "ScaledObject"))
            assert rules.metric(scaler) == 1
        worker = start_worker(redis_url=trial.url("worker"), allow_folders=tmp_path)
        asked = trial.run("test-answer", **{"file:///etc/shiwu/test/picture.jpg": picture.as_uri()})
        assert asked.exit_code == 0, asked.output
        assert json.loads(asked.stdout)["status"] == "tagged"
        wait_until(lambda: admin.xlen(RESULT_STREAM) == 2, timeout_s=30, what="the answer to the CronJob's job")
        sweeps(trial, tmp_path)
        admin_log: Any = admin.acl_log()
        assert [(entry["username"], entry["object"]) for entry in admin_log] == []
    assert worker.is_running


def sweeps(trial: Trial, folder: Path) -> None:
    """The arguments of the sweep's container: it answers a job whose deadline has passed, and serves metrics."""
    args = list(trial.container("sweep")["args"])
    [port] = free_ports(1)
    args[args.index("--metrics-port") + 1] = str(port)
    run = "import sys; from shiwu.cli import main; sys.exit(main())"
    env = clean_environment({"SHIWU_REDIS_URL": trial.url("sweep")})
    with trial.client("client") as client:
        client.zadd(DEADLINES, {"late": 1.0})
    with (
        Process([sys.executable, "-c", run, *args], name="sweep", folder=folder, env=env),
        trial.client("admin") as admin,
    ):
        wait_until(lambda: not admin.exists(DEADLINES), timeout_s=30, what="a round of the sweep")
        wait_until(lambda: "shiwu_queue_waiting" in metrics(port), timeout_s=30, what="metrics of the queues")


def metrics(port: int) -> str:
    """What the sweep serves; nothing while it does not answer."""
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{port}/metrics", timeout=5) as reply:
            return str(reply.read(), "utf-8")
    except OSError:
        return ""


LINE = "user shiwu-worker on >change-me-worker resetchannels ~a -@all +ping"


@pytest.mark.parametrize(
    ("line", "password", "output", "exit_code"),
    [
        (
            LINE,
            "aZ9._~-",
            "- --port 1\nuser default off\nuser shiwu-worker on >aZ9._~- resetchannels ~a -@all +ping\n",
            0,
        ),
        (LINE, "", "- --port 1\nuser default off\nuser shiwu-worker off resetchannels ~a -@all +ping\n", 0),
        (LINE, "a b", "REDIS_WORKER_PASSWORD: expected letters, digits and . _ ~ - only, which a URL takes", 64),
        ("user shiwu-worker on >own ~a", "x", "expected on >change-me-worker, got other words", 64),
    ],
    ids=["given", "none", "unsafe", "foreign line"],
)
def test_script_gives_each_user_its_password(
    tmp_path: Path, line: str, password: str, output: str, exit_code: int
) -> None:
    """A user without a password cannot log in; the server does not start with an unsafe one."""
    (tmp_path / "users").write_text(f"# A note.\n\nuser default off\n{line}\n", encoding="utf-8")
    server = tmp_path / "valkey-server"
    server.write_text('#!/bin/sh\necho "$@"\ncat\n', encoding="utf-8")
    server.chmod(0o755)
    done = subprocess.run(
        ["sh", CHART / "files" / "valkey-users.sh", tmp_path / "users", "--port", "1"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_WORKER_PASSWORD": password},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    assert output in (done.stderr if exit_code else done.stdout)


@pytest.mark.parametrize(("uid", "said"), [(0, "by the image: valkey-server - --port 1"), (10001, "- --port 1")])
def test_script_leaves_root_to_the_image(tmp_path: Path, uid: int, said: str) -> None:
    """The image's entry point gives a server that is started as root a user of its own."""
    (tmp_path / "users").write_text("user default off\n", encoding="utf-8")
    for name, text in (("valkey-server", 'echo "$@"'), ("docker-entrypoint.sh", 'echo by the image: "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\ncat\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {uid}\n", encoding="utf-8")
    (tmp_path / "id").chmod(0o755)
    output = subprocess.run(
        ["sh", CHART / "files" / "valkey-users.sh", tmp_path / "users", "--port", "1"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    ).stdout
    assert output == f"{said}\nuser default off\n"


def test_trial_takes_passwords_of_the_operator(newest: Helm) -> None:
    """From a Secret of their own: the chart makes none then."""
    manifests = newest.render({"valkey": {"enabled": True, "existingSecret": "own"}})
    assert not [each for each in manifests if each["kind"] == "Secret"]
    for where, spec in pods(manifests):
        sources = [each for each in variables(spec["containers"][0]).values() if "secretKeyRef" in each]
        assert {each["secretKeyRef"]["name"] for each in sources} == {"own"}, where
