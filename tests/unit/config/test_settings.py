"""Settings from the environment: empty, wrong and unknown values, and their description in the reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from shiwu_worker.config import errors as config_errors
from shiwu_worker.config.errors import (
    SettingsError,
    load_settings,
    load_settings_or_exit,
    report_unknown_names,
    unknown_names,
)
from shiwu_worker.config.reference import TOPICS, all_settings, changed_settings, value_text
from shiwu_worker.config.settings import Settings
from shiwu_worker.errors import ExitCode
from tests.support.processes import ROOT, clean_environment


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting differs, except the worker's name, whose default depends on the process."""
    for name in [name for name in os.environ if name.upper().startswith("SHIWU_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHIWU_WORKER_NAME", "w")


@pytest.mark.parametrize("empty", ["", " ", "\n\t "])
def test_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    """For each setting alone, and for all of them together; but an empty Redis URL is refused."""
    usual = Settings()
    for field in Settings.model_fields:
        if field not in {"worker_name", "redis_url"}:
            with monkeypatch.context() as alone:
                alone.setenv(f"SHIWU_{field.upper()}", empty)
                assert load_settings() == usual, field
                assert field not in load_settings().model_fields_set
    for field in Settings.model_fields.keys() - {"redis_url"}:
        monkeypatch.setenv(f"SHIWU_{field.upper()}", empty)
    assert load_settings().worker_name == Settings.model_fields["worker_name"].get_default(call_default_factory=True)
    assert load_settings().model_copy(update={"worker_name": "w"}) == usual


def test_spaces_and_upper_case_in_values_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of secrets and people write them."""
    for name, value in {
        "REDIS_URL": "redis://u:p@h:1/2\n",
        "DEVICE": " CUDA:1 ",
        "LOG_LEVEL": "INFO",
        "LEASE_S": " 3\r\n",
        "ALLOW_HOSTS": " a.b:80 , c ,",
    }.items():
        monkeypatch.setenv(f"SHIWU_{name}", value)
    found = load_settings()
    assert found.redis_url.get_secret_value() == "redis://u:p@h:1/2"
    assert (found.device, found.log_level, found.lease_s, found.allow_hosts) == ("cuda:1", "info", 3, ("a.b:80", "c"))


WRONG = [
    ("DEVICE", "gpu", "SHIWU_DEVICE: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
    ("DEVICE", "cuda:x", "got 'cuda:x'"),
    ("DTYPE", "fp16", "SHIWU_DTYPE: expected 'auto', 'float32', 'bfloat16' or 'float16', got 'fp16'"),
    ("ALLOW_HOSTS", "a.b, c d, e", "SHIWU_ALLOW_HOSTS: expected host, *.host or host:port, got 'c d' (item 2)"),
    ("DENY_NETWORKS", "10.0.0.0/8,x", "SHIWU_DENY_NETWORKS: expected a network as 10.0.0.0/8 or fd00::/8, got 'x'"),
    ("NAT64_PREFIXES", "1::/3", "SHIWU_NAT64_PREFIXES: expected an IPv6 prefix"),
    ("FETCH_PORTS", "80,70000", "got '70000' (item 2)"),
    (
        "MAX_BYTES",
        "10MB",
        "SHIWU_MAX_BYTES: expected a whole number, got '10MB'",
    ),
    ("LEASE_S", "nan", "SHIWU_LEASE_S: expected a finite number, got 'nan'"),
    ("FETCH_TIMEOUT_S", "inf", "SHIWU_FETCH_TIMEOUT_S: expected a finite number"),
    ("RESULT_TTL_S", str(10**15), "SHIWU_RESULT_TTL_S: expected at most ten years"),
    ("RETRY", "source_unavailable=3:1:inf", "SHIWU_RETRY: expected"),
    ("FORMATS", "PDF", "SHIWU_FORMATS: expected formats of"),
    ("REVOKE", "maybe", "SHIWU_REVOKE: expected true or false, got 'maybe'"),
    ("READY_FILE", "/no/such/folder/ready", "SHIWU_READY_FILE: expected a file in a folder that exists"),
    ("READY_FILE", f"/{'x' * 300}/ready", "SHIWU_READY_FILE: expected a file in a folder that exists"),
    ("READY_FILE", "/proc/self/exe", "SHIWU_READY_FILE: expected a file, got the link /proc/self/exe"),
    ("ALIVE_FILE", "/proc/self/exe", "SHIWU_ALIVE_FILE: expected a file, got the link /proc/self/exe"),
    ("ALIVE_FILE", "/tmp", "SHIWU_ALIVE_FILE: expected a file, got the folder /tmp"),  # noqa: S108 nothing is written
    ("HTTP_PORT", "tcp://10.0.0.1:80", "enableServiceLinks: false"),
    ("MODLE", "x", "SHIWU_MODLE is not a setting of this version"),
    ("ALLOW_HOST", "x", "did you mean SHIWU_ALLOW_HOSTS?"),
    ("LEASE", "5", "did you mean SHIWU_LEASE_S?"),
    ("S3_ENDPOINT", "http://x", "did you mean SHIWU_S3_ENDPOINT_URL?"),
    ("REDIS_URI", "redis://u:secret@x", "did you mean SHIWU_REDIS_URL?"),
    ("REDIS_URL", "sentinel://u:secret@", "SHIWU_REDIS_URL: expected sentinel://"),
    ("PROXY_URL", "http://", "SHIWU_PROXY_URL: expected http://"),
    ("WORKER_NAME", "a\nb", "SHIWU_WORKER_NAME: expected at most 255 bytes without control characters"),
    ("WORKER_NAME", "猫" * 86, "SHIWU_WORKER_NAME: expected at most 255 bytes"),
    ("PROXY_URL", "u:secret@proxy", "SHIWU_PROXY_URL: expected http://"),
    ("PROXY_URL", "http://u:12/secret@proxy", "SHIWU_PROXY_URL: expected http://"),
    ("PROXY_URL", "http://u:12?secret@proxy", "SHIWU_PROXY_URL: expected http://"),
    ("S3_ENDPOINT_URL", "http://u:12/secret@h", "SHIWU_S3_ENDPOINT_URL: expected http://"),
    ("S3_CLIENT", "http://u:s/secret@h", "got 'http://h'"),
]


@pytest.mark.parametrize(("name", "value", "text"), WRONG, ids=[f"{name}-{value:.12}" for name, value, _ in WRONG])
def test_wrong_setting_is_reported_with_name_and_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str, text: str
) -> None:
    """One line on standard error with the variable's own name, the item of a list, no password, and exit code 64."""
    monkeypatch.setenv(f"SHIWU_{name}", value)
    with pytest.raises(SystemExit) as ended:
        load_settings_or_exit()
    assert ended.value.code == ExitCode.CONFIG
    [line] = capsys.readouterr().err.splitlines()
    assert text in line
    assert "secret" not in line


def test_all_wrong_settings_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start shows all of them, with misspelt names."""
    for name, value in {"DEVICE": "gpu", "LEASE_S": "0", "MODLE": "x"}.items():
        monkeypatch.setenv(f"SHIWU_{name}", value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert [line.split()[0] for line in str(caught.value).splitlines()] == [
        "SHIWU_DEVICE:",
        "SHIWU_LEASE_S:",
        "SHIWU_MODLE",
    ]


def test_unknown_names_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting of a newer chart does not end the worker; variables that Kubernetes adds for a Service are ignored."""
    environment = {
        "SHIWU_FROM_THE_FUTURE": "1",
        "shiwu_other": "x",
        "SHIWU_LABELS": "x",
        "SHIWU_SERVICE_HOST": "10.0.0.1",
        "SHIWU_PORT": "tcp://10.0.0.1:80",
        "SHIWU_VALKEY_SERVICE_PORT_REDIS": "6379",
        "SHIWU_VALKEY_PORT_6379_TCP_ADDR": "10.0.0.1",
        "SHIWU_LEASE_S": "3",
        "OTHER": "x",
    }
    assert [str(setting).partition(" is ")[0] for setting in unknown_names(environment)] == [
        "SHIWU_FROM_THE_FUTURE",
        "SHIWU_LABELS",
        "shiwu_other",
    ]
    assert not any(setting.is_misspelt for setting in unknown_names(environment))
    load_settings(environment)
    with structlog.testing.capture_logs() as logged:
        monkeypatch.setattr(config_errors, "log", structlog.get_logger())
        report_unknown_names(environment)
        report_unknown_names(environment)
    [line] = logged
    assert (line["event"], line["log_level"], len(line["names"])) == ("unknown_settings", "warning", 3)
    assert "did you mean SHIWU_LABELS_DIR?" in line["names"][1]
    assert {"SHIWU_SERVICE_HOST", "SHIWU_LEASE_S", "OTHER"} <= environment.keys()


STARTS = {
    "shiwu-worker": [sys.executable, "-m", "shiwu_worker"],
    "check": [sys.executable, "-m", "shiwu_worker", "--check"],
    "tune": [sys.executable, "-m", "shiwu_worker", "--tune"],
    "celery": [sys.executable, "-m", "celery", "-A", "shiwu_worker.app", "worker"],
}


@pytest.mark.parametrize("command", STARTS.values(), ids=STARTS)
def test_every_command_refuses_wrong_settings(command: list[str], tmp_path: Path) -> None:
    """In words and with exit code 64, before torch is loaded: it cannot be loaded here."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None\n", encoding="utf-8")
    env = clean_environment({"SHIWU_DEVICE": "gpu", "SHIWU_MODLE": "x", "PYTHONPATH": str(tmp_path)})
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == ExitCode.CONFIG, done.stderr
    first, second = done.stderr.splitlines()
    assert first == "SHIWU_DEVICE: expected auto, cpu, cuda or cuda:N, got 'gpu'"
    assert second.endswith("did you mean SHIWU_MODEL?")


def test_reference_has_every_setting_with_unit_and_topic() -> None:
    """A number has a unit, a word of a few has them all, and each topic begins with a setting that exists."""
    rows = all_settings()
    assert sorted(row.field for row in rows) == sorted(Settings.model_fields)
    assert set(TOPICS) <= set(Settings.model_fields)
    assert list(dict.fromkeys(row.topic for row in rows)) == list(TOPICS.values())
    assert {row.field: row.topic for row in rows if row.field in TOPICS} == dict(TOPICS)
    by_field = {row.field: row for row in rows}
    assert by_field["lease_s"].unit == "seconds, ≥ 1, ≤ 600"
    assert by_field["loader_memory_mb"].unit.startswith("MiB")
    assert by_field["log_format"].unit == "auto, json, console"
    assert (by_field["sandbox"].unit, by_field["sandbox"].default) == ("true or false", "true")
    assert all(row.unit for row in rows if re.fullmatch(r"\d+(\.\d+)?", row.default))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"redis_url": "redis://user:secret@h:1/2"}, "redis://h:1/2"),
        ({"proxy_url": "http://user:secret@proxy:3128"}, "http://proxy:3128"),
        ({"s3_endpoint_url": "http://user:secret@s3:9000"}, "http://s3:9000"),
        ({"retry": "source_unavailable=5:1:30"}, "source_unavailable=5:1:30"),
        ({"allow_hosts": "a.b,c:80"}, "a.b,c:80"),
        ({"revoke": False}, "false"),
        ({"linger_ms": 0.5}, "0.5"),
    ],
)
def test_values_are_shown_in_the_form_of_the_variable(options: dict[str, Any], expected: str) -> None:
    """In the form of the variable, without user names and passwords; only what differs from its default counts."""
    settings = Settings(**options, lease_s=15)
    [changed] = [change for change in changed_settings(settings) if change.field != "worker_name"]
    assert value_text(getattr(settings, changed.field)) == expected
