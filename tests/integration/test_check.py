"""`shiwu-worker --check`: its report on Redis, label files and settings, and its exit code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from shiwu_worker.__main__ import main
from shiwu_worker.celery_worker import callback_app
from shiwu_worker.commands import check
from shiwu_worker.commands.check import Report
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode, FatalError
from shiwu_worker.service.factories import connect
from tests.support.servers import S3Server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    """This Redis, no bucket, and a model that needs no loading."""
    monkeypatch.setenv("SHIWU_REDIS_URL", redis_url)
    monkeypatch.setattr(check, "_check_s3", lambda _: "not asked")
    monkeypatch.setattr(check, "_check_model", lambda _: "loaded")


@pytest.fixture
def config(redis_client: redis.Redis) -> Iterator[redis.Redis]:
    """The server, whose memory policy and append-only file are put back."""
    names = ("maxmemory-policy", "maxmemory", "appendonly")
    before: dict[str, Any] = {name: redis_client.config_get(name)[name] for name in names}
    yield redis_client
    for name, value in before.items():
        redis_client.config_set(name, value)


def run(*args: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(main, ["--check", *args], catch_exceptions=False)


@pytest.mark.parametrize(
    ("settings", "code", "text"),
    [
        ({"maxmemory-policy": "noeviction", "maxmemory": "100mb"}, 0, "maxmemory-policy noeviction, maxmemory 100"),
        ({"maxmemory-policy": "volatile-lru"}, 0, "warning  redis: maxmemory-policy volatile-lru deletes answers"),
        ({"maxmemory-policy": "noeviction", "maxmemory": "0"}, 0, "warning  redis: maxmemory is not set"),
        ({"maxmemory-policy": "noeviction", "maxmemory": "500mb"}, 0, "maxmemory is 500 MiB, less than"),
        ({"maxmemory-policy": "allkeys-lru"}, 64, "failed   redis: expected maxmemory-policy noeviction"),
        ({"maxmemory-policy": "noeviction", "appendonly": "no"}, 0, "warning  redis: the append-only file is off"),
    ],
)
def test_check_reports_memory_settings_of_redis(
    config: redis.Redis, settings: dict[str, str], code: int, text: str
) -> None:
    """A policy that deletes jobs is an error; one that deletes answers, and no append-only file, are warnings."""
    for name, value in settings.items():
        config.config_set(name, value)
    result = run()
    assert result.exit_code == code, result.output
    assert text in result.stdout
    assert ("append-only" in result.stdout) == (settings.get("appendonly") == "no" or code == 0)


def test_check_without_info_warns(redis_client: redis.Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that may not run INFO can work."""
    redis_client.acl_setuser(
        "check-user", enabled=True, passwords=["+pw"], keys=["*"], commands=["+ping", "+client|setname", "+select"]
    )
    monkeypatch.setenv("SHIWU_REDIS_URL", redis_url.replace("://", "://check-user:pw@"))
    try:
        result = run()
    finally:
        redis_client.acl_deluser("check-user")
    assert result.exit_code == 0, result.output
    assert "warning  redis: version and memory settings are not known" in result.stdout
    assert "pw@" not in result.output


def test_check_reports_jobs_under_old_names(redis_client: redis.Redis) -> None:
    """They are those of an earlier version, which this one would not find."""
    redis_client.hset("shiwu:parked", "job", "shiwu.bulk|x")
    result = run()
    assert result.exit_code == 64
    assert "failed   redis: redis_old_names" in result.stdout
    assert "run `shiwu migrate`" in result.stdout


def test_check_prints_results_first_and_changed_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings by --all only, with unit and default, those that were changed marked."""
    monkeypatch.setenv("SHIWU_LEASE_S", "7")
    monkeypatch.setenv("SHIWU_ALLOW_FOLDERS", "/no/such/folder")
    monkeypatch.setenv("SHIWU_FROM_THE_FUTURE", "[/red]\x1b[2J")
    short = run()
    lines = short.stdout.splitlines()
    assert [line.split()[1] for line in lines[:6] if line.split()[0] == "ok"][:2] == ["settings:", "redis:"]
    assert "warning  settings: SHIWU_FROM_THE_FUTURE is not a setting of this version" in short.stdout
    assert "warning  settings: SHIWU_ALLOW_FOLDERS: /no/such/folder is not a folder on this machine" in lines
    assert "  SHIWU_LEASE_S=7  (default: 15)" in lines
    assert "SHIWU_GRACE_S" not in short.stdout
    long = run("--all").stdout
    [row] = [line for line in long.splitlines() if "SHIWU_LEASE_S" in line]
    assert [cell.strip() for cell in row.split("│")[1:6]] == ["*", "SHIWU_LEASE_S", "7", "seconds, ≥ 1, ≤ 600", "15"]
    assert "SHIWU_GRACE_S" in long
    assert long.index("model: loaded") < long.index("SHIWU_LEASE_S")


def test_check_continues_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each check reports its own failure; the exit code is that of the first, as for a worker."""
    monkeypatch.setenv("SHIWU_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("SHIWU_LABELS_DIR", str(tmp_path))
    (tmp_path / "x.yaml").write_text("labels: [", encoding="utf-8")

    def fail(_: object) -> str:
        raise FatalError(ExitCode.MODEL, "no such model")

    monkeypatch.setattr(check, "_check_model", fail)
    result = run()
    assert result.exit_code == ExitCode.CONFIG
    failed = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("failed")]
    assert failed == ["redis:", "callbacks:", "labels:", "model:"]
    assert "Traceback" not in result.output
    monkeypatch.setattr(check, "_check_redis", lambda _: Report("fine"))
    monkeypatch.setattr(callback_app, "check_callbacks", lambda _: "fine")
    monkeypatch.delenv("SHIWU_LABELS_DIR")
    assert run().exit_code == ExitCode.MODEL


def test_check_reports_defects_as_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a traceback on standard error, and the exit code for a defect."""

    def fail(_: object) -> str:
        raise KeyError("x")

    monkeypatch.setattr(check, "_check_model", fail)
    result = run()
    assert result.exit_code == ExitCode.INTERNAL
    assert "failed   model: KeyError: 'x' (a defect of shiwu: please report it)" in result.stdout
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("args", "text"), [(["--all"], "expected --all with --check"), (["--check", "--tune"], "expected only one of")]
)
def test_contradicting_options_are_refused(args: list[str], text: str) -> None:
    """Instead of a worker that starts, or an option without effect."""
    result = CliRunner().invoke(main, args)
    assert (result.exit_code, text in result.output) == (2, True)


def test_check_of_all_real_parts_succeeds(
    monkeypatch: pytest.MonkeyPatch, s3: S3Server, redis_client: redis.Redis
) -> None:
    """The embedded model, the embedded labels and a real store."""
    monkeypatch.undo()
    for name, value in (s3.env | {"SHIWU_MAX_BATCH": "1", "SHIWU_TORCH_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    kwargs = redis_client.connection_pool.connection_kwargs
    monkeypatch.setenv("SHIWU_REDIS_URL", f"redis://{kwargs['host']}:{kwargs['port']}/0")
    result = run()
    assert result.exit_code == 0, result.output
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("ok")] == [
        "settings:",
        "redis:",
        "callbacks:",
        "labels:",
        "s3:",
        "gpus:",
        "model:",
    ]


def test_any_worker_name_becomes_a_valid_client_name(redis_url: str) -> None:
    """Redis refuses client names with spaces or letters beyond ASCII, and the worker would never claim."""
    settings = Settings(redis_url=redis_url, worker_name="工人 a|b")
    with connect(settings, connections=1) as client:
        assert client.client_getname() == "shiwu----a|b"
